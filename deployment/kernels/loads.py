"""Tiles of keys and values in floating point, from any of the three sources, and the corrections of outliers.

Called within the attention kernel. A dequantized element is `level * scale + zero`; scale and zero belong to the channel, or to
the token where the range is dynamic (`scales`: `[tokens, 2]` fp16 of the sequence's page).
"""

import triton
import triton.language as tl

from deployment.kernels.lookup import prepared
from deployment.kernels.phase import pair_of
from deployment.kernels.tiles import DENSE, FRAGMENT_ORDER, arrange, channel_codes, units
from deployment.streams import index_span

_span = triton.constexpr_function(index_span)


@triton.jit
def token_ranges(scales, token, ok):
    """(scale, zero) fp32 of tokens."""
    scale = tl.load(scales + token * 2, mask=ok, other=0).to(tl.float32)
    zero = tl.load(scales + token * 2 + 1, mask=ok, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def key_halves(
    words,  # of the block and head (fragments) or of the block (channels)
    scales,
    tables,  # levels, scale, zero, width, offset, first_level; those per channel at the head's first
    ready,  # what does not change from block to block: `prepared`, and scale and zero of `first`, then of `second`
    dense,  # [tokens, D] of the head
    dense_stride,
    token0,
    tokens,
    first,
    second,
    pair_ok,
    GEOMETRY: tl.constexpr,  # of fragments, `Fragment.constants`
    SOURCE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    BITS: tl.constexpr,  # of fragments; the planes of channels
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    """Two tiles `[PAIRS, 64]` fp32 (fp16 if FAST): channels `first` and `second` of the block's 64 tokens, not rotated."""
    token = token0 + tl.arange(0, 64)
    ok = token < tokens
    if SOURCE == DENSE:
        at = dense + token[None, :] * dense_stride
        mask = pair_ok[:, None] & ok[None, :]
        a = tl.load(at + first[:, None], mask=mask, other=0).to(tl.float32)
        b = tl.load(at + second[:, None], mask=mask, other=0).to(tl.float32)
    else:
        levels, _, _, width, offset, first_level = tables
        if SOURCE == FRAGMENT_ORDER:
            a, b = tl.split(arrange(units(words, ready[0], BITS, GEOMETRY, FAST), GEOMETRY, WIDTH))
        else:
            a = channel_levels(words, levels, width, offset, first_level, first, pair_ok, BITS, PAIRS)
            b = channel_levels(words, levels, width, offset, first_level, second, pair_ok, BITS, PAIRS)
        if DYNAMIC:
            s, z = token_ranges(scales, token, ok)
            s, z = s.to(a.dtype), z.to(a.dtype)
            a, b = a * s[None, :] + z[None, :], b * s[None, :] + z[None, :]
        else:
            a = a * ready[1][:, None] + ready[2][:, None]
            b = b * ready[3][:, None] + ready[4][:, None]
    return a, b


@triton.jit
def value_tile(
    words,
    tables,
    ready,
    dense,
    dense_stride,
    token0,
    tokens,
    channel,
    channel_ok,
    GEOMETRY: tl.constexpr,
    SOURCE: tl.constexpr,
    DYNAMIC: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    FAST: tl.constexpr,
):
    """A tile `[64, CHANNELS]` fp32 (fp16 if FAST), tokens of fragments in `operand_order`; arguments as of `key_halves`. Ranges of tokens are left to the weights."""
    token = token0 + tl.arange(0, 64)
    ok = token < tokens
    if SOURCE == DENSE:
        at = dense + token[:, None] * dense_stride + channel[None, :]
        tile = tl.load(at, mask=ok[:, None] & channel_ok[None, :], other=0).to(tl.float32)
    else:
        levels, _, _, width, offset, first_level = tables
        if SOURCE == FRAGMENT_ORDER:
            tile = arrange(units(words, ready[0], BITS, GEOMETRY, FAST), GEOMETRY, WIDTH)
            tile = tl.reshape(tile, (64, CHANNELS))
        else:
            tile = tl.trans(
                channel_levels(words, levels, width, offset, first_level, channel, channel_ok, BITS, CHANNELS)
            )
        if not DYNAMIC:
            tile = tile * ready[1][None, :] + ready[2][None, :]
    return tile


@triton.jit
def static(scale, zero, channel, ok, FAST: tl.constexpr):
    """(scale, zero) of every channel as calibrated."""
    s, z = tl.load(scale + channel, mask=ok, other=0), tl.load(zero + channel, mask=ok, other=0)
    if FAST:
        s, z = s.to(tl.float16), z.to(tl.float16)
    return s, z


@triton.jit
def table_of(levels, SOURCE: tl.constexpr, BITS: tl.constexpr, FAST: tl.constexpr):
    """`prepared` for fragments."""
    if SOURCE == FRAGMENT_ORDER:  # noqa: SIM108  (the device language evaluates both sides of a conditional expression)
        table = prepared(levels, BITS, FAST)
    else:
        table = (0,)
    return table


@triton.jit
def channel_levels(words, levels, width, offset, first_level, channel, ok, PLANES: tl.constexpr, N: tl.constexpr):
    """Levels `[N, 64]` of channels in channel order."""
    bits = tl.load(width + channel, mask=ok, other=0)
    start = tl.load(offset + channel, mask=ok, other=0)
    base = tl.load(first_level + channel, mask=ok, other=0)
    return tl.load(levels + base[:, None] + channel_codes(words, start, bits, ok, PLANES, N))


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
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    DYNAMIC: tl.constexpr,
):
    """(token within the chunk, channel, how much the element exceeds what its code 0 gave) of outliers `entry`."""
    place = tl.load(index + entry, mask=ok, other=0).to(tl.int32) & 0xFFFF
    exact = tl.load(value + entry, mask=ok, other=0).to(tl.float32)
    # an index counts tokens from its span's first; chunks and spans are powers of two, so one holds the other whole
    SPAN: tl.constexpr = _span(D)
    token, channel = place // D - token0 % SPAN, place % D
    for later in tl.static_range(1, BLOCKS * 64 // SPAN):
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
):
    """`[entries, ROWS]` fp32: the factor by which an element of the unrotated keys enters the scores.

    rotated: `[blocks, ROWS, 2, PAIRS]`, queries rotated back to the blocks' first tokens.
    """
    pair, is_second = pair_of(channel, ROTARY_HALF, D // 2)
    cos = tl.load(turn + pair * 64 + token % 64, mask=ok, other=0)
    sin = tl.load(turn + (D // 2 + pair) * 64 + token % 64, mask=ok, other=0)
    at = rotated + (((token // 64) * ROWS)[:, None] + row[None, :]) * (2 * PAIRS) + pair[:, None]
    a = tl.load(at, mask=ok[:, None], other=0).to(tl.float32)
    b = tl.load(at + PAIRS, mask=ok[:, None], other=0).to(tl.float32)
    on_a = tl.where(is_second, -sin, cos)
    on_b = tl.where(is_second, cos, sin)
    return a * on_a[:, None] + b * on_b[:, None]
