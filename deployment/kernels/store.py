"""Codes into words, and outliers behind those of their stream: what the append kernels know of the layout.

A block's worth of codes is written word by word (`store_fragments`, `store_channels`); the codes of a single token are
bits scattered over words that hold other tokens, too, and those bits alone are flipped (`flip_fragments`, `flip_channels`).
"""

import triton
import triton.language as tl


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


@triton.jit
def flip(at, fields, mask, ok):
    """Make the bits `mask` of words those of `fields`; other lanes may change other bits of a word at the same time."""
    tl.atomic_xor(at, (tl.load(at, mask=ok, other=0) ^ fields) & mask, mask=ok, sem="relaxed")


@triton.jit
def flip_fragments(words, place, code, slot, lane, ok, BITS: tl.constexpr, D: tl.constexpr):
    """Write the codes of the block's token `slot`, channels `lane` of a head, in fragment order.

    place: `[64, D]`, where an element comes: unit * codes of a unit + number within the unit.
    """
    CODES: tl.constexpr = 32 if BITS == 3 else 32 // BITS
    at = tl.load(place + slot * D + lane, mask=ok, other=0)
    unit, j = at // CODES, at % CODES
    for word in tl.static_range(3 if BITS == 3 else 1):
        mask = word_bits(tl.full(code.shape, (1 << BITS) - 1, tl.int32), j, BITS, word)
        flip(words + word * (64 * D // CODES) + unit, word_bits(code, j, BITS, word), mask, ok & (mask != 0))


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
    """As `flip_fragments`, in channel order."""
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
