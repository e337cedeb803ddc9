"""The second kernel of an append of a chunk: codes into words, and outliers behind those that are there and those of the blocks before.

A program has a block of a sequence and KV head, and writes it word by word, tokens that were there before being kept.
"""

import triton
import triton.language as tl

from deployment.kernels.unpack import CHANNEL_ORDER, KEYS_IN_GROUPS
from quant.feedback_kernel import OUTLIER, half

_COUNTED = tl.constexpr(256)  # tokens whose outliers are added up at once


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
        tables = (width, offset, channel_at)
        for digit in tl.static_range(4):
            if PLANES & (8 >> digit):
                store_plane(head, codes, tables, first, low, high, row0, g, 8 >> digit, SOURCE, C, D, LANES)
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
            begin = tl.load(starts + stream)  # of the outliers of the first new token
            if low // 64 > 0:
                begin = tl.load(before_ends + stream * blocks + low // 64 - 1)
            if low % 64 > 0:
                begin = tl.load(before_ends + stream * blocks + low // 64)
            for some in range(low + row, first + row, _COUNTED):
                s = some + tl.arange(0, _COUNTED)
                begin += tl.sum(tl.load(counts + stream * tokens + s, mask=s < first + row, other=0), 0)
            limit = places
            if stream + 1 < tl.num_programs(0):
                limit = tl.load(starts + stream + 1)
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


@triton.jit
def store_plane(
    words,
    codes,
    tables,  # width, offset, channel: as of `Tables`
    block_token,
    low,
    high,
    row0,
    g,
    PLANE: tl.constexpr,
    SOURCE: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Write a plane of a head, whose tokens `low`, ..., `high - 1` are in `codes`: of all groups or channels that have it."""
    width, offset, channel_at = tables
    number = tl.arange(0, N * 2 * PLANE)  # of a word of the plane: N channels of 2 PLANE, or N / 16 groups of 32 lanes
    field = tl.arange(0, 32 // PLANE)[None, :]
    if SOURCE == CHANNEL_ORDER:  # see packing.py
        channel, word = number // (2 * PLANE), number % (2 * PLANE)
        here = channel < D
        first_channel = channel + g * D
        slot = word[:, None] * (32 // PLANE) + field
    else:
        group, lane, word = number // (32 * PLANE), number // PLANE % 32, number % PLANE
        here = group * 16 < D
        first_channel = tl.load(channel_at + g * D + group * 16, mask=here, other=0) + g * D
        # nibble j of word n, see groups.py
        n, j = word[:, None] * (4 // PLANE) + field % (4 // PLANE), field // (4 // PLANE)
        if SOURCE == KEYS_IN_GROUPS:
            slot = 8 * (2 * n + j // 4) + lane[:, None] // 4
            inner = 2 * (lane[:, None] % 4) + j % 2 + 8 * (j // 2 % 2)
        else:
            slot, inner = 16 * (lane[:, None] % 4) + n % 2 * 8 + j, 8 * (n // 2) + lane[:, None] // 4
    bits = tl.load(width + first_channel, mask=here, other=0)
    shift = bits & (16 - 2 * PLANE)
    at = words + tl.load(offset + first_channel, mask=here, other=0)
    if SOURCE == CHANNEL_ORDER:
        at += word // PLANE * bits + shift + word % PLANE
    else:
        at += 32 * shift + lane * PLANE + word
    present = here & ((bits & PLANE) != 0)
    token = block_token + slot
    new = present[:, None] & (token >= low) & (token < high)
    if SOURCE == CHANNEL_ORDER:
        own = channel[:, None]
    else:
        own = tl.load(channel_at + g * D + group[:, None] * 16 + inner, mask=new, other=0)
    code = tl.load(codes + (row0 + token) * C + g * D + own, mask=new, other=0).to(tl.int32) & 255
    fields = tl.sum(((code >> shift[:, None]) & ((1 << PLANE) - 1)) << (PLANE * field), 1)
    kept = tl.sum(tl.where(token < low, (1 << PLANE) - 1, 0) << (PLANE * field), 1)
    tl.store(at, (tl.load(at, mask=present, other=0) & kept) | fields, mask=present)
