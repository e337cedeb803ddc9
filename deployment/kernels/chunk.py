"""Append of a chunk: many new tokens per sequence, in two kernels.

`encode_kernel`, a program per token, finds codes and outliers of all channels, and counts the latter. `store_kernel`, a program per
sequence, KV head and block, packs codes into words and puts outliers behind those that are there and those of the blocks before.
"""

import triton
import triton.language as tl

from deployment.kernels.encode import (
    OUTLIER,
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
from deployment.kernels.store import list_begin, room_end, store_channels, store_groups
from deployment.kernels.unpack import IN_GROUPS, KEYS_IN_GROUPS

_COUNTED = tl.constexpr(256)  # tokens whose outliers are added up at once


@triton.jit(do_not_specialize=["stride_b", "stride_g", "stride_s", "tokens"])
def encode_kernel(
    x,  # [B, X_HEADS, S, D] any float
    stride_b,
    stride_g,
    stride_s,
    stored,  # [B] int64, tokens per sequence before these
    padding,  # [B] int64, of these
    sinks,  # [B, G, SINKS, D] fp16
    codes,  # [B, S, C] int16: the code, or 256 for an outlier
    ranges,  # [B, S, 2] fp16: scale and zero of the token
    counts,  # [B, G, S] int32: outliers
    scale,  # [C] fp32
    zero,
    width,  # [C] int32
    first_boundary,
    boundaries,
    tokens,  # S
    G: tl.constexpr,
    D: tl.constexpr,
    X_HEADS: tl.constexpr,  # of which G are stored here
    FIRST: tl.constexpr,  # of these
    HEADS: tl.constexpr,  # X_HEADS, rounded up
    LANES: tl.constexpr,  # D, rounded up
    SINKS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    PER_END: tl.constexpr,
    OUTLIERS: tl.constexpr,
    FED: tl.constexpr,  # whether codes are left to others to find, but for outliers
    WIDEST: tl.constexpr,
):
    """Codes and ranges of one token, and the token itself if it is a sink."""
    C: tl.constexpr = G * D
    BITS: tl.constexpr = x.dtype.element_ty.primitive_bitwidth
    b, s = tl.program_id(0) // tokens, tl.program_id(0) % tokens
    x_head, lane = tl.arange(0, HEADS * LANES) // LANES, tl.arange(0, HEADS * LANES) % LANES
    head, ok = x_head - FIRST, (x_head < X_HEADS) & (lane < D)
    channel, own = head * D + lane, ok
    if X_HEADS != G:
        own = ok & (head >= 0) & (head < G)
    at = x + b.to(tl.int64) * stride_b + x_head.to(tl.int64) * stride_g + s.to(tl.int64) * stride_s
    raw = tl.load(at + lane, mask=ok, other=0)
    value = raw.to(tl.float32)
    pad = tl.load(padding + b)
    number = tl.load(stored + b) + s - pad
    sink_at = sinks + ((b * G + head).to(tl.int64) * SINKS + number) * D + lane
    tl.store(sink_at, half(value), mask=own & (s + channel * 0 >= pad) & (number + channel * 0 < SINKS))
    row = tl.program_id(0).to(tl.int64)
    outlier = lane < 0
    if DYNAMIC:
        up = rising(raw, ok, BITS)
        down = falling(up, ok, BITS)
        found = (0, 0, 0, 0, 0, 0)
        if PER_END > 0:
            found = extremes(up, down, PER_END, BITS)
            rank = tl.cumsum(tl.where(ok, ties(up, down, found), 0), 0)
            outlier = ok & is_extreme(up, down, rank, found, BITS)
        range_scale, range_zero = token_range(value, ok, up, down, found, PER_END)
        tl.store(ranges + row * 2, range_scale)
        tl.store(ranges + row * 2 + 1, range_zero)
        s_c = range_scale.to(tl.float32) + tl.zeros([HEADS * LANES], tl.float32)
        z_c = range_zero.to(tl.float32) + tl.zeros([HEADS * LANES], tl.float32)
    else:
        s_c, z_c = tl.load(scale + channel, mask=own, other=1), tl.load(zero + channel, mask=own, other=0)
    normalised = tl.div_rn(value - z_c, tl.maximum(s_c, TINY))
    if OUTLIERS and not DYNAMIC:
        outlier = own & (tl.abs(normalised) > 1)
    code = tl.zeros_like(channel)
    if not FED:
        code = codes_of(normalised, channel, own, width, first_boundary, boundaries, WIDEST)
    if OUTLIERS:
        count, g = tl.sum(tl.reshape(outlier.to(tl.int32), [HEADS, LANES]), 1), tl.arange(0, HEADS) - FIRST
        tl.store(counts + (b * G + g) * tokens + s, count, mask=(g >= 0) & (g < G))
    tl.store(codes + row * C + channel, tl.where(outlier, OUTLIER, code).to(tl.int16), mask=own)


@triton.jit(do_not_specialize=["stride_b", "stride_g", "stride_s", "tokens", "page_start", "blocks", "sinks", "places"])
def store_kernel(
    x,  # [B, G, S, D] any float
    stride_b,
    stride_g,
    stride_s,
    stored,  # [B] int64, tokens per sequence before these
    padding,  # [B] int64, of these
    codes,  # [B, S, C] int16, from `encode_kernel`
    ranges,  # [B, S, 2] fp16
    counts,  # [B, G, S] int32
    before_ends,  # `ends` before this launch
    words,  # [B, blocks, W] int32
    scales,  # [B, blocks * 64, 2] fp16
    index,  # [places] int16
    value,  # [places] fp16
    starts,  # [B, G] int32
    ends,  # [B, G, blocks] int32
    overflow,  # [1] int32, set where a stream is full
    width,
    offset,
    channel_at,  # [C] int32, of groups: which channel of the head comes where
    tokens,
    page_start,
    blocks,
    block_words,
    sinks,
    places,
    G: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,  # D, rounded up
    SOURCE: tl.constexpr,
    PLANES: tl.constexpr,  # the union of all widths' binary digits
    DYNAMIC: tl.constexpr,
    OUTLIERS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Words, ranges and outliers of one KV head's new tokens, as far as they belong to a block of a page."""
    C: tl.constexpr = G * D
    stream = tl.program_id(0).to(tl.int64)
    b, g = stream // G, (stream % G).to(tl.int32)
    before, pad = tl.load(stored + b), tl.load(padding + b)
    # tokens of the page that are to be written; `row0 + token` is a token's row in the chunk
    low = tl.maximum(before, sinks) - sinks - page_start
    high = tl.minimum(before + tokens - pad - sinks - page_start, blocks * 64)
    low = tl.maximum(low, 0)
    row = page_start + sinks + pad - before
    lane, slot = tl.arange(0, LANES), tl.arange(0, 64)
    block = low // 64 + tl.program_id(1)
    first, row0 = block * 64, b * tokens + row
    if (low < high) & (first < high):
        head = words + (b * blocks + block) * block_words
        if SOURCE >= IN_GROUPS:
            tables = (width, offset, channel_at)
            KEYS: tl.constexpr = SOURCE == KEYS_IN_GROUPS
            store_groups(head, codes, tables, first, low, high, row0, g, PLANES, KEYS, C, D, LANES)
        else:
            own, at = width + g * D, offset + g * D
            store_channels(head, codes, at, own, first, low, high, row0, g, PLANES, C, D, LANES)
        token = first + slot
        new = (token >= low) & (token < high)
        if DYNAMIC:
            mine = new & (slot * 0 + g == 0)
            from_at, to_at = ranges + (row0 + token) * 2, scales + (b * blocks * 64 + token) * 2
            tl.store(to_at, tl.load(from_at, mask=mine, other=0), mask=mine)
            tl.store(to_at + 1, tl.load(from_at + 1, mask=mine, other=0), mask=mine)
        if OUTLIERS:
            mask = new[:, None] & (lane < D)[None, :]
            code_at = codes + (row0 + token)[:, None] * C + g * D + lane[None, :]
            chosen = tl.load(code_at, mask=mask, other=0) == OUTLIER
            flat = tl.reshape(chosen.to(tl.int32), [64 * LANES])
            rank = tl.reshape(tl.cumsum(flat, 0) - flat, [64, LANES])
            begin = list_begin(starts, before_ends, stream, low // 64, low % 64, blocks)
            for some in range(low + row, first + row, _COUNTED):
                s = some + tl.arange(0, _COUNTED)
                begin += tl.sum(tl.load(counts + stream * tokens + s, mask=s < first + row, other=0), 0)
            limit = room_end(starts, stream, tl.num_programs(0), places)
            entry = begin + rank
            fits = chosen & (entry < limit)
            x_at = x + b * stride_b + g.to(tl.int64) * stride_g + (row + token)[:, None] * stride_s + lane[None, :]
            exact = tl.load(x_at, mask=fits, other=0).to(tl.float32)
            tl.store(index + entry, ((token % SPAN)[:, None] * D + lane[None, :]).to(tl.int16), mask=fits)
            tl.store(value + entry, half(exact), mask=fits)
            end = begin + tl.sum(flat, 0)
            tl.store(ends + stream * blocks + block, tl.minimum(end, limit))
            if end > limit:
                tl.store(overflow, 1)
