"""The queries of a tile, and which of the new ones they are.

Row r of a tile is token r // (H/G) of the new ones and query head r % (H/G) of the KV head.

Keys are rotated by their token's place within a *stretch* of TURN tokens only, so queries are rotated back to the first of
every stretch of a chunk. A tensor core multiplies 16 rows, and there are ROWS queries, often one: instead of padding, 16 rows hold
the queries of 16 / ROWS stretches, a *span*. `rotate_back` keeps them as operands, of first and of second halves.
"""

import triton
import triton.language as tl

from deployment.kernels.operands import column_of, place_in_operand, row_offset
from deployment.kernels.phase import cos_sin, cos_sin_of, phase_of


@triton.jit
def positions_of(positions, b, number, new, GROUP: tl.constexpr):
    """Positions int64 of queries `number` of sequence b; -1 for those that do not exist."""
    return tl.load(positions + b * new + number // GROUP, mask=number < new * GROUP, other=-1)


@triton.jit
def rotated_queries(
    query,
    strides,  # of sequences, heads, tokens
    positions,
    angles,  # high, low, factor
    channels,  # two [PAIRS], the halves of the pairs, and which of them exist
    b,
    g,
    number,
    new,
    scaling,
    GROUP: tl.constexpr,
    QUICK: tl.constexpr,
):
    """Two `[N, PAIRS]` fp32: the halves of queries `number` `[N]`, scaled and rotated to their own positions."""
    first, second, pair_ok = channels
    position = positions_of(positions, b, number, new, GROUP)
    head = (g * GROUP + number % GROUP).to(tl.int64)
    at = query + b * strides[0] + head * strides[1] + (number // GROUP).to(tl.int64) * strides[2]
    ok = (number < new * GROUP)[:, None] & pair_ok[None, :]
    scale = (angles[2] * scaling)[None, :]
    x = tl.load(at[:, None] + first[None, :], mask=ok, other=0).to(tl.float32) * scale
    y = tl.load(at[:, None] + second[None, :], mask=ok, other=0).to(tl.float32) * scale
    cos, sin = cos_sin(position[:, None], angles[0][None, :], angles[1][None, :], QUICK)
    return x * cos - y * sin, y * cos + x * sin


@triton.jit
def rotate_back(
    rotated,  # [spans, 2, 16 x PAIRS] operand dtype, written
    own,  # [ROWS, 2, PAIRS] fp32: the queries, rotated to their own positions
    angles,  # two [PAIRS] int32: fractions of a turn per token, high and low; and the position of the chunk's first
    ROWS: tl.constexpr,
    TURN: tl.constexpr,
    STRETCHES: tl.constexpr,  # of a span
    COUNT: tl.constexpr,  # of stretches
    PAIRS: tl.constexpr,
    ORDERED: tl.constexpr,  # see `keep_operand`
    QUICK: tl.constexpr,
):
    """Rotate the queries of a tile back to the first tokens of a chunk's stretches."""
    stretch, pair = tl.arange(0, COUNT), tl.arange(0, PAIRS)
    high, low, origin = angles
    step = phase_of(tl.full([1], TURN, tl.int32), high, low)
    phase = phase_of(origin, high, low)[None, :] + stretch[:, None] * step[None, :]
    cos, sin = cos_sin_of(phase, QUICK)
    column = pair
    if not ORDERED:
        column = column_of(pair, PAIRS)
    first_row = (stretch % STRETCHES * ROWS)[:, None]
    at = rotated + (stretch // STRETCHES * (32 * PAIRS))[:, None] + place_in_operand(first_row, column[None, :], 16)
    # all queries before the first is stored: a load does not pass a store that may be to the same place
    halves = ()
    for half in tl.static_range(2 * ROWS):
        halves += (tl.load(own + half * PAIRS + pair)[None, :],)  # type: ignore[assignment]
    for row in tl.static_range(ROWS):
        back_a = halves[2 * row] * cos + halves[2 * row + 1] * sin
        back_b = halves[2 * row + 1] * cos - halves[2 * row] * sin
        tl.store(at + row_offset(row), back_a.to(rotated.dtype.element_ty))
        tl.store(at + row_offset(row) + 16 * PAIRS, back_b.to(rotated.dtype.element_ty))
