"""Keys: from codes to rotated tiles, the second operand of the scores.

A key is `level * scale + zero`, rotated by its token's place i within TURN tokens (the queries are rotated back to the first of
them, see phase.py). Of a pair of channels (a, b), with levels l, zeros z and rotation (cos, sin) of i:

    a' = l_a (cos scale_a) - l_b (sin scale_b) + (cos z_a - sin z_b)
    b' = l_b (cos scale_b) + l_a (sin scale_a) + (cos z_b + sin z_a)

The factors in parentheses are the same for all blocks: `turn_tables` makes them once, and what is left to do per element
is two multiply-adds. Where tokens have ranges of their own, keys are turned levels: a token's scale multiplies its score,
and its zero a product of the queries and a fixed tile, `turned_ones`.
"""

import triton
import triton.language as tl

from deployment.kernels.lookup import paired, unpaired
from deployment.kernels.tiles import DENSE, FRAGMENT_ORDER, arrange, channel_levels, units

_TURN = tl.constexpr(
    "{ .reg .b32 s,t; fma.rn.f16x2 s,$3,$5,$8; fma.rn.f16x2 t,$2,$7,$9; "
    "fma.rn.f16x2 $0,$2,$4,s; fma.rn.f16x2 $1,$3,$6,t; }"
)
_TWO_WORDS = tl.constexpr((tl.int32,) * 2)


@triton.jit
def cos_and_sin(turn, pair, pair_ok, TURN: tl.constexpr, D: tl.constexpr):
    """(cos, sin) `[PAIRS, TURN]` fp32 of the first TURN tokens of a block."""
    at = turn + pair[:, None] * 64 + tl.arange(0, TURN)[None, :]
    return tl.load(at, mask=pair_ok[:, None], other=0), tl.load(at + D * 32, mask=pair_ok[:, None], other=0)


@triton.jit
def turn_tables(cos, sin, scales, zeros, FAST: tl.constexpr):
    """The six factors above `[PAIRS, TURN]`, of scales and zeros `[PAIRS]` of both halves; fp32, or pairs of fp16 if FAST."""
    scale_a, scale_b, zero_a, zero_b = scales[0][:, None], scales[1][:, None], zeros[0][:, None], zeros[1][:, None]
    on_a, on_b = (cos * scale_a, -sin * scale_b), (sin * scale_a, cos * scale_b)
    plus_a, plus_b = cos * zero_a - sin * zero_b, sin * zero_a + cos * zero_b
    if FAST:
        tables = (
            paired(on_a[0].to(tl.float16)),
            paired(on_a[1].to(tl.float16)),
            paired(on_b[0].to(tl.float16)),
            paired(on_b[1].to(tl.float16)),
            paired(plus_a.to(tl.float16)),
            paired(plus_b.to(tl.float16)),
        )
    else:
        tables = (on_a[0], on_a[1], on_b[0], on_b[1], plus_a, plus_b)
    return tables


@triton.jit
def turned_ones(cos, sin, OPERAND: tl.constexpr):
    """Ones of both halves, rotated by every token of TURN: two `[PAIRS, TURN]`."""
    return (cos - sin).to(OPERAND), (cos + sin).to(OPERAND)


@triton.jit
def turned(level_a, level_b, tables, FAST: tl.constexpr, OPERAND: tl.constexpr):
    """Operands of levels `[PAIRS, TURN]`, or of pairs `[PAIRS / 2, TURN]` of them: scaled, rotated, and zeros added."""
    if FAST:
        a, b = tl.inline_asm_elementwise(
            _TURN,
            "=&r,=&r,r,r,r,r,r,r,r,r",
            [level_a, level_b, tables[0], tables[1], tables[3], tables[2], tables[4], tables[5]],
            dtype=_TWO_WORDS.value,
            is_pure=True,
            pack=1,
        )
        a, b = unpaired(a), unpaired(b)
    else:
        a = (level_a * tables[0] + level_b * tables[1] + tables[4]).to(OPERAND)
        b = (level_a * tables[2] + level_b * tables[3] + tables[5]).to(OPERAND)
    return a, b


@triton.jit
def turned_block(level_a, level_b, tables, PARTS: tl.constexpr, FAST: tl.constexpr, OPERAND: tl.constexpr):
    """`turned` of the levels of a block, each of its PARTS equal parts by the same tables: `[PAIRS, 64]` twice."""
    a, b = turned(part_of(level_a, 0, PARTS), part_of(level_b, 0, PARTS), tables, FAST, OPERAND)
    if PARTS == 2:
        c, d = turned(part_of(level_a, 1, PARTS), part_of(level_b, 1, PARTS), tables, FAST, OPERAND)
        a, b = both_parts(a, c, PARTS), both_parts(b, d, PARTS)
    return a, b


@triton.jit
def both_parts(first, second, PARTS: tl.constexpr):
    """The inverse of `part_of`: a tile of PARTS parts; the first if it is the only one."""
    tile = first
    if PARTS == 2:
        tile = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [first.shape[0], 64])
    return tile


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
