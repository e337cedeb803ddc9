"""Attention of many queries over plain tensors of rotated keys and of values, stretch by stretch.

A program has a tile of queries of one sequence and KV head, in registers, and goes through tiles of tokens with an online
softmax (attend.py). The state of a query, maximum, sum and output not yet divided, stays in memory from call to call,
so that the context may come in stretches:

    rotate_kernel    queries, at their own positions, by row    -> rotated
    flash_kernel     once per stretch                           -> maxima, sums, outputs
    finish_kernel    puts the splits together, divides          -> result

Row r of a sequence and KV head is token r // GROUP and query head r % GROUP of the head. Few queries do not fill a GPU:
then a stretch is split, too, and every split keeps a state of its own.
"""

import triton
import triton.language as tl

from deployment.kernels.phase import cos_sin, first_of_pair, second_of_pair, steps_of


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_s", "new", "room"])
def rotate_kernel(
    query,  # [B, H, S, D] any float, pre-RoPE
    stride_b,
    stride_h,
    stride_s,
    positions,  # [B, S] int64
    steps,  # [D/2, 2] int32, see `Rotary`
    factor,  # [D/2] fp32
    scaling,  # of the scores, times log2 e
    result,  # [B, G, room, D] fp16 or fp32
    new,  # S
    room,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """ROWS queries, rotated at their positions and scaled; zeros in place of those that do not exist."""
    stream = tl.program_id(1).to(tl.int64)
    b, g = stream // G, stream % G
    row, pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PAIRS)
    first, second = first_of_pair(pair, ROTARY_HALF, D // 2), second_of_pair(pair, ROTARY_HALF, D // 2)
    pair_ok = pair < D // 2
    token, head = row // GROUP, g * GROUP + row % GROUP
    row_ok = token < new
    position = tl.load(positions + b * new + token, mask=row_ok, other=0)
    high, low = steps_of(steps, pair, pair_ok)
    cos, sin = cos_sin(position[:, None], high[None, :], low[None, :])
    scale = (tl.load(factor + pair, mask=pair_ok, other=0) * scaling)[None, :]
    at = (query + b * stride_b + head * stride_h + token.to(tl.int64) * stride_s)[:, None]
    ok = row_ok[:, None] & pair_ok[None, :]
    one = tl.load(at + first[None, :], mask=ok, other=0).to(tl.float32) * scale
    two = tl.load(at + second[None, :], mask=ok, other=0).to(tl.float32) * scale
    to = result + (stream * room + row)[:, None] * D
    tl.store(to + first[None, :], (one * cos - two * sin).to(result.dtype.element_ty), mask=pair_ok[None, :])
    tl.store(to + second[None, :], (two * cos + one * sin).to(result.dtype.element_ty), mask=pair_ok[None, :])


@triton.jit(do_not_specialize=["shift", "tokens", "new", "room", "tiles", "splits"])
def flash_kernel(
    rotated,  # [B, G, tiles * ROWS, D] fp16 or fp32, scaled
    positions,  # [B, S] int64, of the queries; negative for padding
    origins,  # [B] int64, plus shift: position of the stretch's first token
    shift,
    limits,  # [B] int64, positions from here on are not stored
    tokens,  # of the stretch
    key,  # [B, G, room, D] fp16 or fp32, rotated
    value,  # [B, G, room, D]
    maxima,  # [splits, B, G, tiles * ROWS] fp32
    sums,  # [splits, B, G, tiles * ROWS] fp32
    outputs,  # [splits, B, G, tiles * ROWS, D] fp32, not divided by the sums
    new,  # S
    room,
    tiles,
    splits,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    LIMITED: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Adds what a split of the stretch contributes to the state of a tile of queries."""
    # late queries see most, and begin first
    tile, split = tiles - 1 - tl.program_id(0) % tiles, tl.program_id(0) // tiles
    stream = tl.program_id(1).to(tl.int64)
    b = stream // G
    row, channel = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    row_ok, channel_ok = row < new * GROUP, (channel < D)[None, :]

    # all within the stretch from here on: the tokens begin, ..., last are seen
    origin = tl.load(origins + b) + shift
    held = tokens.to(tl.int64)
    if LIMITED:
        held = tl.minimum(tl.load(limits + b) - origin, held)
    position = tl.load(positions + b * new + row // GROUP, mask=row_ok, other=-1)
    last = tl.minimum(position - origin, held - 1)
    begin = tl.maximum(-origin, 0)
    last = tl.where(row_ok & (last >= begin), last, -1).to(tl.int32)
    begin = tl.minimum(begin, tokens).to(tl.int32)

    # the split's tiles, and up to where all queries see all tokens
    end = tl.max(last, 0) + 1
    tile0, tile1 = begin // TOKENS, (end + TOKENS - 1) // TOKENS
    share = (tl.maximum(tile1 - tile0, 0) + splits - 1) // splits
    from_tile = tile0 + split * share
    to_tile = tl.minimum(from_tile + share, tile1)
    if from_tile >= to_tile:
        return
    all_see = (tl.min(tl.where(row_ok, last, 2147483647), 0).to(tl.int64) + 1) // TOKENS
    whole = tl.maximum(tl.minimum(all_see, to_tile).to(tl.int32), from_tile)
    whole = tl.where(begin > 0, from_tile, whole)

    state = (split * tl.num_programs(1) + stream) * (tiles * ROWS) + row
    output_at = outputs + state[:, None] * D + channel[None, :]
    highest, total = tl.load(maxima + state), tl.load(sums + state)
    output = tl.load(output_at, mask=channel_ok, other=0)
    query_at = rotated + (stream * (tiles * ROWS) + row)[:, None] * D + channel[None, :]
    query = tl.load(query_at, mask=channel_ok, other=0)
    key += stream * room * D
    value += stream * room * D
    highest, total, output = visit(
        query,
        key,
        value,
        highest,
        total,
        output,
        from_tile,
        whole,
        begin,
        end,
        last,
        D,
        TOKENS,
        CHANNELS,
        False,
        PRECISE,
    )
    highest, total, output = visit(
        query, key, value, highest, total, output, whole, to_tile, begin, end, last, D, TOKENS, CHANNELS, True, PRECISE
    )
    tl.store(maxima + state, highest)
    tl.store(sums + state, total)
    tl.store(output_at, output, mask=channel_ok)


@triton.jit
def visit(
    query,
    key,
    value,
    highest,
    total,
    output,
    from_tile,
    to_tile,
    begin,  # the first token that any query sees
    end,  # one past the last; beyond it the memory may hold anything
    last,  # [rows], of each query
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    MASKED: tl.constexpr,  # whether some query may not see some token
    PRECISE: tl.constexpr,
):
    """The state after some tiles of tokens: (highest, total, output)."""
    PRECISION: tl.constexpr = "ieee" if PRECISE else None
    # weights of 1 become 2^15 in fp16, so that those of 2^-29 are still normal numbers; sums see the same factor
    LIFT: tl.constexpr = 0.0 if PRECISE else 15.0
    channel_ok = (tl.arange(0, CHANNELS) < D)[None, :]
    for tile in range(from_tile, to_tile):
        token = tile * TOKENS + tl.arange(0, TOKENS)
        at = token[:, None] * D + tl.arange(0, CHANNELS)[None, :]
        keys = tl.load(key + at, mask=channel_ok, other=0) if D < CHANNELS else tl.load(key + at)
        score = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
        if MASKED:
            seen = (token[None, :] <= last[:, None]) & (token >= begin)[None, :]
            score = tl.where(seen, score, float("-inf"))
        raised = tl.maximum(highest, tl.max(score, 1))
        # where nothing has been seen yet the maximum is still -inf, and -inf - -inf is not a number
        reference = tl.where(raised == float("-inf"), 0.0, raised) if MASKED else raised
        weight = tl.exp2(score - (reference - LIFT)[:, None])
        shrink = tl.exp2(highest - reference)
        total = total * shrink + tl.sum(weight, 1)
        highest = raised
        if MASKED:  # a weight of 0 takes nothing away from NaN
            values = tl.load(value + at, mask=channel_ok & (token < end)[:, None], other=0)
        else:
            values = tl.load(value + at, mask=channel_ok, other=0) if D < CHANNELS else tl.load(value + at)
        output = tl.dot(weight.to(values.dtype), values, output * shrink[:, None], input_precision=PRECISION)
    return highest, total, output


@triton.jit(do_not_specialize=["new", "room", "splits"])
def finish_kernel(
    maxima,  # [splits, B, G, room] fp32
    sums,
    outputs,  # [splits, B, G, room, D] fp32
    result,  # [B, S, H, D] any float
    new,
    room,
    splits,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """ROWS queries: the splits' outputs weighted by 2^(their maximum - the maximum of all); zeros where nothing was seen."""
    stream = tl.program_id(1).to(tl.int64)
    b, g = stream // G, stream % G
    row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    row_ok = row < new * GROUP
    ok = row_ok[:, None] & (channel < D)[None, :]
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, CHANNELS], tl.float32)
    for split in range(splits):
        state = (split * tl.num_programs(1) + stream) * room + row
        maximum = tl.load(maxima + state, mask=row_ok, other=float("-inf"))
        raised = tl.maximum(highest, maximum)
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        shrink, factor = tl.exp2(highest - reference), tl.exp2(maximum - reference)
        total = total * shrink + tl.load(sums + state, mask=row_ok, other=0) * factor
        part = tl.load(outputs + state[:, None] * D + channel[None, :], mask=ok, other=0)
        output = output * shrink[:, None] + part * factor[:, None]
        highest = raised
    output = output / tl.where(total == 0, 1.0, total)[:, None]
    to = ((b * new + row // GROUP) * G + g) * GROUP + row % GROUP
    tl.store(result + to[:, None] * D + channel[None, :], output.to(result.dtype.element_ty), mask=ok)
