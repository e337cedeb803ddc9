"""The attention kernel: some queries over one part of one segment of the context, for one sequence and KV head.

A program works through chunks of the context, several blocks of 64 tokens each, in phases:

    1  queries, rotated back to the first token of every block         -> rotated
    2  scores of the dequantized keys; outliers add what they exceed    -> scores
    3  softmax of the chunk, online over chunks                         -> weights
    4  values of the dequantized tokens; outliers add up on their own   -> accumulator, extra

What passes from phase to phase goes through scratch memory of the program that stays in cache. Phases, instead of one loop,
because the softmax is then computed for real queries only, not for the padding of a tensor core's 16 rows, and because a
list of outliers is one flat loop. `combine` puts the parts together.

Row r of a tile of queries is token r // (H/G) of the new ones and query head r % (H/G) of the KV head, so one query or many
is the same to the kernel.
"""

import triton
import triton.language as tl

from deployment.kernels.loads import (
    key_halves,
    list_begin,
    outlier_deltas,
    static,
    table_of,
    token_ranges,
    turned_query,
    value_tile,
)
from deployment.kernels.phase import cos_sin, first_of_pair, second_of_pair
from deployment.kernels.tiles import DENSE, FRAGMENT_ORDER, operand_order

# numbers that change from call to call must not make the compiler specialise
_RUNTIME = [
    "query_stride_b",
    "query_stride_h",
    "query_stride_s",
    "shift",
    "new",
    "segment_tokens",
    "blocks",
    "part",
    "splits",
    "tiles",
    "works",
]


@triton.jit(do_not_specialize=_RUNTIME)
def split_kernel(
    query,  # [B, H, S, D] any float, pre-RoPE
    query_stride_b,
    query_stride_h,
    query_stride_s,
    positions,  # [B, S] int64, of the queries; negative for padding
    origins,  # [B] int64, plus shift: position of the segment's first token
    shift,
    limits,  # [B] int64, positions from here on are not stored
    high,  # [D/2] int32
    low,  # [D/2] int32
    turn,  # [2, D/2, 64] fp32
    scaling,  # of the scores, times log2 e
    new,  # S
    segment_tokens,
    key_words,  # [B, blocks, W] int32
    key_scales,  # [B, blocks * 64, 2] fp16
    key_levels,
    key_scale,
    key_zero,
    key_floor,
    key_width,
    key_offset,
    key_first_level,
    key_index,
    key_value,
    key_starts,
    key_ends,
    key_dense,  # [B, G, segment_tokens, D]
    value_words,
    value_scales,
    value_levels,
    value_scale,
    value_zero,
    value_floor,
    value_width,
    value_offset,
    value_first_level,
    value_index,
    value_value,
    value_starts,
    value_ends,
    value_dense,
    dense_stride_b,
    dense_stride_g,
    dense_stride_t,
    blocks,  # of the page
    key_block_words,  # W
    value_block_words,
    rotated,  # [programs, CHUNK / 64, ROWS, 2, PAIRS] operand dtype
    scores,  # [programs, CHUNK, ROWS] fp32
    weights,  # [programs, CHUNK, ROWS] operand dtype
    scaled,  # [programs, CHUNK, ROWS] operand dtype
    extra,  # [programs, D, ROWS] fp32
    rescale,  # [programs, ROWS] fp32
    outputs,  # [parts, B, G, tiles, ROWS, D] fp32, not divided by the sums
    maxima,  # [parts, B, G, tiles, ROWS] fp32
    sums,  # [parts, B, G, tiles, ROWS] fp32
    part,  # first part of this segment
    splits,
    tiles,
    works,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    KEY_SOURCE: tl.constexpr,
    VALUE_SOURCE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    KEY_GEOMETRY: tl.constexpr,
    VALUE_GEOMETRY: tl.constexpr,
    KEY_DYNAMIC: tl.constexpr,
    VALUE_DYNAMIC: tl.constexpr,
    KEY_OUTLIERS: tl.constexpr,
    VALUE_OUTLIERS: tl.constexpr,
    LIMITED: tl.constexpr,
    PRECISE: tl.constexpr,
    ENTRIES: tl.constexpr,
    KEY_FAST: tl.constexpr,
    VALUE_FAST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Parts of the outputs, with the maxima and sums of their softmax; see the top of this file."""
    GROUP: tl.constexpr = H // G
    BLOCKS: tl.constexpr = CHUNK // 64
    MMA_ROWS: tl.constexpr = 16 if ROWS < 16 else ROWS
    OPERAND: tl.constexpr = tl.float32 if PRECISE else tl.float16
    PRECISION: tl.constexpr = "ieee" if PRECISE else None
    # weights of 1 become 2^15 in fp16, so that those of 2^-29 are still normal numbers; sums see the same factor
    LIFT: tl.constexpr = 0.0 if PRECISE else 15.0
    # times a token's scale they must not overflow either
    LOWER: tl.constexpr = 0.00390625 if VALUE_DYNAMIC and not PRECISE else 1.0

    row, mma_row = tl.arange(0, ROWS), tl.arange(0, MMA_ROWS)
    pair, channel = tl.arange(0, PAIRS), tl.arange(0, CHANNELS)
    pair_ok, channel_ok = pair < D // 2, channel < D
    first, second = first_of_pair(pair, ROTARY_HALF), second_of_pair(pair, ROTARY_HALF, D // 2)
    # fragments come in an order of their own along what a product sums over
    KEY_WIDTH: tl.constexpr = WIDTH if KEY_SOURCE == FRAGMENT_ORDER else 2
    VALUE_WIDTH: tl.constexpr = WIDTH if VALUE_SOURCE == FRAGMENT_ORDER else 2
    key_pair = operand_order(pair, KEY_WIDTH)
    key_first, key_second = first_of_pair(key_pair, ROTARY_HALF), second_of_pair(key_pair, ROTARY_HALF, D // 2)
    block_token, chunk_token = tl.arange(0, 64), tl.arange(0, CHUNK)

    program = tl.program_id(0).to(tl.int64)
    rotated += program * (BLOCKS * ROWS * 2 * PAIRS)
    scores += program * (CHUNK * ROWS)
    weights += program * (CHUNK * ROWS)
    scaled += program * (CHUNK * ROWS)
    extra += program * (D * ROWS)
    rescale += program * ROWS
    for work in range(tl.program_id(0), works, tl.num_programs(0)):
        split, rest = work % splits, work // splits
        tile, stream = rest % tiles, (rest // tiles).to(tl.int64)
        b, g = stream // G, (stream % G).to(tl.int32)
        origin = tl.load(origins + b) + shift
        held = segment_tokens
        if LIMITED:
            held = tl.minimum(tl.maximum(tl.load(limits + b) - origin, 0), segment_tokens).to(tl.int32)
        chunks = (held + CHUNK - 1) // CHUNK
        per_split = (chunks + splits - 1) // splits

        # the queries at their own positions
        number = tile * ROWS + row
        row_ok = number < new * GROUP
        token_s, head = number // GROUP, g * GROUP + number % GROUP
        position = tl.load(positions + b * new + token_s, mask=row_ok, other=-1)
        at = query + b * query_stride_b + head.to(tl.int64) * query_stride_h + token_s.to(tl.int64) * query_stride_s
        query_ok = row_ok[:, None] & pair_ok[None, :]
        a = tl.load(at[:, None] + first[None, :], mask=query_ok, other=0).to(tl.float32) * scaling
        b_half = tl.load(at[:, None] + second[None, :], mask=query_ok, other=0).to(tl.float32) * scaling
        high_bits = tl.load(high + pair, mask=pair_ok, other=0)
        low_bits = tl.load(low + pair, mask=pair_ok, other=0)
        own_cos, own_sin = cos_sin(position[:, None], high_bits[None, :], low_bits[None, :])
        query_a, query_b = a * own_cos - b_half * own_sin, b_half * own_cos + a * own_sin

        # pointers to the head's part of everything
        channel0 = g * D
        key_tables = (
            key_levels,
            key_scale + channel0,
            key_zero + channel0,
            key_width + channel0,
            key_offset + channel0,
            key_first_level + channel0,
        )
        value_tables = (
            value_levels,
            value_scale + channel0,
            value_zero + channel0,
            value_width + channel0,
            value_offset + channel0,
            value_first_level + channel0,
        )
        key_head, value_head = key_words + b * blocks * key_block_words, value_words + b * blocks * value_block_words
        if KEY_SOURCE == FRAGMENT_ORDER:
            key_head += g * (D * 2 * KEY_BITS)
        if VALUE_SOURCE == FRAGMENT_ORDER:
            value_head += g * (D * 2 * VALUE_BITS)
        key_ranges, value_ranges = key_scales + b * blocks * 128, value_scales + b * blocks * 128
        key_plain = key_dense + b * dense_stride_b + g.to(tl.int64) * dense_stride_g
        value_plain = value_dense + b * dense_stride_b + g.to(tl.int64) * dense_stride_g

        key_ready = (table_of(key_levels, KEY_SOURCE, KEY_BITS, KEY_FAST), 0, 0, 0, 0)
        if KEY_SOURCE != DENSE and not KEY_DYNAMIC:
            first_scale, first_zero = static(key_tables[1], key_tables[2], key_first, pair_ok, KEY_FAST)
            second_scale, second_zero = static(key_tables[1], key_tables[2], key_second, pair_ok, KEY_FAST)
            key_ready = (key_ready[0], first_scale, first_zero, second_scale, second_zero)
        value_ready = (table_of(value_levels, VALUE_SOURCE, VALUE_BITS, VALUE_FAST), 0, 0)
        if VALUE_SOURCE != DENSE and not VALUE_DYNAMIC:
            value_s, value_z = static(value_tables[1], value_tables[2], channel, channel_ok, VALUE_FAST)
            value_ready = (value_ready[0], value_s, value_z)
        turn_at = turn + key_pair[:, None] * 64 + block_token[None, :]
        turn_cos = tl.load(turn_at, mask=pair_ok[:, None], other=0).to(OPERAND)
        turn_sin = tl.load(turn_at + D * 32, mask=pair_ok[:, None], other=0).to(OPERAND)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        offset = tl.zeros([ROWS], tl.float32)
        output = tl.zeros([MMA_ROWS, CHANNELS], tl.float32)
        extra_at = extra + channel[None, :] * ROWS + mma_row[:, None]
        extra_ok = channel_ok[None, :] & (mma_row < ROWS)[:, None]
        if VALUE_OUTLIERS:
            tl.store(extra_at, output, mask=extra_ok)

        for chunk in range(split * per_split, tl.minimum((split + 1) * per_split, chunks)):
            token0 = chunk * CHUNK
            here = tl.minimum(BLOCKS, (held - token0 + 63) // 64)

            # 1: rotate back to every block's first token
            for j in range(here):
                base = origin + token0 + j * 64 + tl.zeros([1, 1], tl.int64)
                cos, sin = cos_sin(base, high_bits[None, :], low_bits[None, :])
                back_at = rotated + (j * ROWS + row)[:, None] * (2 * PAIRS) + pair[None, :]
                tl.store(back_at, (query_a * cos + query_b * sin).to(OPERAND))
                tl.store(back_at + PAIRS, (query_b * cos - query_a * sin).to(OPERAND))
            tl.debug_barrier()

            # 2: scores
            for j in range(here):
                block = (token0 // 64 + j).to(tl.int64)
                key_a, key_b = key_halves(
                    key_head + block * key_block_words,
                    key_ranges,
                    key_tables,
                    key_ready,
                    key_plain,
                    dense_stride_t,
                    token0 + j * 64,
                    held,
                    key_first,
                    key_second,
                    pair_ok,
                    KEY_GEOMETRY,
                    KEY_SOURCE,
                    KEY_DYNAMIC,
                    KEY_BITS,
                    PAIRS,
                    KEY_WIDTH,
                    KEY_FAST,
                )
                read_at = rotated + (j * ROWS + mma_row)[:, None] * (2 * PAIRS) + key_pair[None, :]
                back_a = tl.load(read_at, mask=(mma_row < ROWS)[:, None], other=0)
                back_b = tl.load(read_at + PAIRS, mask=(mma_row < ROWS)[:, None], other=0)
                key_a, key_b = key_a.to(OPERAND), key_b.to(OPERAND)
                dot = tl.dot(back_a, key_a * turn_cos - key_b * turn_sin, input_precision=PRECISION)
                dot = tl.dot(back_b, key_b * turn_cos + key_a * turn_sin, dot, input_precision=PRECISION)
                dot_at = scores + (j * 64 + block_token)[None, :] * ROWS + mma_row[:, None]
                tl.store(dot_at, dot, mask=(mma_row < ROWS)[:, None])
            tl.debug_barrier()
            if KEY_OUTLIERS:
                if here > 0:
                    key_edges = key_ends + stream * blocks + token0 // 64
                    key_begin = list_begin(key_starts, key_ends, stream, token0 // 64, blocks)
                    for entry0 in range(key_begin, tl.load(key_edges + here - 1), ENTRIES):
                        entry = entry0 + tl.arange(0, ENTRIES)
                        ok = entry < tl.load(key_edges + here - 1)
                        token, lane, delta = outlier_deltas(
                            key_index,
                            key_value,
                            entry,
                            ok,
                            key_edges,
                            here,
                            key_ranges,
                            key_levels,
                            key_floor + channel0,
                            token0,
                            BLOCKS,
                            D,
                            KEY_DYNAMIC,
                        )
                        factor = turned_query(rotated, token, lane, row, ok, turn, ROWS, PAIRS, D, ROTARY_HALF)
                        sum_at = scores + token[:, None] * ROWS + row[None, :]
                        tl.atomic_add(sum_at, factor * delta[:, None], mask=ok[:, None], sem="relaxed")
                tl.debug_barrier()

            # 3: softmax; whatever lies beyond the stored tokens or after the query is not seen
            where = origin + token0 + chunk_token
            seen = (token0 + chunk_token < held) & (where >= 0)
            seen = seen[None, :] & (where[None, :] <= position[:, None])
            score_at = scores + chunk_token[None, :] * ROWS + row[:, None]
            score = tl.load(score_at, mask=seen, other=float("-inf"), cache_modifier=".cg")
            raised = tl.maximum(highest, tl.max(score, 1))
            reference = tl.where(raised == float("-inf"), 0.0, raised)
            weight = tl.exp2(score - reference[:, None] + LIFT)
            shrink = tl.exp2(highest - reference)
            total = total * shrink + tl.sum(weight, 1)
            highest = raised
            weight_to = chunk_token[None, :] * ROWS + row[:, None]
            tl.store(weights + weight_to, weight.to(OPERAND))
            if VALUE_DYNAMIC:  # level * scale + zero: scales go to the weights, zeros add up on their own
                token_ok = token0 + chunk_token < held
                scale, zero = token_ranges(value_ranges, token0 + chunk_token, token_ok)
                tl.store(scaled + weight_to, (weight * (scale * LOWER)[None, :]).to(OPERAND))
                offset = offset * shrink + tl.sum(weight * zero[None, :], 1)
            tl.store(rescale + row, shrink)
            tl.debug_barrier()

            # 4: values
            output *= tl.load(rescale + mma_row, mask=mma_row < ROWS, other=0)[:, None]
            for j in range(here):
                block = (token0 // 64 + j).to(tl.int64)
                tile_v = value_tile(
                    value_head + block * value_block_words,
                    value_tables,
                    value_ready,
                    value_plain,
                    dense_stride_t,
                    token0 + j * 64,
                    held,
                    channel,
                    channel_ok,
                    VALUE_GEOMETRY,
                    VALUE_SOURCE,
                    VALUE_DYNAMIC,
                    VALUE_BITS,
                    CHANNELS,
                    VALUE_WIDTH,
                    VALUE_FAST,
                )
                weight_at = (
                    (scaled if VALUE_DYNAMIC else weights)
                    + (j * 64 + operand_order(block_token, VALUE_WIDTH))[None, :] * ROWS
                    + mma_row[:, None]
                )
                tile_w = tl.load(weight_at, mask=(mma_row < ROWS)[:, None], other=0)
                output = tl.dot(tile_w, tile_v.to(OPERAND), output, input_precision=PRECISION)
            if VALUE_OUTLIERS:
                if here > 0:
                    value_edges = value_ends + stream * blocks + token0 // 64
                    value_begin = list_begin(value_starts, value_ends, stream, token0 // 64, blocks)
                    for entry0 in range(value_begin, tl.load(value_edges + here - 1), ENTRIES):
                        entry = entry0 + tl.arange(0, ENTRIES)
                        ok = entry < tl.load(value_edges + here - 1)
                        token, lane, delta = outlier_deltas(
                            value_index,
                            value_value,
                            entry,
                            ok,
                            value_edges,
                            here,
                            value_ranges,
                            value_levels,
                            value_floor + channel0,
                            token0,
                            BLOCKS,
                            D,
                            VALUE_DYNAMIC,
                        )
                        share_at = weights + token[:, None] * ROWS + row[None, :]
                        share = tl.load(share_at, mask=ok[:, None], other=0).to(tl.float32)
                        add_at = extra + lane[:, None] * ROWS + row[None, :]
                        tl.atomic_add(add_at, share * delta[:, None], mask=ok[:, None], sem="relaxed")
                tl.debug_barrier()
                output += tl.load(extra_at, mask=extra_ok, other=0, cache_modifier=".cg") * LOWER
                tl.debug_barrier()
                tl.store(extra_at, tl.zeros([MMA_ROWS, CHANNELS], tl.float32), mask=extra_ok)
            tl.debug_barrier()

        # what `combine` needs
        if VALUE_DYNAMIC:
            tl.store(rescale + row, offset)
            tl.debug_barrier()
            output = output / LOWER + tl.load(rescale + mma_row, mask=mma_row < ROWS, other=0)[:, None]
            tl.debug_barrier()
        result = ((part + split).to(tl.int64) * (works // splits) + rest) * ROWS
        tl.store(maxima + result + row, highest)
        tl.store(sums + result + row, total)
        output_at = outputs + (result + mma_row)[:, None] * D + channel[None, :]
        tl.store(output_at, output, mask=(mma_row < ROWS)[:, None] & channel_ok[None, :])


@triton.jit(do_not_specialize=["new", "parts", "tiles", "batch"])
def combine_kernel(
    outputs,  # [parts, B, G, tiles, ROWS, D] fp32
    maxima,  # [parts, B, G, tiles, ROWS] fp32
    sums,
    result,  # [B, S, H, D] any float
    new,
    parts,
    tiles,
    batch,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,  # put together at once
):
    """One query of one head: the parts' outputs weighted by e^(their maximum - the maximum of all)."""
    GROUP: tl.constexpr = H // G
    head, rest = tl.program_id(0) % H, tl.program_id(0) // H
    token, b = rest % new, rest // new
    number = token * GROUP + head % GROUP
    row = ((b * G + head // GROUP) * tiles).to(tl.int64) * ROWS + number  # tiles are ROWS rows each
    per_part = (batch * G * tiles).to(tl.int64) * ROWS
    channel = tl.arange(0, CHANNELS)
    highest, total = float("-inf"), 0.0
    output = tl.zeros([CHANNELS], tl.float32)
    for part0 in range(0, parts, PARTS):
        part = part0 + tl.arange(0, PARTS)
        ok = part < parts
        at = row + part * per_part
        maximum = tl.load(maxima + at, mask=ok, other=float("-inf"))
        ok = ok & (maximum > float("-inf"))
        share = tl.load(sums + at, mask=ok, other=0)
        values = tl.load(
            outputs + at[:, None] * D + channel[None, :], mask=ok[:, None] & (channel < D)[None, :], other=0
        )
        raised = tl.maximum(highest, tl.max(maximum, 0))
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        shrink, factor = tl.exp2(highest - reference), tl.exp2(maximum - reference)
        output = output * shrink + tl.sum(values * factor[:, None], 0)
        total = total * shrink + tl.sum(share * factor, 0)
        highest = raised
    output = output / tl.where(total == 0, 1.0, total)
    to = result + ((b * new + token).to(tl.int64) * H + head) * D + channel
    tl.store(to, output.to(result.dtype.element_ty), mask=channel < D)
