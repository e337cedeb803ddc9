"""Append of a decode step: one new token per sequence, keys and values in one launch.

A program handles one side (keys or values) of one KV head of one sequence, alone: it encodes the head's channels, flips
their bits in the block's words, and puts the outliers behind the head's others. What a token's own range and outliers take,
all channels of the token, every program of the sequence looks at for itself: they do so at the same time, on
multiprocessors that would idle, and nobody waits for a launch before.
"""

import triton
import triton.language as tl

from deployment.kernels.encode import (
    TINY,
    codes_of,
    extremes,
    falling,
    half,
    is_extreme,
    rising,
    ties,
    token_range,
)
from deployment.kernels.store import flip_channels, flip_groups, list_begin, room_end
from deployment.kernels.unpack import IN_GROUPS, KEYS_IN_GROUPS


@triton.jit
def own_range(
    x,
    stride_g,
    g,
    PER_END: tl.constexpr,
    BITS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """(scale, zero, extremes found, ties before head `g`) of a token `x` of all G heads."""
    channel = tl.arange(0, CHANNELS)
    ok = channel < G * D
    raw = tl.load(x + (channel // D).to(tl.int64) * stride_g + channel % D, mask=ok, other=0)
    up = rising(raw, ok, BITS)
    down = falling(up, ok, BITS)
    found = (0, 0, 0, 0, 0, 0)
    before = 0
    if PER_END > 0:
        found = extremes(up, down, PER_END, BITS)
        before = tl.sum(tl.where(ok & (channel < g * D), ties(up, down, found), 0), 0)
    scale, zero = token_range(raw.to(tl.float32), ok, up, down, found, PER_END)
    return scale, zero, found, before


@triton.jit
def put_token(
    side,  # pointers as of `Side.pointers` (append.py)
    stride_b,
    stride_g,
    block_words,
    places,
    stored,
    padding,
    overflow,
    page_start,
    blocks,
    stream,
    streams,
    CONSTANTS: tl.constexpr,  # `Side.constants`
    SIZES: tl.constexpr,  # G, D, D rounded up, sink tokens
):
    """Store the new token of one side of one head."""
    (
        x,
        sinks,
        words,
        scales,
        index,
        value,
        starts,
        ends,
        scale,
        zero,
        width,
        first,
        boundaries,
        offset,
        places_in_head,
    ) = side
    DYNAMIC: tl.constexpr = CONSTANTS[0]
    PER_END: tl.constexpr = CONSTANTS[1]
    OUTLIERS: tl.constexpr = CONSTANTS[2]
    SOURCE: tl.constexpr = CONSTANTS[3]
    PLANES: tl.constexpr = CONSTANTS[4]
    WIDEST: tl.constexpr = CONSTANTS[5]
    SPAN: tl.constexpr = CONSTANTS[6]
    BITS: tl.constexpr = CONSTANTS[7]
    FIRST: tl.constexpr = CONSTANTS[8]  # of `x`, which may have heads that are stored elsewhere
    HEADS: tl.constexpr = CONSTANTS[9]
    CHANNELS: tl.constexpr = CONSTANTS[10]  # of all of these, rounded up
    G: tl.constexpr = SIZES[0]
    D: tl.constexpr = SIZES[1]
    LANES: tl.constexpr = SIZES[2]
    SINKS: tl.constexpr = SIZES[3]
    b, g = stream // G, (stream % G).to(tl.int32)
    lane = tl.arange(0, LANES)
    ok = lane < D
    row = x + b * stride_b
    raw = tl.load(row + (FIRST + g).to(tl.int64) * stride_g + lane, mask=ok, other=0)
    exact = raw.to(tl.float32)
    number, there = tl.load(stored + b), tl.load(padding + b) == 0
    if there & (number < SINKS):
        tl.store(sinks + (stream * SINKS + number) * D + lane, half(exact), mask=ok)
    token = number - SINKS - page_start
    if there & (token >= 0) & (token < blocks * 64):
        channel, block, slot = g * D + lane, token // 64, (token % 64).to(tl.int32)
        outlier = lane < 0
        if DYNAMIC:
            token_scale, token_zero, found, before = own_range(
                row, stride_g, FIRST + g, PER_END, BITS, HEADS, D, CHANNELS
            )
            if PER_END > 0:
                up = rising(raw, ok, BITS)
                down = falling(up, ok, BITS)
                rank = before + tl.cumsum(tl.where(ok, ties(up, down, found), 0), 0)
                outlier = ok & is_extreme(up, down, rank, found, BITS)
            if g == 0:
                range_at = scales + (b * blocks * 64 + token) * 2
                tl.store(range_at, token_scale)
                tl.store(range_at + 1, token_zero)
            s = token_scale.to(tl.float32) + tl.zeros([LANES], tl.float32)
            z = token_zero.to(tl.float32) + tl.zeros([LANES], tl.float32)
        else:
            s, z = tl.load(scale + channel, mask=ok, other=1), tl.load(zero + channel, mask=ok, other=0)
        normalised = tl.div_rn(exact - z, tl.maximum(s, TINY))
        if OUTLIERS and not DYNAMIC:
            outlier = ok & (tl.abs(normalised) > 1)
        code = codes_of(normalised, channel, ok, width, first, boundaries, WIDEST)
        code = tl.where(outlier, 0, code)
        head = words + (b * blocks + block) * block_words
        if SOURCE >= IN_GROUPS:
            places_in_head += g * D
            KEYS: tl.constexpr = SOURCE == KEYS_IN_GROUPS
            flip_groups(head, offset + g * D, width + g * D, places_in_head, code, slot, lane, ok, PLANES, KEYS)
        else:
            flip_channels(head, offset + g * D, width + g * D, code, slot, lane, ok, PLANES)
        if OUTLIERS:
            begin = list_begin(starts, ends, stream, block, slot, blocks)
            limit = room_end(starts, stream, streams, places)
            count = tl.cumsum(outlier.to(tl.int32), 0)
            entry = begin + count - 1
            fits = outlier & (entry < limit)
            tl.store(index + entry, ((token % SPAN).to(tl.int32) * D + lane).to(tl.int16), mask=fits)
            tl.store(value + entry, half(exact), mask=fits)
            end = begin + tl.sum(outlier.to(tl.int32), 0)
            tl.debug_barrier()  # whoever reads `ends` has done so
            tl.store(ends + stream * blocks + block, tl.minimum(end, limit))
            if end > limit:
                tl.store(overflow, 1)


@triton.jit(
    do_not_specialize=[
        "key_stride_b",
        "key_stride_g",
        "value_stride_b",
        "value_stride_g",
        "key_places",
        "value_places",
        "page_start",
        "blocks",
        "streams",
    ]
)
def step_kernel(
    key,
    value,
    key_stride_b,
    key_stride_g,
    value_stride_b,
    value_stride_g,
    key_words,  # of a block
    value_words,
    key_places,  # of all streams of the page
    value_places,
    stored,  # [B] int64, tokens per sequence before this
    padding,  # [B] int64, 1 where the token is none
    overflow,  # [1] int32
    page_start,
    blocks,
    streams,  # B * G
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Values, whose programs take longer, come first; then keys, if the grid is twice as large as `streams`."""
    stream = tl.program_id(0).to(tl.int64)
    if stream < streams:
        put_token(
            value,
            value_stride_b,
            value_stride_g,
            value_words,
            value_places,
            stored,
            padding,
            overflow,
            page_start,
            blocks,
            stream,
            streams,
            VALUE,
            SIZES,
        )
    else:
        put_token(
            key,
            key_stride_b,
            key_stride_g,
            key_words,
            key_places,
            stored,
            padding,
            overflow,
            page_start,
            blocks,
            stream - streams,
            streams,
            KEY,
            SIZES,
        )
