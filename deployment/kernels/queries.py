"""The queries of a tile, and which of the new ones they are.

Row r of a tile is token r // (H/G) of the new ones and query head r % (H/G) of the KV head.
"""

import triton
import triton.language as tl

from deployment.kernels.phase import cos_sin


@triton.jit
def positions_of(positions, b, number, new, GROUP: tl.constexpr):
    """Positions int64 of queries `number` of sequence b; -1 for those that do not exist."""
    return tl.load(positions + b * new + number // GROUP, mask=number < new * GROUP, other=-1)


@triton.jit
def rotated_queries(
    query,
    strides,  # of sequences, heads, tokens
    positions,
    angles,  # high, low
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
    x = tl.load(at[:, None] + first[None, :], mask=ok, other=0).to(tl.float32) * scaling
    y = tl.load(at[:, None] + second[None, :], mask=ok, other=0).to(tl.float32) * scaling
    cos, sin = cos_sin(position[:, None], angles[0][None, :], angles[1][None, :], QUICK)
    return x * cos - y * sin, y * cos + x * sin
