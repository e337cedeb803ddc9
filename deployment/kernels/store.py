"""Codes into words, and outliers behind those of their stream: what the append kernels know of the layout.

A block's worth of codes is written word by word (`store_groups`, `store_channels`); the codes of a single token are
bits scattered over words that hold other tokens, too, and those bits alone are flipped (`flip_groups`, `flip_channels`).
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
def group_place(token, channel, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """(word of the group's plane, its first bit) of a token of the block and a channel of the group; inverse of `group_fields`."""
    each: tl.constexpr = 4 // PLANE
    if KEYS:
        lane = token % 8 * 4 + channel % 8 // 2
        n, j = token // 16, token // 8 % 2 * 4 + channel // 8 * 2 + channel % 2
    else:
        lane = channel % 8 * 4 + token // 16
        n, j = channel // 8 * 2 + token // 8 % 2, token % 8
    return lane * PLANE + n // each, 4 * j + n % each * PLANE


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
def flip(at, fields, mask, ok):
    """Make the bits `mask` of words those of `fields`; other lanes may change other bits of a word at the same time."""
    tl.atomic_xor(at, (tl.load(at, mask=ok, other=0) ^ fields) & mask, mask=ok, sem="relaxed")


@triton.jit
def flip_group_plane(words, offset, width, inner, code, slot, ok, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """Write a plane of the codes of one token, in groups."""
    word, bit = group_place(slot, inner, PLANE, KEYS)
    shift = width & (16 - 2 * PLANE)
    mask = tl.full(code.shape, (1 << PLANE) - 1, tl.int32) << bit
    flip(words + offset + 32 * shift + word, (code >> shift) << bit, mask, ok & ((width & PLANE) != 0))


@triton.jit
def flip_groups(words, offset, width, slot_at, code, slot, lane, ok, PLANES: tl.constexpr, KEYS: tl.constexpr):
    """Write the codes of the block's token `slot`, channels `lane` of a head, in groups."""
    bits, start = tl.load(width + lane, mask=ok, other=0), tl.load(offset + lane, mask=ok, other=0)
    inner = tl.load(slot_at + lane, mask=ok, other=0) % 16
    if PLANES & 4:
        flip_group_plane(words, start, bits, inner, code, slot, ok, 4, KEYS)
    if PLANES & 2:
        flip_group_plane(words, start, bits, inner, code, slot, ok, 2, KEYS)
    if PLANES & 1:
        flip_group_plane(words, start, bits, inner, code, slot, ok, 1, KEYS)


@triton.jit
def flip_plane(words, offset, width, code, slot, ok, PLANE: tl.constexpr):
    """Write a plane of the codes of one token, in channel order."""
    CODES: tl.constexpr = 32 // PLANE
    shift, word = width & (16 - 2 * PLANE), slot // CODES
    at = words + offset + word // PLANE * width + shift + word % PLANE
    mask = tl.full(code.shape, (1 << PLANE) - 1, tl.int32)
    place = slot % CODES * PLANE
    flip(at, ((code >> shift) & mask) << place, mask << place, ok & ((width & PLANE) != 0))


@triton.jit
def flip_channels(words, offset, width, code, slot, lane, ok, PLANES: tl.constexpr):
    """As `flip_groups`, in channel order."""
    bits, start = tl.load(width + lane, mask=ok, other=0), tl.load(offset + lane, mask=ok, other=0)
    if PLANES & 8:
        flip_plane(words, start, bits, code, slot, ok, 8)
    if PLANES & 4:
        flip_plane(words, start, bits, code, slot, ok, 4)
    if PLANES & 2:
        flip_plane(words, start, bits, code, slot, ok, 2)
    if PLANES & 1:
        flip_plane(words, start, bits, code, slot, ok, 1)


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
