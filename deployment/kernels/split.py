"""The attention kernel: a few queries over one part of one segment of the context, for one sequence and KV head.

A program works through chunks of the context, several blocks of 64 tokens each, in phases:

    1  scores of the dequantized keys (scores.py)        outliers add what they exceed     -> scores
    2  softmax of the chunk (softmax.py)                                                   -> weights
    3  values of the dequantized tokens (values.py)      outliers add up on their own      -> output, extra

What passes from phase to phase goes through scratch memory of the program that stays in cache. Phases, instead of one loop,
because the softmax is then computed for real queries only, not for the padding of a tensor core's 16 rows, and because a
list of outliers is one flat loop. `combine` puts the parts together.
"""

import triton
import triton.language as tl

from deployment.kernels.ahead import ask_for_list
from deployment.kernels.keys import cos_and_sin, turn_tables, turned_ones
from deployment.kernels.lookup import SHARED, prepared
from deployment.kernels.operands import GLOBAL_OPERAND, PLAIN, SHARED_OPERAND, column_of
from deployment.kernels.outliers import add_outliers, add_outputs, add_scores, list_begin, loaded, zero_code
from deployment.kernels.pairs import fill, own_entries, table_memory
from deployment.kernels.phase import first_of_pair, second_of_pair, steps_of
from deployment.kernels.queries import positions_of, rotate_back, rotated_queries
from deployment.kernels.ring import ring_bytes, send_first
from deployment.kernels.scores import score_chunk
from deployment.kernels.shared import shared_memory
from deployment.kernels.softmax import seen_tokens, weigh_chunk
from deployment.kernels.tiles import DENSE, FRAGMENT_ORDER
from deployment.kernels.values import attend_chunk

LIFT = tl.constexpr(15.0)  # see `split_kernel`
_MOST_ASKED = tl.constexpr(8192)  # outliers of a chunk that are asked for ahead

# numbers that change from call to call must not make the compiler specialise
_RUNTIME = [
    "query_stride_b",
    "query_stride_h",
    "query_stride_s",
    "shift",
    "new",
    "segment_tokens",
    "blocks",
    "part0",
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
    steps,  # [D/2, 2] int32, see `Rotary`
    factor,  # [D/2] fp32
    turn,  # [2, D/2, 64] fp32
    scaling,  # of the scores, times log2 e
    new,  # S
    segment_tokens,
    key_words,  # [B, blocks, W] int32
    key_scales,  # [B, blocks * 64, 2] fp16
    key_levels_at,
    key_bytes,  # see `Tables`
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
    value_levels_at,
    value_bytes,  # see `Tables`
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
    own,  # [programs, 2, ROWS, 2, PAIRS] fp32: the queries; and once more, `[PAIRS, ROWS, 2]`
    rotated,  # [programs, spans, 2, 16 x PAIRS] operand dtype
    scores,  # [programs, ROWS, CHUNK] fp32
    weights,  # [programs, CHUNK, ROWS] operand dtype
    scaled,  # [programs, 2 ROWS CHUNK] operand dtype, of an operand; unused if QUICK
    extra,  # [programs, CHANNELS, ROWS] fp32
    parked,  # [programs, ROWS, CHANNELS] fp32: the output, while registers serve other phases
    rescale,  # [programs, ROWS] fp32
    outputs,  # [parts, B, G, tiles, ROWS, D] fp32, not divided by the sums
    maxima,  # [parts, B, G, tiles, ROWS] fp32
    sums,  # [parts, B, G, tiles, ROWS] fp32
    part0,  # first part of this segment
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
    TURN: tl.constexpr,
    QUICK: tl.constexpr,
    KEY_STAGES: tl.constexpr,
    VALUE_STAGES: tl.constexpr,
):
    """Parts of the outputs, with the maxima and sums of their softmax; see the top of this file."""
    GROUP: tl.constexpr = H // G
    BLOCKS: tl.constexpr = CHUNK // 64
    OPERAND: tl.constexpr = tl.float32 if PRECISE else tl.float16
    PRECISION: tl.constexpr = "ieee" if PRECISE else None
    # weights of 1 become 2^15 in fp16, so that those of 2^-29 are still normal numbers; sums see the same factor
    LIFTED: tl.constexpr = 0.0 if PRECISE else LIFT
    # times a token's scale they must not overflow either
    LOWER: tl.constexpr = 0.00390625 if VALUE_DYNAMIC and not PRECISE else 1.0

    row, mma_row = tl.arange(0, ROWS), tl.arange(0, 16)
    natural, channel = tl.arange(0, PAIRS), tl.arange(0, CHANNELS)
    natural_ok, channel_ok = natural < D // 2, channel < D
    high, low = steps_of(steps, natural, natural_ok)
    factors = tl.load(factor + natural, mask=natural_ok, other=0)
    # pairs in the order of a tile's rows
    KEY_ORDERED: tl.constexpr = KEY_SOURCE == FRAGMENT_ORDER
    pair = natural
    if KEY_ORDERED:
        pair = column_of(natural, PAIRS)
    pair_ok = pair < D // 2
    first, second = first_of_pair(pair, ROTARY_HALF, D // 2), second_of_pair(pair, ROTARY_HALF, D // 2)
    channels = (first, second, pair_ok)
    # stretches of a chunk, and of an operand of 16 rows
    COUNT: tl.constexpr = CHUNK // TURN
    STRETCHES: tl.constexpr = min(16 // ROWS, COUNT)
    KEY_KIND: tl.constexpr = GLOBAL_OPERAND if QUICK and PAIRS >= 32 else PLAIN
    VALUE_KIND: tl.constexpr = SHARED_OPERAND if QUICK else PLAIN
    key_table = (0,)
    value_table = (0,)
    table_at = 0
    # keys and values take turns with one table, or it is filled once for those that need it
    TURNS: tl.constexpr = KEY_FAST == SHARED and VALUE_FAST == SHARED
    if KEY_FAST == SHARED or VALUE_FAST == SHARED:
        table_at = table_memory()
        if not TURNS:
            fill(table_at, key_bytes if KEY_FAST == SHARED else value_bytes)
    if KEY_FAST == SHARED:
        key_table = (own_entries(table_at, KEY_BITS),)
    elif KEY_SOURCE == FRAGMENT_ORDER:
        key_table = prepared(key_levels_at, KEY_BITS, KEY_FAST)
    if VALUE_FAST == SHARED:
        value_table = (own_entries(table_at, VALUE_BITS),)
    elif VALUE_SOURCE == FRAGMENT_ORDER:
        value_table = prepared(value_levels_at, VALUE_BITS, VALUE_FAST)

    ring = 0
    if KEY_STAGES + VALUE_STAGES > 0:
        KEY_RING: tl.constexpr = ring_bytes(KEY_BITS, KEY_GEOMETRY, KEY_STAGES)
        VALUE_RING: tl.constexpr = ring_bytes(VALUE_BITS, VALUE_GEOMETRY, VALUE_STAGES)
        ring = shared_memory(max(KEY_RING, VALUE_RING))

    program = tl.program_id(0).to(tl.int64)
    own += program * (2 * ROWS * 2 * PAIRS)
    by_pair = own + ROWS * 2 * PAIRS
    rotated += program * (max(16, CHUNK // 32 * ROWS) * 2 * PAIRS)
    scores += program * (CHUNK * ROWS)
    weights += program * (CHUNK * ROWS)
    scaled += program * (CHUNK * 2 * ROWS)
    extra += program * (CHANNELS * ROWS)
    parked += program * (CHANNELS * ROWS)
    rescale += program * ROWS
    weighing = scaled
    if QUICK:
        weighing = shared_memory(CHUNK * 4 * min(ROWS, 8))
    for work in range(tl.program_id(0), works, tl.num_programs(0)):
        split, rest = work % splits, work // splits
        tile, stream = rest % tiles, (rest // tiles).to(tl.int64)
        b, g = stream // G, (stream % G).to(tl.int32)
        origin = tl.load(origins + b) + shift
        held = segment_tokens
        if LIMITED:
            held = tl.minimum(tl.maximum(tl.load(limits + b) - origin, 0), segment_tokens).to(tl.int32)
        # a part is whole pairs of blocks, so that parts are alike, however long a chunk is
        stored = (held + 63) // 64
        per_split = (stored + 2 * splits - 1) // (2 * splits) * 2
        first_block = tl.minimum(split * per_split, stored)
        last_block = tl.minimum(first_block + per_split, stored)
        held = tl.minimum(held, last_block * 64)

        strides = (query_stride_b, query_stride_h, query_stride_s)
        halves = (
            first_of_pair(natural, ROTARY_HALF, D // 2),
            second_of_pair(natural, ROTARY_HALF, D // 2),
            natural_ok,
        )
        query_a, query_b = rotated_queries(
            query,
            strides,
            positions,
            (high, low, factors),
            halves,
            b,
            g,
            tile * ROWS + row,
            new,
            scaling,
            GROUP,
            QUICK,
        )
        own_at = own + row[:, None] * (2 * PAIRS) + natural[None, :]
        tl.store(own_at, query_a)
        tl.store(own_at + PAIRS, query_b)
        by_pair_at = by_pair + natural[None, :] * (2 * ROWS) + row[:, None] * 2
        tl.store(by_pair_at, query_a)
        tl.store(by_pair_at + 1, query_b)
        tl.debug_barrier()
        position = positions_of(positions, b, tile * ROWS + row, new, GROUP)

        # the head's part of everything
        channel0 = g * D
        key_head, value_head = key_words + b * blocks * key_block_words, value_words + b * blocks * value_block_words
        if KEY_SOURCE == FRAGMENT_ORDER:
            key_head += g * (D * 2 * KEY_BITS)
        if VALUE_SOURCE == FRAGMENT_ORDER:
            value_head += g * (D * 2 * VALUE_BITS)
        key_ranges, value_ranges = key_scales + b * blocks * 128, value_scales + b * blocks * 128
        key_plain = key_dense + b * dense_stride_b + g.to(tl.int64) * dense_stride_g
        value_plain = value_dense + b * dense_stride_b + g.to(tl.int64) * dense_stride_g
        key_widths = (key_width + channel0, key_offset + channel0, key_first_level + channel0)
        value_widths = (value_width + channel0, value_offset + channel0, value_first_level + channel0)
        keys = (key_head, key_block_words, key_levels_at, key_widths, key_plain, dense_stride_t)
        values = (value_head, value_block_words, value_levels_at, value_widths, value_plain, dense_stride_t)

        # what scales and rotates keys; it stays in registers
        cos, sin = cos_and_sin(turn, pair, pair_ok, TURN, D)
        scale_a, scale_b = tl.full([PAIRS], 1.0, tl.float32), tl.full([PAIRS], 1.0, tl.float32)
        zero_a, zero_b = tl.zeros([PAIRS], tl.float32), tl.zeros([PAIRS], tl.float32)
        if KEY_SOURCE != DENSE and not KEY_DYNAMIC:
            scale_a = tl.load(key_scale + channel0 + first, mask=pair_ok, other=0)
            scale_b = tl.load(key_scale + channel0 + second, mask=pair_ok, other=0)
            zero_a = tl.load(key_zero + channel0 + first, mask=pair_ok, other=0)
            zero_b = tl.load(key_zero + channel0 + second, mask=pair_ok, other=0)
        tables = turn_tables(cos, sin, (scale_a, scale_b), (zero_a, zero_b), KEY_FAST)
        fixed = (key_table, tables, turned_ones(cos, sin, OPERAND))

        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        offset = tl.zeros([ROWS], tl.float32)
        parked_at = parked + (mma_row % ROWS)[:, None] * CHANNELS + channel[None, :]
        parked_ok = tl.broadcast_to((mma_row < ROWS)[:, None], [16, CHANNELS])
        output_ok = channel_ok[None, :] & parked_ok
        tl.store(parked_at, tl.zeros([16, CHANNELS], tl.float32), mask=parked_ok)
        key_entry, key_end, value_entry, value_end = 0, 0, 0, 0
        first_end = stream * blocks + tl.minimum(first_block + BLOCKS, last_block) - 1
        key_coded = zero_code(key_ranges, key_levels_at, key_floor, channel0, KEY_DYNAMIC)
        value_coded = zero_code(value_ranges, value_levels_at, value_floor, channel0, VALUE_DYNAMIC)
        if KEY_OUTLIERS:
            key_entry = list_begin(key_starts, key_ends, stream, first_block, blocks)
            key_end = tl.load(key_ends + first_end, mask=first_block < last_block, other=0)
        if VALUE_OUTLIERS:
            value_entry = list_begin(value_starts, value_ends, stream, first_block, blocks)
            value_end = tl.load(value_ends + first_end, mask=first_block < last_block, other=0)
            tl.store(extra + tl.arange(0, ROWS * CHANNELS), tl.zeros([ROWS * CHANNELS], tl.float32))
        if KEY_STAGES > 0:
            send_first(ring, key_head, key_block_words, first_block, last_block, KEY_BITS, KEY_GEOMETRY, KEY_STAGES)
        for number in range(first_block, last_block, BLOCKS):
            token0 = number * 64
            block0 = tl.cast(number, tl.int64)
            here = tl.minimum(BLOCKS, last_block - number)
            # where the next chunk's lists end: loaded a chunk before it is used
            later_edge = stream * blocks + tl.minimum(number + 2 * BLOCKS, last_block) - 1
            if KEY_OUTLIERS:
                key_later = tl.load(key_ends + later_edge)
            if VALUE_OUTLIERS:
                value_later = tl.load(value_ends + later_edge)
            if QUICK:
                if KEY_OUTLIERS:
                    ask_for_list(key_index, key_value, key_entry, key_end, _MOST_ASKED)
                if VALUE_OUTLIERS:
                    ask_for_list(value_index, value_value, value_entry, value_end, _MOST_ASKED)

            # 1: scores
            if TURNS:
                fill(table_at, key_bytes)
            rotate_back(
                rotated,
                own,
                (high, low, origin + token0),
                ROWS,
                TURN,
                STRETCHES,
                COUNT,
                PAIRS,
                KEY_ORDERED,
                QUICK,
            )
            key_first, key_next = (0, 0), (0, 0)
            if KEY_OUTLIERS:
                key_first = loaded(key_index, key_value, key_entry, key_end, ENTRIES)
                key_next = loaded(key_index, key_value, key_entry + ENTRIES, key_end, ENTRIES)
            tl.debug_barrier()
            score_chunk(
                scores,
                ring,
                rotated,
                keys,
                key_ranges,
                fixed,
                channels,
                token0,
                here,
                held,
                ROWS,
                CHUNK,
                TURN,
                STRETCHES,
                PAIRS,
                KEY_SOURCE,
                KEY_BITS,
                KEY_GEOMETRY,
                KEY_DYNAMIC,
                KEY_FAST,
                QUICK,
                KEY_STAGES,
                KEY_STAGES >= BLOCKS,
                KEY_KIND,
                OPERAND,
                PRECISION,
            )
            tl.debug_barrier()
            # loaded long before they are used
            ranges = 0
            if VALUE_DYNAMIC:
                token = token0 + tl.arange(0, CHUNK)
                ranges = tl.load(value_ranges.to(tl.pointer_type(tl.int32)) + token, mask=token < held, other=0)
            if KEY_OUTLIERS:
                entries = (key_index, key_value, key_entry, key_end)
                add_outliers(
                    add_scores,
                    (scores, by_pair, steps, origin + token0, ROWS, CHUNK, D, ROTARY_HALF, QUICK),
                    entries,
                    (key_first[0], key_first[1], key_next[0], key_next[1]),
                    key_coded,
                    token0,
                    CHUNK,
                    D,
                    KEY_DYNAMIC,
                    ENTRIES,
                )
                key_entry, key_end = key_end, key_later
                tl.debug_barrier()

            if TURNS:
                fill(table_at, value_bytes)
            # 2: softmax; meanwhile the next keys are asked for, and the first values loaded
            if VALUE_STAGES > 0:
                end_here = block0 + here
                send_first(
                    ring, value_head, value_block_words, block0, end_here, VALUE_BITS, VALUE_GEOMETRY, VALUE_STAGES
                )
            highest, total, offset, shrink = weigh_chunk(
                scores,
                weights,
                weighing,
                ranges,
                seen_tokens(position, origin, token0, held, ROWS, CHUNK),
                (highest, total, offset),
                ROWS,
                CHUNK,
                VALUE_DYNAMIC,
                VALUE_OUTLIERS,
                VALUE_SOURCE == FRAGMENT_ORDER,
                VALUE_KIND,
                LIFTED,
                LOWER,
            )
            tl.store(rescale + row, shrink)
            if VALUE_OUTLIERS:  # noqa: SIM102  (a constant condition of its own is decided by the compiler)
                if tl.min(shrink, 0) < 1:
                    extra_at = extra + channel[None, :] * ROWS + row[:, None]
                    gained = tl.load(extra_at, cache_modifier=".cg")
                    tl.debug_barrier()  # several lanes may have the same sum
                    tl.store(extra_at, gained * shrink[:, None])
            tl.debug_barrier()

            # 3: values
            value_first, value_next = (0, 0), (0, 0)
            if VALUE_OUTLIERS:
                value_first = loaded(value_index, value_value, value_entry, value_end, ENTRIES)
                value_next = loaded(value_index, value_value, value_entry + ENTRIES, value_end, ENTRIES)
            output = attend_chunk(
                tl.load(parked_at) * tl.load(rescale + mma_row % ROWS)[:, None],
                weighing,
                ring,
                values,
                value_table,
                token0,
                here,
                held,
                ROWS,
                D,
                CHANNELS,
                VALUE_SOURCE,
                VALUE_BITS,
                VALUE_GEOMETRY,
                VALUE_FAST,
                VALUE_STAGES,
                VALUE_STAGES >= BLOCKS,
                VALUE_KIND,
                OPERAND,
                PRECISION,
            )
            tl.store(parked_at, output, mask=parked_ok)
            if KEY_STAGES > 0:
                if KEY_BITS != VALUE_BITS:
                    tl.debug_barrier()  # then a lane's copies come to lie where another's words were
                send_first(
                    ring, key_head, key_block_words, block0 + BLOCKS, last_block, KEY_BITS, KEY_GEOMETRY, KEY_STAGES
                )
            if VALUE_OUTLIERS:
                entries = (value_index, value_value, value_entry, value_end)
                add_outliers(
                    add_outputs,
                    (extra, weights, ROWS),
                    entries,
                    (value_first[0], value_first[1], value_next[0], value_next[1]),
                    value_coded,
                    token0,
                    CHUNK,
                    D,
                    VALUE_DYNAMIC,
                    ENTRIES,
                )
                value_entry, value_end = value_end, value_later
            tl.debug_barrier()

        # what `combine` needs
        output = tl.load(parked_at)
        if VALUE_SOURCE != DENSE:
            if VALUE_DYNAMIC:
                tl.store(rescale + row, offset)
                scale, zero = 1 / LOWER, 1.0
            else:
                tl.store(rescale + row, total)
                scale = tl.load(value_scale + channel0 + channel, mask=channel_ok, other=0)[None, :]
                zero = tl.load(value_zero + channel0 + channel, mask=channel_ok, other=0)[None, :]
            tl.debug_barrier()
            output = output * scale + tl.load(rescale + mma_row % ROWS)[:, None] * zero
            if VALUE_OUTLIERS:
                extra_at = extra + channel[None, :] * ROWS + (mma_row % ROWS)[:, None]
                output += tl.load(extra_at, cache_modifier=".cg")
            tl.debug_barrier()
        result = ((part0 + split).to(tl.int64) * (works // splits) + rest) * ROWS
        tl.store(maxima + result + row, highest)
        tl.store(sums + result + row, total)
        output_at = outputs + (result + mma_row % ROWS)[:, None] * D + channel[None, :]
        tl.store(output_at, output, mask=output_ok)
