"""The first kernel of an append of a chunk: codes, ranges and outliers of tokens, `Quantizer.encode` on the device, bit for bit.

A program has a token, all channels of it. Where ranges are a token's own, the n largest and the n smallest of all its channels are outliers. They are found through
integers that sort as the numbers do (`sort_key`, `reverse_sort_key`): the n-th largest has its bits set one after another, from the
highest, as long as n keys remain that are at least as large. Both ends are searched at once, their counts in the halves
of one sum, so a token in half precision costs 16 sums. Which of several equal ones belong is then a matter of counting:
ties go to the lowest channel, and top comes before bottom.
"""

import triton
import triton.language as tl

from quant.feedback_kernel import OUTLIER, TINY, half, search


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
        up = sort_key(raw, ok, BITS)
        down = reverse_sort_key(up, ok, BITS)
        found = (0, 0, 0, 0, 0, 0)
        if PER_END > 0:
            found = extremes(up, down, PER_END, BITS)
            rank = tl.cumsum(tl.where(ok, both(up == found[0], down == found[1]), 0), 0)
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


@triton.jit
def sort_key(x, ok, BITS: tl.constexpr):
    """uint32 of BITS bits that sort as the floats `x` of BITS bits do; both zeros are one, and 0 where not `ok`."""
    if BITS == 16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        bits = tl.where((bits & 0x7FFF) == 0, 0, bits)
        key = tl.where(bits < 0, ~bits, bits | 0x8000)
    else:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)
        key = tl.where(bits < 0, ~bits, bits | (-2147483647 - 1))
    return tl.where(ok, key, 0).to(tl.uint32, bitcast=True)


@triton.jit
def reverse_sort_key(key, ok, BITS: tl.constexpr):
    """The same in the opposite order."""
    ones = tl.full([1], 0xFFFF if BITS == 16 else 0xFFFFFFFF, tl.uint32)
    return tl.where(ok, ones - key, tl.zeros_like(key))


@triton.jit
def both(top, bottom):
    """Two counts below 65536, or flags, in one int32."""
    return top.to(tl.int32) + (bottom.to(tl.int32) << 16)


@triton.jit
def upper(counts):
    """The second of `both`; the first is `& 65535`."""
    return (counts >> 16) & 65535


@triton.jit
def extremes(up, down, COUNT: tl.constexpr, BITS: tl.constexpr):
    """What `is_extreme` and `token_range` must know of the COUNT largest of keys `up`, and the COUNT largest of `down`.

    (threshold of up, of down; how many of the ties at each belong; whether some at each do not).
    """
    tl.static_assert(up.numel < 65536)
    top, bottom = tl.full([1], 0, tl.uint32), tl.full([1], 0, tl.uint32)
    bit = tl.full([1], 1 << (BITS - 1), tl.uint32)
    more_top, more_bottom = tl.full([1], 1, tl.int32), tl.full([1], 1, tl.int32)
    for _ in range(BITS):
        at_top, at_bottom = up >= (top | bit), down >= (bottom | bit)
        counts = tl.sum(both(at_top, at_bottom), 0)
        of_top, of_bottom = counts & 65535, upper(counts)
        top = tl.where(of_top >= COUNT, top | bit, top)
        bottom = tl.where(of_bottom >= COUNT, bottom | bit, bottom)
        more_top = tl.where(of_top >= COUNT, (of_top > COUNT).to(tl.int32), more_top)
        more_bottom = tl.where(of_bottom >= COUNT, (of_bottom > COUNT).to(tl.int32), more_bottom)
        bit = bit >> 1
    beyond = tl.sum(both(up > top, down > bottom), 0)
    return top, bottom, COUNT - (beyond & 65535), COUNT - upper(beyond), more_top, more_bottom


@triton.jit
def is_extreme(up, down, rank, found, BITS: tl.constexpr):
    """Mask of keys that are among the extremes `found`; `rank` counts ties, `both` ends', up to and including each channel."""
    top, bottom, room_top, room_bottom, _, _ = found
    # if nearly all are equal both thresholds are the same number, and top takes the first of the ties
    taken = tl.where(top == reverse_sort_key(bottom, bottom >= 0, BITS), room_top, 0)
    top_rank, bottom_rank = rank & 65535, upper(rank) - taken
    tied_top = (up == top) & (top_rank <= room_top)
    tied_bottom = (down == bottom) & (bottom_rank > 0) & (bottom_rank <= room_bottom)
    return (up > top) | (down > bottom) | tied_top | tied_bottom


@triton.jit
def token_range(x, ok, up, down, found, PER_END: tl.constexpr):
    """(scale, zero) fp16 of a token of fp32 channels `x`, from what is left without its extremes."""
    low, high = ok, ok
    if PER_END > 0:
        # equal ones that are left over are the range's ends themselves
        high = ok & (up < found[0] + found[4].to(tl.uint32))
        low = ok & (down < found[1] + found[5].to(tl.uint32))
    most = tl.max(tl.where(high, x, float("-inf")), 0)
    least = tl.min(tl.where(low, x, float("inf")), 0)
    return half((most - least) / 2), half((most + least) / 2)


@triton.jit
def codes_of(normalised, channel, ok, width, first_boundary, boundaries, WIDEST: tl.constexpr):
    """int32 codes of normalised channels: how many boundaries lie below, by a search whose steps the width gives."""
    bits = tl.load(width + channel, mask=ok, other=0)
    base = tl.load(first_boundary + channel, mask=ok, other=0)
    return search(normalised, bits, base, ok, boundaries, WIDEST)
