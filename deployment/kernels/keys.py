"""Keys: from codes to rotated tiles, the second operand of the scores.

A key is `level * scale + zero`, rotated by its token's place i within TURN tokens (the queries are rotated back to the first of
them, see phase.py). Of a pair of channels (a, b), with levels l and rotation (cos, sin) of i:

    a' = l_a (cos scale_a) - l_b (sin scale_b)    b' = l_b (cos scale_b) + l_a (sin scale_a)      + the same of the zeros

The four products of a scale and a rotation are the same for all blocks: `turn_tables` multiplies them once, and what is
left to do per element is two multiply-adds. The zeros' part of the scores is one more product of the queries and a fixed
tile, `turned_zeros`; it is what sums begin with.
"""

import triton
import triton.language as tl

from deployment.kernels.lookup import paired, unpaired
from deployment.kernels.tiles import DENSE, FRAGMENT_ORDER, arrange, channel_levels, units

_TURN = tl.constexpr(
    "{ .reg .b32 s,t; mul.rn.f16x2 s,$3,$5; mul.rn.f16x2 t,$2,$7; fma.rn.f16x2 $0,$2,$4,s; fma.rn.f16x2 $1,$3,$6,t; }"
)
_TWO_WORDS = tl.constexpr((tl.int32,) * 2)


@triton.jit
def cos_and_sin(turn, pair, pair_ok, TURN: tl.constexpr, D: tl.constexpr):
    """(cos, sin) `[PAIRS, TURN]` fp32 of the first TURN tokens of a block."""
    at = turn + pair[:, None] * 64 + tl.arange(0, TURN)[None, :]
    return tl.load(at, mask=pair_ok[:, None], other=0), tl.load(at + D * 32, mask=pair_ok[:, None], other=0)


@triton.jit
def turn_tables(cos, sin, scale_a, scale_b, FAST: tl.constexpr):
    """(cos s_a, -sin s_b, cos s_b, sin s_a) `[PAIRS, TURN]` of scales `[PAIRS]`; fp32, or pairs of fp16 if FAST."""
    a, b = scale_a[:, None], scale_b[:, None]
    if FAST:
        tables = (
            paired((cos * a).to(tl.float16)),
            paired((-sin * b).to(tl.float16)),
            paired((cos * b).to(tl.float16)),
            paired((sin * a).to(tl.float16)),
        )
    else:
        tables = (cos * a, -sin * b, cos * b, sin * a)
    return tables


@triton.jit
def turned_zeros(cos, sin, zero_a, zero_b, OPERAND: tl.constexpr):
    """Zeros `[PAIRS]` of both halves, rotated by every token of TURN: two `[PAIRS, TURN]`."""
    a, b = zero_a[:, None], zero_b[:, None]
    return (a * cos - b * sin).to(OPERAND), (b * cos + a * sin).to(OPERAND)


@triton.jit
def turned(level_a, level_b, tables, FAST: tl.constexpr, OPERAND: tl.constexpr):
    """Operands of levels `[PAIRS, TURN]`, or of pairs `[PAIRS / 2, TURN]` of them: scaled and rotated."""
    if FAST:
        a, b = tl.inline_asm_elementwise(
            _TURN,
            "=&r,=&r,r,r,r,r,r,r",
            [level_a, level_b, tables[0], tables[1], tables[2], tables[3]],
            dtype=_TWO_WORDS.value,
            is_pure=True,
            pack=1,
        )
        a, b = unpaired(a), unpaired(b)
    else:
        a = (level_a * tables[0] + level_b * tables[1]).to(OPERAND)
        b = (level_b * tables[2] + level_a * tables[3]).to(OPERAND)
    return a, b


@triton.jit
def key_levels(
    words,  # of the block, in channel order
    held,  # `block_words` of the block and head, in fragment order
    table,  # `prepared`
    levels,
    widths,  # width, offset, first_level at the head's first channel
    dense,  # [tokens, D] of the head
    dense_stride,
    token0,
    tokens,
    first,
    second,
    pair_ok,
    GEOMETRY: tl.constexpr,
    SOURCE: tl.constexpr,
    BITS: tl.constexpr,  # of fragments; the planes of channels
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Levels `[PAIRS, 64]` fp32 of a block's channels `first` and `second`; pairs `[PAIRS / 2, 64]` if FAST."""
    if SOURCE == DENSE:
        token = token0 + tl.arange(0, 64)
        at = dense + token[None, :] * dense_stride
        mask = pair_ok[:, None] & (token < tokens)[None, :]
        a = tl.load(at + first[:, None], mask=mask, other=0).to(tl.float32)
        b = tl.load(at + second[:, None], mask=mask, other=0).to(tl.float32)
    elif SOURCE == FRAGMENT_ORDER:
        a, b = tl.split(arrange(units(held[0], held[1], held[2], table, BITS, FAST), GEOMETRY, FAST, True))
    else:
        a = channel_levels(words, levels, widths[0], widths[1], widths[2], first, pair_ok, BITS, PAIRS)
        b = channel_levels(words, levels, widths[0], widths[1], widths[2], second, pair_ok, BITS, PAIRS)
    return a, b


@triton.jit
def part_of(x, PART: tl.constexpr, PARTS: tl.constexpr):
    """Tokens PART of PARTS (1 or 2) equal parts of `[K, 64]`, `[K, 64 / PARTS]`."""
    if PARTS == 1:
        part = x
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, 32]), (0, 2, 1)))
        if PART == 0:  # noqa: SIM108  (the device language evaluates both sides of a conditional expression)
            part = first
        else:
            part = second
    return part
