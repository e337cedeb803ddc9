"""Scores of a chunk: its keys, block after block, times the queries, into scratch memory.

Of a product of 16 rows, which hold the queries rotated back to several stretches (queries.py), only the rows of a token's own stretch
are kept.
"""

import triton
import triton.language as tl

from deployment.kernels.keys import both_parts, key_levels, turned_block
from deployment.kernels.operands import operand
from deployment.kernels.outliers import token_ranges
from deployment.kernels.ring import send, words_of

_KEEP = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p,$6,0; @p st.global.v2.f32 [$2],{$4,$5}; mov.b32 $0,0; mov.b32 $1,0; }"
)


@triton.jit
def score_chunk(
    scores,  # [ROWS, CHUNK] fp32
    ring,  # where the chunk's first STAGES blocks have been sent to
    rotated,  # [spans, 2, 16 x PAIRS]: operands, see `rotate_back`
    source,  # words, their stride from block to block, levels, widths, plain tensor, its stride; of the head
    ranges,  # [tokens, 2] fp16, where they are dynamic
    fixed,  # what does not change: `prepared`, `turn_tables`, `turned_ones`
    channels,  # two [PAIRS], the halves of the pairs, and which of them exist
    token0,  # the chunk's first
    here,  # blocks of the chunk
    held,  # tokens of the segment
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    TURN: tl.constexpr,
    STRETCHES: tl.constexpr,
    PAIRS: tl.constexpr,
    SOURCE: tl.constexpr,
    BITS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    DYNAMIC: tl.constexpr,
    FAST: tl.constexpr,
    QUICK: tl.constexpr,
    STAGES: tl.constexpr,  # of the ring; 0: words are read from where they are
    WHOLE: tl.constexpr,  # all blocks of a chunk have been sent
    KIND: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of all stored tokens of a chunk, but for what outliers add."""
    PARTS: tl.constexpr = 64 // TURN  # stretches of a block
    SPAN_BLOCKS: tl.constexpr = STRETCHES * TURN // 64
    mma_row = tl.arange(0, 16)
    query, stretch = mma_row % ROWS, mma_row // ROWS
    block_token = tl.arange(0, 64)
    words, stride, levels, widths, plain, plain_stride = source
    table, tables, ones = fixed

    block_at = words + (token0 // 64).to(tl.int64) * stride
    AT_ONCE: tl.constexpr = min(2, SPAN_BLOCKS)
    for span in range((here + SPAN_BLOCKS - 1) // SPAN_BLOCKS):
        back_a = operand(rotated + span * (32 * PAIRS), PAIRS, 16, KIND)
        back_b = operand(rotated + span * (32 * PAIRS) + 16 * PAIRS, PAIRS, 16, KIND)
        on_zeros = tl.zeros([16, TURN], tl.float32)
        if DYNAMIC:
            on_zeros = tl.dot(back_a, ones[0], input_precision=PRECISION)
            on_zeros = tl.dot(back_b, ones[1], on_zeros, input_precision=PRECISION)
        # of an odd number of blocks the last is scored again, for tokens that do not exist
        for pair in range(span * SPAN_BLOCKS, tl.minimum((span + 1) * SPAN_BLOCKS, here), AT_ONCE):
            for second in tl.static_range(AT_ONCE):
                j = pair + second
                last = tl.minimum(j, here - 1)
                at = block_at + last * stride
                holds = words_of(ring, last, words, at, SOURCE, BITS, GEOMETRY, STAGES, WHOLE)
                level_a, level_b = key_levels(
                    at,
                    holds,
                    table,
                    levels,
                    widths,
                    plain,
                    plain_stride,
                    token0 + j * 64,
                    held,
                    channels[0],
                    channels[1],
                    channels[2],
                    GEOMETRY,
                    SOURCE,
                    BITS,
                    PAIRS,
                    FAST,
                )
                if STAGES > 0 and not WHOLE:
                    later = j + STAGES
                    send(ring, later, block_at + later * stride, later < here, BITS, GEOMETRY, STAGES)
                key_a, key_b = turned_block(level_a, level_b, tables, PARTS, FAST, OPERAND)
                # two sums, since products that wait for each other take longer than all else
                dot = tl.dot(back_a, key_a, input_precision=PRECISION)
                on_b = tl.dot(back_b, key_b, input_precision=PRECISION)
                dot = plus(dot, on_b, QUICK)
                token = j * 64 + block_token
                if DYNAMIC:
                    scale, zero = token_ranges(ranges, token0 + token, token0 + token < held)
                    dot = dot * scale[None, :] + both_parts(on_zeros, on_zeros, PARTS) * zero[None, :]
                first_stretch = opaque(j - span * SPAN_BLOCKS, QUICK) * PARTS
                own = stretch[:, None] == (first_stretch + block_token // TURN)[None, :]
                keep(scores + (query * CHUNK)[:, None] + token[None, :], dot, own, QUICK)


@triton.jit
def plus(x, y, QUICK: tl.constexpr):
    """`x + y`; a compiler that saw the sum of two products would make one the other's start."""
    if QUICK:
        total = tl.inline_asm_elementwise("add.f32 $0,$1,$2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1)
    else:
        total = x + y
    return total


@triton.jit
def opaque(number, QUICK: tl.constexpr):
    """The same; a compiler that saw where a loop's number comes from would compare 64-bit addresses in its place."""
    if QUICK:
        number = tl.inline_asm_elementwise("mov.b32 $0,$1;", "=r,r", [number], tl.int32, is_pure=True, pack=1)
    return number


@triton.jit
def keep(at, x, mask, QUICK: tl.constexpr):
    """Store `x` `[rows, n]` fp32 of neighbours along n; if QUICK, from where a tensor core left it, in pairs."""
    if QUICK:
        wanted = tl.broadcast_to(mask.to(tl.int32), x.shape)
        bits = x.to(tl.int32, bitcast=True)
        tl.inline_asm_elementwise(_KEEP, "=r,=r,l,l,r,r,r,r", [at, bits, wanted], tl.int32, is_pure=False, pack=2)
    else:
        tl.store(at, x, mask=mask)
