"""Values: from codes to tiles, the second operand of the output.

A tile holds levels only. Where ranges belong to tokens, their scales are multiplied into the softmax weights; where they belong to
channels, into the finished output. Zeros add up on their own.
"""

import triton
import triton.language as tl

from deployment.kernels.lookup import unpaired
from deployment.kernels.tiles import DENSE, FRAGMENT_ORDER, arrange, channel_levels, units


@triton.jit
def value_levels_tile(
    words,
    held,
    table,
    levels,
    widths,
    dense,
    dense_stride,
    token0,
    tokens,
    channel,
    channel_ok,
    GEOMETRY: tl.constexpr,
    SOURCE: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Levels `[64, CHANNELS]` fp32 (fp16 if FAST) of a block; as `key_levels`."""
    if SOURCE == DENSE:
        token = token0 + tl.arange(0, 64)
        at = dense + token[:, None] * dense_stride + channel[None, :]
        mask = (token < tokens)[:, None] & channel_ok[None, :]
        tile = tl.load(at, mask=mask, other=0).to(tl.float32)
    elif SOURCE == FRAGMENT_ORDER:
        tile = arrange(units(held[0], held[1], held[2], table, BITS, FAST), GEOMETRY, FAST)
        if FAST:
            tile = unpaired(tl.reshape(tile, [32, CHANNELS]))
        else:
            tile = tl.reshape(tile, [64, CHANNELS])
    else:
        tile = tl.trans(
            channel_levels(words, levels, widths[0], widths[1], widths[2], channel, channel_ok, BITS, CHANNELS)
        )
    return tile
