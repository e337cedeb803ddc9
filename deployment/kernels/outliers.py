"""Outliers: what the elements kept exactly add to scores and outputs.

The code of an outlier is 0, so that the tiles hold what code 0 decodes to, and the list says by how much that is wrong.
Corrections are linear in the difference: a flat loop over the chunk's list adds them, whichever element they belong to.
"""

import triton
import triton.language as tl

from deployment.kernels.phase import pair_of
from deployment.streams import index_span

_span = triton.constexpr_function(index_span)


@triton.jit
def token_ranges(scales, token, ok):
    """(scale, zero) fp32 of tokens."""
    scale = tl.load(scales + token * 2, mask=ok, other=0).to(tl.float32)
    zero = tl.load(scales + token * 2 + 1, mask=ok, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def list_begin(starts, ends, stream, block, blocks):
    """Where the outlier list of a block begins."""
    if block > 0:  # noqa: SIM108  (the device language evaluates both sides of a conditional expression)
        begin = tl.load(ends + stream * blocks + block - 1)
    else:
        begin = tl.load(starts + stream)
    return begin


@triton.jit
def outlier_deltas(
    index,
    value,
    entry,
    ok,
    edges,  # ends of the lists of the chunk's first block
    blocks,  # of the chunk
    scales,
    levels,
    floor,
    token0,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DYNAMIC: tl.constexpr,
):
    """(token within the chunk, channel, how much the element exceeds what its code 0 gave) of outliers `entry`."""
    place = tl.load(index + entry, mask=ok, other=0).to(tl.int32) & 0xFFFF
    exact = tl.load(value + entry, mask=ok, other=0).to(tl.float32)
    # an index counts tokens from its span's first; chunks and spans are powers of two, so one holds the other whole
    SPAN: tl.constexpr = _span(D)
    token, channel = place // D - token0 % SPAN, place % D
    for later in tl.static_range(1, CHUNK // SPAN):
        last = later * (SPAN // 64) - 1  # the block before that span
        edge = tl.load(edges + last, mask=last < blocks, other=2147483647)
        token += tl.where(entry >= edge, SPAN, 0)
    if DYNAMIC:
        scale, zero = token_ranges(scales, token0 + token, ok)
        coded = tl.load(levels) * scale + zero
    else:
        coded = tl.load(floor + channel, mask=ok, other=0)
    return token, channel, exact - coded


@triton.jit
def turned_query(
    rotated,
    token,
    channel,
    row,
    ok,
    turn,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    D: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    TURN: tl.constexpr,
):
    """`[entries, ROWS]` fp32: the factor by which an element of the unrotated keys enters the scores.

    rotated: `[stretches, ROWS, 2, PAIRS]`, queries rotated back to the first of every TURN tokens.
    """
    pair, is_second = pair_of(channel, ROTARY_HALF, D // 2)
    cos = tl.load(turn + pair * 64 + token % TURN, mask=ok, other=0)
    sin = tl.load(turn + (D // 2 + pair) * 64 + token % TURN, mask=ok, other=0)
    at = rotated + (((token // TURN) * ROWS)[:, None] + row[None, :]) * (2 * PAIRS) + pair[:, None]
    a = tl.load(at, mask=ok[:, None], other=0).to(tl.float32)
    b = tl.load(at + PAIRS, mask=ok[:, None], other=0).to(tl.float32)
    on_a = tl.where(is_second, -sin, cos)
    on_b = tl.where(is_second, cos, sin)
    return a * on_a[:, None] + b * on_b[:, None]
