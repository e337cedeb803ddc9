"""The attention kernel: a few queries over one part of one segment of the context, for one sequence and KV head.

A program works through chunks of the context, several blocks of 64 tokens each, in phases:

    1  scores of the dequantized keys; outliers add what they exceed    -> scores
    2  softmax of the chunk, online over chunks                         -> weights
    3  values of the dequantized tokens; outliers add up on their own   -> output, extra

What passes from phase to phase goes through scratch memory of the program that stays in cache. Phases, instead of one loop,
because the softmax is then computed for real queries only, not for the padding of a tensor core's 16 rows, and because a
list of outliers is one flat loop. `combine` puts the parts together.

A tensor core multiplies 16 rows, and there are ROWS queries, often one. Instead of padding, the first operand of the scores holds
the queries rotated back to the first token of 16 / ROWS stretches of TURN tokens, so that it serves all of these; of each
product only the rows of its own stretch are kept. Words of the next block are loaded before those of the last are used.

Row r of a tile of queries is token r // (H/G) of the new ones and query head r % (H/G) of the KV head.
"""

import triton
import triton.language as tl

from deployment.kernels.ahead import ask_for_list, ask_for_words, stay
from deployment.kernels.keys import cos_and_sin, key_levels, part_of, turn_tables, turned, turned_zeros
from deployment.kernels.lookup import prepared
from deployment.kernels.outliers import add_to_output, add_to_scores, list_begin, loaded, token_ranges
from deployment.kernels.phase import cos_sin, cos_sin_of, first_of_pair, phase_of, second_of_pair
from deployment.kernels.tiles import DENSE, FRAGMENT_ORDER, block_words
from deployment.kernels.values import value_levels_tile

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


@triton.jit
def both_sums(a, b, c, d):
    """Of two pairs."""
    return a + c, b + d


_STORE = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p,$6,0; @p st.global.v2.f32 [$2],{$4,$5}; mov.b32 $0,0; mov.b32 $1,0; }"
)


@triton.jit
def keep(at, x, mask, QUICK: tl.constexpr):
    """Store `x` `[rows, n]` fp32 of neighbours along n, from the lanes where a tensor core left it if QUICK."""
    if QUICK:
        wanted = tl.broadcast_to(mask.to(tl.int32), x.shape)
        tl.inline_asm_elementwise(
            _STORE, "=r,=r,l,l,r,r,r,r", [at, x.to(tl.int32, bitcast=True), wanted], tl.int32, is_pure=False, pack=2
        )
    else:
        tl.store(at, x, mask=mask)


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
    key_levels_at,
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
    rotated,  # [programs, CHUNK / TURN, ROWS, 2, PAIRS] operand dtype
    scores,  # [programs, ROWS, CHUNK] fp32
    weights,  # [programs, ROWS, CHUNK] operand dtype
    scaled,  # [programs, ROWS, CHUNK] operand dtype
    extra,  # [programs, ROWS, D] fp32
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
):
    """Parts of the outputs, with the maxima and sums of their softmax; see the top of this file."""
    GROUP: tl.constexpr = H // G
    BLOCKS: tl.constexpr = CHUNK // 64
    OPERAND: tl.constexpr = tl.float32 if PRECISE else tl.float16
    PRECISION: tl.constexpr = "ieee" if PRECISE else None
    # weights of 1 become 2^15 in fp16, so that those of 2^-29 are still normal numbers; sums see the same factor
    LIFT: tl.constexpr = 0.0 if PRECISE else 15.0
    # times a token's scale they must not overflow either
    LOWER: tl.constexpr = 0.00390625 if VALUE_DYNAMIC and not PRECISE else 1.0
    # stretches of TURN tokens: of a block, and of an operand of 16 rows
    PARTS: tl.constexpr = 64 // TURN
    STRETCHES: tl.constexpr = min(16 // ROWS, CHUNK // TURN)
    SPAN_BLOCKS: tl.constexpr = STRETCHES * TURN // 64

    row, mma_row = tl.arange(0, ROWS), tl.arange(0, 16)
    mma_query, stretch = mma_row % ROWS, mma_row // ROWS
    pair, channel = tl.arange(0, PAIRS), tl.arange(0, CHANNELS)
    channel_ok = channel < D
    pair_ok = pair < D // 2
    first, second = first_of_pair(pair, ROTARY_HALF), second_of_pair(pair, ROTARY_HALF, D // 2)
    block_token, chunk_token, turn_token = tl.arange(0, 64), tl.arange(0, CHUNK), tl.arange(0, TURN)
    high_bits = tl.load(high + pair, mask=pair_ok, other=0)
    low_bits = tl.load(low + pair, mask=pair_ok, other=0)
    key_table = (0,)
    value_table = (0,)
    if KEY_SOURCE == FRAGMENT_ORDER:
        key_table = prepared(key_levels_at, KEY_BITS, KEY_FAST)
    if VALUE_SOURCE == FRAGMENT_ORDER:
        value_table = prepared(value_levels_at, VALUE_BITS, VALUE_FAST)

    program = tl.program_id(0).to(tl.int64)
    rotated += program * (CHUNK // TURN * ROWS * 2 * PAIRS)
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

        # the queries at their own positions, once per stretch
        number = tile * ROWS + mma_query
        position = tl.load(positions + b * new + number // GROUP, mask=number < new * GROUP, other=-1)
        head = g * GROUP + number % GROUP
        at = query + b * query_stride_b + head.to(tl.int64) * query_stride_h
        at += (number // GROUP).to(tl.int64) * query_stride_s
        query_ok = (number < new * GROUP)[:, None] & pair_ok[None, :]
        a = tl.load(at[:, None] + first[None, :], mask=query_ok, other=0).to(tl.float32) * scaling
        b_half = tl.load(at[:, None] + second[None, :], mask=query_ok, other=0).to(tl.float32) * scaling
        own_cos, own_sin = cos_sin(position[:, None], high_bits[None, :], low_bits[None, :], QUICK)
        query_a, query_b = a * own_cos - b_half * own_sin, b_half * own_cos + a * own_sin
        number = tile * ROWS + row
        position = tl.load(positions + b * new + number // GROUP, mask=number < new * GROUP, other=-1)

        stretch_phase = phase_of(tl.full([1], TURN, tl.int32), high_bits, low_bits)

        # pointers to the head's part of everything
        channel0 = g * D
        key_widths = (key_width + channel0, key_offset + channel0, key_first_level + channel0)
        value_widths = (value_width + channel0, value_offset + channel0, value_first_level + channel0)
        key_head, value_head = key_words + b * blocks * key_block_words, value_words + b * blocks * value_block_words
        if KEY_SOURCE == FRAGMENT_ORDER:
            key_head += g * (D * 2 * KEY_BITS)
        if VALUE_SOURCE == FRAGMENT_ORDER:
            value_head += g * (D * 2 * VALUE_BITS)
        key_ranges, value_ranges = key_scales + b * blocks * 128, value_scales + b * blocks * 128
        key_plain = key_dense + b * dense_stride_b + g.to(tl.int64) * dense_stride_g
        value_plain = value_dense + b * dense_stride_b + g.to(tl.int64) * dense_stride_g

        # what scales and rotates keys; it stays in registers
        STATIC: tl.constexpr = KEY_SOURCE != DENSE and not KEY_DYNAMIC
        cos, sin = cos_and_sin(turn, pair, pair_ok, TURN, D)
        scale_a, scale_b = tl.full([PAIRS], 1.0, tl.float32), tl.full([PAIRS], 1.0, tl.float32)
        zero_a, zero_b = scale_a, scale_b
        if STATIC:
            scale_a = tl.load(key_scale + channel0 + first, mask=pair_ok, other=0)
            scale_b = tl.load(key_scale + channel0 + second, mask=pair_ok, other=0)
            zero_a = tl.load(key_zero + channel0 + first, mask=pair_ok, other=0)
            zero_b = tl.load(key_zero + channel0 + second, mask=pair_ok, other=0)
        tables = turn_tables(cos, sin, scale_a, scale_b, KEY_FAST)
        still_a, still_b = turned_zeros(cos, sin, zero_a, zero_b, OPERAND)

        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        offset = tl.zeros([ROWS], tl.float32)
        output = tl.zeros([16, CHANNELS], tl.float32)
        extra_at = extra + mma_query[:, None] * D + channel[None, :]
        extra_ok = channel_ok[None, :] & (stretch == 0)[:, None]
        if VALUE_OUTLIERS:
            tl.store(extra_at, output, mask=extra_ok)

        last_chunk = tl.minimum((split + 1) * per_split, chunks)
        key_entry, key_end, value_entry, value_end = 0, 0, 0, 0
        if KEY_OUTLIERS:
            key_entry = list_begin(key_starts, key_ends, stream, split * per_split * BLOCKS, blocks)
        if VALUE_OUTLIERS:
            value_entry = list_begin(value_starts, value_ends, stream, split * per_split * BLOCKS, blocks)
        for chunk in range(split * per_split, last_chunk):
            token0 = chunk * CHUNK
            here = tl.minimum(BLOCKS, (held - token0 + 63) // 64)
            block0 = (token0 // 64).to(tl.int64)
            last_block = stream * blocks + block0 + here - 1
            if KEY_OUTLIERS:
                key_end = tl.load(key_ends + last_block)
            if VALUE_OUTLIERS:
                value_end = tl.load(value_ends + last_block)
            if QUICK:
                if VALUE_SOURCE == FRAGMENT_ORDER:
                    ask_for_words(
                        value_head, block0, block0 + here, value_block_words, BLOCKS, D * 2 * VALUE_BITS
                    )
                if KEY_OUTLIERS:
                    ask_for_list(key_index, key_entry, key_end, 8192)
                    ask_for_list(key_value, key_entry, key_end, 8192)
                if VALUE_OUTLIERS:
                    ask_for_list(value_index, value_entry, value_end, 8192)
                    ask_for_list(value_value, value_entry, value_end, 8192)

            # 1: scores
            key_place, key_exact = 0, 0
            if KEY_OUTLIERS:
                key_place, key_exact = loaded(key_index, key_value, key_entry, key_end, ENTRIES)
            k0, k1, k2 = 0, 0, 0
            key_at = key_head + block0 * key_block_words
            if KEY_SOURCE == FRAGMENT_ORDER:
                k0, k1, k2 = block_words(key_at, KEY_BITS, KEY_GEOMETRY)
            for span in range((here + SPAN_BLOCKS - 1) // SPAN_BLOCKS):
                first_phase = phase_of(origin + token0 + span * (STRETCHES * TURN), high_bits, low_bits)
                phase = first_phase[None, :] + stretch[:, None] * stretch_phase[None, :]
                cos_back, sin_back = cos_sin_of(phase, QUICK)
                back_a = (query_a * cos_back + query_b * sin_back).to(OPERAND)
                back_b = (query_b * cos_back - query_a * sin_back).to(OPERAND)
                if KEY_OUTLIERS:
                    back_at = rotated + (span * STRETCHES * ROWS + mma_row)[:, None] * (2 * PAIRS) + pair[None, :]
                    back_ok = (stretch < STRETCHES)[:, None]
                    tl.store(back_at, back_a, mask=back_ok)
                    tl.store(back_at + PAIRS, back_b, mask=back_ok)
                start = tl.zeros([16, TURN], tl.float32)
                if STATIC or KEY_DYNAMIC:
                    start = tl.dot(back_a, still_a, input_precision=PRECISION)
                    start = tl.dot(back_b, still_b, start, input_precision=PRECISION)
                for j in range(span * SPAN_BLOCKS, tl.minimum((span + 1) * SPAN_BLOCKS, here)):
                    block = block0 + j
                    key_held = (k0, k1, k2)
                    if KEY_SOURCE == FRAGMENT_ORDER:
                        key_at += tl.where(j + 1 < here, key_block_words, 0)
                        k0, k1, k2 = block_words(key_at, KEY_BITS, KEY_GEOMETRY)
                        stay(j, QUICK)
                    level_a, level_b = key_levels(
                        key_head + block * key_block_words,
                        key_held,
                        key_table,
                        key_levels_at,
                        key_widths,
                        key_plain,
                        dense_stride_t,
                        token0 + j * 64,
                        held,
                        first,
                        second,
                        pair_ok,
                        KEY_GEOMETRY,
                        KEY_SOURCE,
                        KEY_BITS,
                        PAIRS,
                        KEY_FAST,
                    )
                    for part in tl.static_range(PARTS):
                        part_a, part_b = part_of(level_a, part, PARTS), part_of(level_b, part, PARTS)
                        if j < here:
                            key_a, key_b = turned(part_a, part_b, tables, KEY_FAST, OPERAND)
                        else:
                            key_a, key_b = still_a, still_b
                        at_token = j * 64 + part * TURN + turn_token
                        if STATIC:
                            dot = tl.dot(back_a, key_a, start, input_precision=PRECISION)
                        else:
                            dot = tl.dot(back_a, key_a, input_precision=PRECISION)
                        dot = tl.dot(back_b, key_b, dot, input_precision=PRECISION)
                        if KEY_DYNAMIC:
                            s, z = token_ranges(key_ranges, token0 + at_token, token0 + at_token < held)
                            dot = dot * s[None, :] + start * z[None, :]
                        own = stretch == j * PARTS + part - span * STRETCHES
                        keep(scores + (mma_query * CHUNK)[:, None] + at_token[None, :], dot, own[:, None], QUICK)
            tl.debug_barrier()
            if KEY_OUTLIERS:
                key_edges = key_ends + stream * blocks + token0 // 64
                add_to_scores(
                    scores,
                    rotated,
                    turn,
                    (key_index, key_value, key_entry, key_end, key_edges),
                    key_place,
                    key_exact,
                    (key_ranges, key_levels_at, key_floor + channel0),
                    token0,
                    here,
                    ROWS,
                    CHUNK,
                    D,
                    PAIRS,
                    ROTARY_HALF,
                    TURN,
                    KEY_DYNAMIC,
                    ENTRIES,
                )
                key_entry = key_end
                tl.debug_barrier()

            if QUICK:
                if KEY_SOURCE == FRAGMENT_ORDER:
                    ask_for_words(
                        key_head,
                        block0 + BLOCKS,
                        tl.minimum(last_chunk * BLOCKS, (held + 63) // 64),
                        key_block_words,
                        BLOCKS,
                        D * 2 * KEY_BITS,
                    )
            # 2: softmax; whatever lies beyond the stored tokens or after the query is not seen
            v0, v1, v2 = 0, 0, 0
            value_at = value_head + block0 * value_block_words
            if VALUE_SOURCE == FRAGMENT_ORDER:
                v0, v1, v2 = block_words(value_at, VALUE_BITS, VALUE_GEOMETRY)
            before = tl.minimum(position - origin + 1, held) - token0  # the first token that is not seen
            seen = chunk_token[None, :] < tl.maximum(tl.minimum(before, CHUNK), 0).to(tl.int32)[:, None]
            padded = tl.minimum(tl.maximum(-(origin + token0), 0), CHUNK).to(tl.int32)
            seen = seen & (chunk_token >= padded)[None, :]
            to = row[:, None] * CHUNK + chunk_token[None, :]
            score = tl.load(scores + to, mask=seen, other=float("-inf"), cache_modifier=".cg")
            raised = tl.maximum(highest, tl.max(score, 1))
            reference = tl.where(raised == float("-inf"), 0.0, raised)
            weight = tl.exp2(score - reference[:, None] + LIFT)
            shrink = tl.exp2(highest - reference)
            highest = raised
            tl.store(weights + to, weight.to(OPERAND))
            if VALUE_DYNAMIC:  # level * scale + zero: scales go to the weights, zeros add up on their own
                token_ok = token0 + chunk_token < held
                scale, zero = token_ranges(value_ranges, token0 + chunk_token, token_ok)
                tl.store(scaled + to, (weight * (scale * LOWER)[None, :]).to(OPERAND))
                weight_sum, zero_sum = tl.reduce((weight, weight * zero[None, :]), 1, both_sums)
                total, offset = total * shrink + weight_sum, offset * shrink + zero_sum
            else:
                total = total * shrink + tl.sum(weight, 1)
            tl.store(rescale + row, shrink)
            if VALUE_OUTLIERS:
                if tl.min(shrink, 0) < 1:
                    shrink_at = extra + row[:, None] * D + channel[None, :]
                    shrink_ok = channel_ok[None, :] & (row >= 0)[:, None]
                    gained = tl.load(shrink_at, mask=shrink_ok, other=0, cache_modifier=".cg")
                    tl.store(shrink_at, gained * shrink[:, None], mask=shrink_ok)
            tl.debug_barrier()

            # 3: values
            value_place, value_exact = 0, 0
            if VALUE_OUTLIERS:
                value_place, value_exact = loaded(value_index, value_value, value_entry, value_end, ENTRIES)
            output *= tl.load(rescale + mma_query)[:, None]
            for j in range(here):
                value_held = (v0, v1, v2)
                if VALUE_SOURCE == FRAGMENT_ORDER:
                    value_at += tl.where(j + 1 < here, value_block_words, 0)
                    v0, v1, v2 = block_words(value_at, VALUE_BITS, VALUE_GEOMETRY)
                    stay(j, QUICK)
                if j < here:
                    tile_v = value_levels_tile(
                        value_head + (block0 + j) * value_block_words,
                        value_held,
                        value_table,
                        value_levels_at,
                        value_widths,
                        value_plain,
                        dense_stride_t,
                        token0 + j * 64,
                        held,
                        channel,
                        channel_ok,
                        VALUE_GEOMETRY,
                        VALUE_SOURCE,
                        VALUE_BITS,
                        CHANNELS,
                        VALUE_FAST,
                    )
                    tile_v = tile_v.to(OPERAND)
                else:
                    tile_v = tl.zeros([64, CHANNELS], OPERAND)
                weight_at = (scaled if VALUE_DYNAMIC else weights) + j * 64 + block_token
                tile_w = tl.load(weight_at[None, :] + (mma_query * CHUNK)[:, None])
                output = tl.dot(tile_w, tile_v, output, input_precision=PRECISION)
            if VALUE_OUTLIERS:
                value_edges = value_ends + stream * blocks + token0 // 64
                add_to_output(
                    extra,
                    weights,
                    (value_index, value_value, value_entry, value_end, value_edges),
                    value_place,
                    value_exact,
                    (value_ranges, value_levels_at, value_floor + channel0),
                    token0,
                    here,
                    ROWS,
                    CHUNK,
                    D,
                    VALUE_DYNAMIC,
                    ENTRIES,
                )
                value_entry = value_end
            tl.debug_barrier()

        # what `combine` needs
        if VALUE_SOURCE != DENSE:
            if VALUE_DYNAMIC:
                tl.store(rescale + row, offset)
                scale, zero = 1 / LOWER, 1.0
            else:
                tl.store(rescale + row, total)
                scale = tl.load(value_scale + channel0 + channel, mask=channel_ok, other=0)[None, :]
                zero = tl.load(value_zero + channel0 + channel, mask=channel_ok, other=0)[None, :]
            tl.debug_barrier()
            output = output * scale + tl.load(rescale + mma_query)[:, None] * zero
            if VALUE_OUTLIERS:
                output += tl.load(extra_at, mask=extra_ok, other=0, cache_modifier=".cg")
            tl.debug_barrier()
        result = ((part0 + split).to(tl.int64) * (works // splits) + rest) * ROWS
        tl.store(maxima + result + row, highest)
        tl.store(sums + result + row, total)
        output_at = outputs + (result + mma_query)[:, None] * D + channel[None, :]
        tl.store(output_at, output, mask=extra_ok)
