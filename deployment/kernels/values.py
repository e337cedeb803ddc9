"""Values of a chunk: from codes to tiles, and times the weights, into the output.

A tile holds levels only. Where ranges belong to tokens, their scales are multiplied into the softmax weights; where they belong to
channels, into the finished output. Zeros add up on their own.
"""

import triton
import triton.language as tl

from deployment.kernels.lookup import unpaired
from deployment.kernels.operands import SHARED_OPERAND, operand
from deployment.kernels.ring import send, words_of
from deployment.kernels.tiles import DENSE, FRAGMENT_ORDER, arrange, channel_levels, units


@triton.jit
def value_levels(
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
    """Levels `[64, CHANNELS]` fp32 (fp16 if FAST) of a block; arguments as of `key_levels`."""
    if SOURCE == DENSE:
        token = token0 + tl.arange(0, 64)
        at = dense + token[:, None] * dense_stride + channel[None, :]
        mask = (token < tokens)[:, None] & channel_ok[None, :]
        tile = tl.load(at, mask=mask, other=0).to(tl.float32)
    elif SOURCE == FRAGMENT_ORDER:
        tile = arrange(units(held[0], held[1], held[2], table, BITS, FAST), GEOMETRY, FAST, True)
        if FAST:  # noqa: SIM108  (the device language evaluates both sides of a conditional expression)
            tile = unpaired(tl.reshape(tile, [32, CHANNELS]))
        else:
            tile = tl.reshape(tile, [64, CHANNELS])
    else:
        tile = tl.trans(
            channel_levels(words, levels, widths[0], widths[1], widths[2], channel, channel_ok, BITS, CHANNELS)
        )
    return tile


@triton.jit
def attend_chunk(
    output,  # [16, CHANNELS] fp32
    weights,  # of levels: where `weigh_chunk` kept them as an operand
    ring,  # where the chunk's first STAGES blocks have been sent to
    source,  # words, their stride from block to block, levels, widths, plain tensor, its stride; of the head
    table,  # `prepared`
    token0,
    here,
    held,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    SOURCE: tl.constexpr,
    BITS: tl.constexpr,
    GEOMETRY: tl.constexpr,
    FAST: tl.constexpr,
    STAGES: tl.constexpr,  # of the ring; 0: words are read from where they are
    WHOLE: tl.constexpr,  # all blocks of a chunk have been sent
    KIND: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`output` plus the weighted sum of the levels of a chunk's tokens; row r of it is of query r % ROWS."""
    # the operand's part that belongs to a block, in bytes or elements
    BLOCK: tl.constexpr = 128 * min(ROWS, 8) * (2 if KIND == SHARED_OPERAND else 1)
    channel = tl.arange(0, CHANNELS)
    words, stride, levels, widths, plain, plain_stride = source
    block_at = words + (token0 // 64).to(tl.int64) * stride
    # of an odd number of blocks the last counts again, for tokens of weight 0
    for pair in range(0, here, 2):
        for second in tl.static_range(2):
            j = pair + second
            last = tl.minimum(j, here - 1)
            at = block_at + last * stride
            holds = words_of(ring, last, words, at, SOURCE, BITS, GEOMETRY, STAGES, WHOLE)
            tile = value_levels(
                at,
                holds,
                table,
                levels,
                widths,
                plain,
                plain_stride,
                token0 + j * 64,
                held,
                channel,
                channel < D,
                GEOMETRY,
                SOURCE,
                BITS,
                CHANNELS,
                FAST,
            ).to(OPERAND)
            if STAGES > 0 and not WHOLE:
                later = j + STAGES
                send(ring, later, block_at + later * stride, later < here, BITS, GEOMETRY, STAGES)
            weight = operand(weights + j * BLOCK, 64, ROWS, KIND)
            output = tl.dot(weight, tile, output, input_precision=PRECISION)
    return output
