"""Codes into words, and outliers behind those of their stream: what the append kernels know of the layout.

A block's worth of codes is written word by word, tokens that were there before being kept.
"""

import triton
import triton.language as tl


@triton.jit
def group_fields(lane, word, field, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """(token of the block, channel of the group) of the fields of a plane's words, see groups.py."""
    each: tl.constexpr = 4 // PLANE
    n, j = word * each + field % each, field // each
    if KEYS:
        token, channel = 8 * (2 * n + j // 4) + lane // 4, 2 * (lane % 4) + j % 2 + 8 * (j // 2 % 2)
    else:
        token, channel = 16 * (lane % 4) + n % 2 * 8 + j, 8 * (n // 2) + lane // 4
    return token, channel


@triton.jit
def store_group_plane(
    words,
    codes,
    tables,
    block_token,
    low,
    high,
    row0,
    g,
    PLANE: tl.constexpr,
    KEYS: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Write a plane of all groups of a head that have it."""
    width, offset, channel_at = tables
    number = tl.arange(0, N * 2 * PLANE)  # of a word of the plane: N / 16 groups of 32 lanes
    group, lane, word = number // (32 * PLANE), number // PLANE % 32, number % PLANE
    here = group * 16 < D
    first_channel = tl.load(channel_at + g * D + group * 16, mask=here, other=0) + g * D
    bits = tl.load(width + first_channel, mask=here, other=0)
    shift = bits & (16 - 2 * PLANE)
    at = words + tl.load(offset + first_channel, mask=here, other=0) + 32 * shift + lane * PLANE + word
    present = here & ((bits & PLANE) != 0)
    field = tl.arange(0, 32 // PLANE)[None, :]
    slot, inner = group_fields(lane[:, None], word[:, None], field, PLANE, KEYS)
    token = block_token + slot
    new = present[:, None] & (token >= low) & (token < high)
    channel = tl.load(channel_at + g * D + group[:, None] * 16 + inner, mask=new, other=0)
    code = tl.load(codes + (row0 + token) * C + g * D + channel, mask=new, other=0).to(tl.int32) & 255
    fields = tl.sum(((code >> shift[:, None]) & ((1 << PLANE) - 1)) << (PLANE * field), 1)
    kept = tl.sum(tl.where(token < low, (1 << PLANE) - 1, 0) << (PLANE * field), 1)
    tl.store(at, (tl.load(at, mask=present, other=0) & kept) | fields, mask=present)


@triton.jit
def store_groups(
    words,
    codes,
    tables,  # width, offset, channel: as of `Tables`
    block_token,
    low,
    high,
    row0,
    g,
    PLANES: tl.constexpr,
    KEYS: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Write a block of a head in groups: tokens `low`, ..., `high - 1` from `codes`, earlier ones kept."""
    if PLANES & 4:
        store_group_plane(words, codes, tables, block_token, low, high, row0, g, 4, KEYS, C, D, N)
    if PLANES & 2:
        store_group_plane(words, codes, tables, block_token, low, high, row0, g, 2, KEYS, C, D, N)
    if PLANES & 1:
        store_group_plane(words, codes, tables, block_token, low, high, row0, g, 1, KEYS, C, D, N)


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
    """Write a block of a head in channel order; as `store_groups`."""
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


@triton.jit
def list_begin(starts, ends, stream, block, slot, blocks):
    """Where the outliers of a block's token `slot`, and of all later ones, are to be put."""
    begin = tl.load(starts + stream)
    if block > 0:
        begin = tl.load(ends + stream * blocks + block - 1)
    if slot > 0:
        begin = tl.load(ends + stream * blocks + block)
    return begin


@triton.jit
def room_end(starts, stream, streams, places):
    """Where the room of one of `streams` streams ends; `places` are there for all of them."""
    limit = places
    if stream + 1 < streams:
        limit = tl.load(starts + stream + 1)
    return limit
