"""Storing new tokens: quantize, choose outliers, pack, write, without waiting for the device.

Two kernels, for one token or many. `encode_kernel`, a program per token, normalises and encodes all channels, and finds
the outliers: beyond their channel's range where ranges are static, the n largest and n smallest of the token where
they are its own. `store_kernel`, a program per sequence and KV head, packs the codes into words and appends the outliers to
the stream. Codes and outliers are those of `Quantizer.encode` bit for bit: divisions round as IEEE says, and ties go to the
lowest channel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployment.kernels.tiles import FRAGMENT_ORDER
from deployment.layout import PackedTensor, Page
from deployment.order import ChannelOrder, FragmentOrder, fragment_index
from quant.outliers import outliers_per_end
from quant.quantizer import TokenQuantizer

_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_FP16_MAX = tl.constexpr(65504.0)
_OUTLIER = tl.constexpr(256)  # a code that no code of 8 bits is


@triton.jit
def half(x):
    """fp16, saturating; as `as_stored`."""
    return tl.minimum(tl.maximum(x, -_FP16_MAX), _FP16_MAX).to(tl.float16)


@triton.jit
def ordered(x):
    """uint32 that sort as the floats do; both zeros are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits | (-2147483647 - 1))
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def largest(x, COUNT: tl.constexpr):
    """Mask of exactly COUNT largest of `x` `[N]`; ties go to the lowest index."""
    key = ordered(x)
    threshold = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 2147483648, tl.uint32)
    for _ in range(32):
        probe = threshold | bit
        bit = bit >> 1
        enough = tl.sum((key >= probe).to(tl.int32), 0) >= COUNT
        threshold = tl.where(enough, probe, threshold)
    above = key > threshold
    tied = key == threshold
    room = COUNT - tl.sum(above.to(tl.int32), 0)
    return above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))


@triton.jit(do_not_specialize=["stride_b", "stride_g", "stride_s", "tokens"])
def encode_kernel(
    x,  # [B, G, S, D] any float
    stride_b,
    stride_g,
    stride_s,
    stored,  # [B] int64, tokens per sequence before these
    padding,  # [B] int64, of these
    sinks,  # [B, G, SINKS, D] fp16
    codes,  # [B, S, C] int16: the code, or 256 for an outlier
    ranges,  # [B, S, 2] fp16: scale and zero of the token
    scale,  # [C] fp32
    zero,
    width,  # [C] int32
    first_boundary,
    boundaries,
    tokens,  # S
    G: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,  # C, rounded up
    SINKS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    PER_END: tl.constexpr,
    OUTLIERS: tl.constexpr,
    WIDEST: tl.constexpr,
):
    """Codes and ranges of one token, and the token itself if it is a sink."""
    C: tl.constexpr = G * D
    b, s = tl.program_id(0) // tokens, tl.program_id(0) % tokens
    channel = tl.arange(0, CHANNELS)
    ok = channel < C
    at = x + b.to(tl.int64) * stride_b + (channel // D).to(tl.int64) * stride_g + s.to(tl.int64) * stride_s
    value = tl.load(at + channel % D, mask=ok, other=0).to(tl.float32)
    pad = tl.load(padding + b)
    number = tl.load(stored + b) + s - pad
    sink_at = sinks + ((b * G + channel // D).to(tl.int64) * SINKS + number) * D + channel % D
    tl.store(sink_at, half(value), mask=ok & (s + channel * 0 >= pad) & (number + channel * 0 < SINKS))
    row = tl.program_id(0).to(tl.int64)
    outlier = channel < 0
    if DYNAMIC:
        low, high = tl.where(ok, value, float("inf")), tl.where(ok, value, float("-inf"))
        if PER_END > 0:
            top = largest(high, PER_END)
            bottom = largest(tl.where(top | ~ok, float("-inf"), -value), PER_END)
            outlier = top | bottom
            low, high = tl.where(outlier, float("inf"), low), tl.where(outlier, float("-inf"), high)
        most, least = tl.max(high, 0), tl.min(low, 0)
        range_scale, range_zero = half((most - least) / 2), half((most + least) / 2)
        tl.store(ranges + row * 2, range_scale)
        tl.store(ranges + row * 2 + 1, range_zero)
        s_c = range_scale.to(tl.float32) + tl.zeros([CHANNELS], tl.float32)
        z_c = range_zero.to(tl.float32) + tl.zeros([CHANNELS], tl.float32)
    else:
        s_c, z_c = tl.load(scale + channel, mask=ok, other=1), tl.load(zero + channel, mask=ok, other=0)
    normalised = tl.div_rn(value - z_c, tl.maximum(s_c, _TINY))
    if OUTLIERS and not DYNAMIC:
        outlier = tl.abs(normalised) > 1

    # how many boundaries lie below: a binary search whose steps a channel's width gives
    bits, base = tl.load(width + channel, mask=ok, other=0), tl.load(first_boundary + channel, mask=ok, other=0)
    code = tl.zeros([CHANNELS], tl.int32)
    for level in tl.static_range(WIDEST):
        step = tl.where(bits > WIDEST - 1 - level, 1 << (WIDEST - 1 - level), 0)
        probe = code + step
        boundary = tl.load(boundaries + base + probe - 1, mask=ok & (step > 0), other=float("inf"))
        code = tl.where(normalised > boundary, probe, code)
    tl.store(codes + row * C + channel, tl.where(outlier, _OUTLIER, code).to(tl.int16), mask=ok)


@triton.jit
def word_bits(code, j, BITS: tl.constexpr, WORD: tl.constexpr):
    """What code number j of a unit (fragment order) puts into the unit's word number WORD; int32."""
    nibble = j % 8 * 4
    if BITS == 3:
        own = tl.where(j // 8 == WORD, code << nibble, 0)
        spare = ((code >> WORD) & 1) << (nibble + 3)
        bits = tl.where(j >= 24, spare, own)
    elif BITS == 2:
        bits = code << (nibble + j // 8 * 2)
    else:
        bits = code << nibble
    return bits


@triton.jit
def store_fragments(
    words,
    codes,
    place,
    block_token,
    low,
    high,
    row0,
    g,
    BITS: tl.constexpr,
    UNITS: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
):
    """Write a block of a head in fragment order: tokens `low`, ..., `high - 1` from `codes`, earlier ones kept."""
    CODES: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    unit, j = tl.arange(0, UNITS), tl.arange(0, CODES)
    element = tl.load(place + unit[:, None] * CODES + j[None, :])
    token = block_token + element // D
    new = (token >= low) & (token < high)
    code = tl.load(codes + (row0 + token) * C + g * D + element % D, mask=new, other=0).to(tl.int32) & 255
    kept = tl.where(token < low, (1 << BITS) - 1, 0)
    for word in tl.static_range(3 if BITS == 3 else 1):
        at = words + word * UNITS + unit
        mask = tl.sum(word_bits(kept, j[None, :], BITS, word), 1)
        fields = tl.sum(word_bits(code, j[None, :], BITS, word), 1)
        tl.store(at, (tl.load(at) & mask) | fields)


@triton.jit
def store_plane(words, offset, width, ok, code, old, PLANE: tl.constexpr, N: tl.constexpr):
    """Write a plane of `[N, 64]` codes in channel order, those that are `old` kept."""
    shift = width & (16 - 2 * PLANE)
    word = tl.arange(0, 2 * PLANE)[None, :]
    at = words + offset[:, None] + word // PLANE * width[:, None] + shift[:, None] + word % PLANE
    present = (ok & ((width & PLANE) != 0))[:, None]
    place = (tl.arange(0, 32 // PLANE) * PLANE)[None, None, :]
    fields = tl.reshape((code >> shift[:, None]) & ((1 << PLANE) - 1), [N, 2 * PLANE, 32 // PLANE])
    kept = tl.reshape(tl.where(old, (1 << PLANE) - 1, 0) + tl.zeros_like(code), [N, 2 * PLANE, 32 // PLANE])
    held = tl.load(at, mask=present, other=0) & tl.sum(kept << place, 2)
    tl.store(at, held | tl.sum(fields << place, 2), mask=present)


@triton.jit
def store_channels(
    words,
    codes,
    offset,
    width,
    block_token,
    low,
    high,
    row0,
    g,
    PLANES: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Write a block of a head in channel order; as `store_fragments`."""
    lane, token = tl.arange(0, N), block_token + tl.arange(0, 64)
    ok = lane < D
    bits, start = tl.load(width + lane, mask=ok, other=0), tl.load(offset + lane, mask=ok, other=0)
    new = ok[:, None] & ((token >= low) & (token < high))[None, :]
    code = tl.load(codes + (row0 + token)[None, :] * C + g * D + lane[:, None], mask=new, other=0).to(tl.int32) & 255
    old = (token < low)[None, :]
    if PLANES & 8:
        store_plane(words, start, bits, ok, code, old, 8, N)
    if PLANES & 4:
        store_plane(words, start, bits, ok, code, old, 4, N)
    if PLANES & 2:
        store_plane(words, start, bits, ok, code, old, 2, N)
    if PLANES & 1:
        store_plane(words, start, bits, ok, code, old, 1, N)


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
    words,  # [B, blocks, W] int32
    scales,  # [B, blocks * 64, 2] fp16
    index,  # [places] int16
    value,  # [places] fp16
    starts,  # [B, G] int32
    ends,  # [B, G, blocks] int32
    overflow,  # [1] int32, set where a stream is full
    width,
    offset,
    place,  # [units, codes] int32, of fragments
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
    BITS: tl.constexpr,  # of fragments; the planes of channels
    UNITS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    OUTLIERS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Words, ranges and outliers of one KV head's new tokens, as far as they belong to a page."""
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
    limit = places
    if OUTLIERS:  # noqa: SIM102  (a constant condition of its own is decided by the compiler)
        if stream + 1 < tl.num_programs(0):
            limit = tl.load(starts + stream + 1)
    if low < high:
        for block in range(low // 64, (high + 63) // 64):
            head = words + (b * blocks + block) * block_words
            if SOURCE == FRAGMENT_ORDER:
                head += g * (D * 2 * BITS)
                store_fragments(head, codes, place, block * 64, low, high, b * tokens + row, g, BITS, UNITS, C, D)
            else:
                store_channels(
                    head,
                    codes,
                    offset + g * D,
                    width + g * D,
                    block * 64,
                    low,
                    high,
                    b * tokens + row,
                    g,
                    BITS,
                    C,
                    D,
                    LANES,
                )
            token = block * 64 + slot
            new = (token >= low) & (token < high)
            if DYNAMIC:
                mine = new & (slot * 0 + g == 0)
                from_at, to_at = ranges + (b * tokens + row + token) * 2, scales + (b * blocks * 64 + token) * 2
                tl.store(to_at, tl.load(from_at, mask=mine, other=0), mask=mine)
                tl.store(to_at + 1, tl.load(from_at + 1, mask=mine, other=0), mask=mine)
            if OUTLIERS:
                mask = new[:, None] & (lane < D)[None, :]
                code_at = codes + (b * tokens + row + token)[:, None] * C + g * D + lane[None, :]
                chosen = tl.load(code_at, mask=mask, other=0) == _OUTLIER
                flat = tl.reshape(chosen.to(tl.int32), [64 * LANES])
                rank = tl.reshape(tl.cumsum(flat, 0) - flat, [64, LANES])
                begin = tl.load(starts + stream)
                if block > 0:
                    begin = tl.load(ends + stream * blocks + block - 1)
                if block * 64 < low:
                    begin = tl.load(ends + stream * blocks + block)
                entry = begin + rank
                fits = chosen & (entry < limit)
                x_at = x + b * stride_b + g.to(tl.int64) * stride_g + (row + token)[:, None] * stride_s + lane[None, :]
                exact = tl.load(x_at, mask=fits, other=0).to(tl.float32)
                tl.store(index + entry, ((token % SPAN)[:, None] * D + lane[None, :]).to(tl.int16), mask=fits)
                tl.store(value + entry, half(exact), mask=fits)
                end = begin + tl.sum(flat, 0)
                tl.debug_barrier()
                tl.store(ends + stream * blocks + block, tl.minimum(end, limit))
                if end > limit:
                    tl.store(overflow, 1)
                tl.debug_barrier()


def append_packed(
    packed: PackedTensor, x: Tensor, stored: Tensor, padding: Tensor, sinks: Tensor, pages: list[Page], overflow: Tensor
) -> None:
    """Store new tokens `x` `[B, G, S, D]`, of which row b's first `padding[b]` are none, behind `stored[b]` others.

    The first `sinks.shape[2]` tokens of a sequence go to `sinks` `[B, G, sink tokens, D]`, the others to `pages`, all that may
    be touched. `overflow` `[1]` int32 becomes 1 where a page's streams of outliers have no room.
    """
    batch, heads, tokens, dim = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    tables, quantizer = packed.tables, packed.quantizer
    dynamic = isinstance(quantizer, TokenQuantizer)
    codes = torch.empty(batch, tokens, heads * dim, dtype=torch.int16, device=x.device)
    ranges = torch.empty(batch, tokens, 2, dtype=torch.float16, device=x.device)
    encode_kernel[(batch * tokens,)](
        x,
        *x.stride()[:3],
        stored,
        padding,
        sinks,
        codes,
        ranges,
        tables.scale,
        tables.zero,
        tables.width,
        tables.first_boundary,
        tables.boundaries,
        tokens,
        G=heads,
        D=dim,
        CHANNELS=triton.next_power_of_2(heads * dim),
        SINKS=sinks.shape[2],
        DYNAMIC=dynamic,
        PER_END=outliers_per_end(heads * dim, quantizer.scheme.outliers) if dynamic else 0,
        OUTLIERS=packed.keeps_outliers,
        WIDEST=tables.widest,
        num_warps=4,
    )
    order, fragments = packed.order, isinstance(packed.order, FragmentOrder)
    for page in pages:
        unused, streams = page.words, page.outliers
        store_kernel[(batch * heads,)](
            x,
            *x.stride()[:3],
            stored,
            padding,
            codes,
            ranges,
            page.words,
            unused if page.scales is None else page.scales,
            unused if streams is None else streams.index,
            unused if streams is None else streams.value,
            unused if streams is None else streams.starts,
            unused if streams is None else streams.ends,
            overflow,
            tables.width,
            tables.offset,
            fragment_index(order) if isinstance(order, FragmentOrder) else unused,
            tokens,
            page.start,
            page.blocks,
            order.words,
            sinks.shape[2],
            0 if streams is None else streams.index.numel(),
            G=heads,
            D=dim,
            LANES=max(16, triton.next_power_of_2(dim)),
            SOURCE=FRAGMENT_ORDER if fragments else 0,
            BITS=order.bits if isinstance(order, FragmentOrder) else tables.planes,
            UNITS=order.geometry.units if isinstance(order, FragmentOrder) else 1,
            DYNAMIC=dynamic,
            OUTLIERS=streams is not None,
            SPAN=packed.span,
            num_warps=8,
        )


def takes(packed: PackedTensor) -> bool:
    """Whether the kernels can store what this quantizer makes; a cap on outliers takes a sort they lack."""
    capped = packed.quantizer.scheme.outlier_cap is not None
    return not capped and isinstance(packed.order, ChannelOrder | FragmentOrder)
