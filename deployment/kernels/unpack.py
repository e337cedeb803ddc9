"""Dequantized stretches of the context: some blocks of a segment as plain tensors, for attention with many queries.

Many queries read a block many times, so it pays to unpack it once. A program unpacks 64 tokens of a KV head:

    1  levels of the codes, times scale plus zero    2  outliers, written over them    3  rotation, of keys only

Outliers go to wherever their index says, and the rotation mixes channels: so with outliers step 1 writes keys unrotated, and
step 3 reads them back, after barriers and from a cache that is near. Without outliers all stays in registers.

A token at position t = base + i, i within its block, is rotated by the angles of `base`, exact at any position, and by those
of `turn`, which are the same for every block (see `phase.py`).
"""

import triton
import triton.language as tl

from deployment.kernels.phase import cos_sin, first_of_pair, second_of_pair, steps_of
from deployment.kernels.store import group_place
from deployment.order import GroupOrder, Order

# where tokens come from: a plain tensor, or codes in one of two orders (order.py), groups of keys and of values being two
DENSE = tl.constexpr(-1)
CHANNEL_ORDER = tl.constexpr(0)
IN_GROUPS = tl.constexpr(1)
KEYS_IN_GROUPS = tl.constexpr(2)


def source_of(order: Order) -> int:
    """Which of these an order is."""
    if not isinstance(order, GroupOrder):
        return CHANNEL_ORDER.value
    return (KEYS_IN_GROUPS if order.role == "key" else IN_GROUPS).value


@triton.jit(do_not_specialize=["shift", "tokens", "first_block", "segment_blocks", "blocks", "room"])
def unpack_kernel(
    words,  # [B, blocks, W] int32
    scales,  # [B, blocks * 64, 2] fp16
    levels,  # the quantizer's tables (tables.py), as are the next six
    scale,
    zero,
    width,
    offset,
    first_level,
    slot,
    index,  # outliers (streams.py), as are the next three
    value,
    starts,
    ends,
    dense,  # [B, G, tokens, D]
    dense_stride_b,
    dense_stride_g,
    dense_stride_t,
    origins,  # [B] int64, plus shift: position of the segment's first token
    shift,
    limits,  # [B] int64, positions from here on are not stored
    bases,  # [B, segment's blocks, 2, D/2] fp32, see `bases_kernel`
    turn,  # [2, 64, D/2] fp32
    tokens,  # of the segment
    first_block,  # of the stretch
    segment_blocks,
    blocks,  # of the page; of a plain tensor unused
    block_words,  # W
    room,  # tokens of the result per head
    result,  # [B, G, room, D] fp16 or fp32
    G: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    SOURCE: tl.constexpr,
    PLANES: tl.constexpr,  # the union of all widths' binary digits
    DYNAMIC: tl.constexpr,
    OUTLIERS: tl.constexpr,
    LIMITED: tl.constexpr,
    ROTATED: tl.constexpr,  # keys are, values are not
    ENTRIES: tl.constexpr,
):
    """Block `first_block + i` of every sequence and head, i the program's number; finite numbers where no token is."""
    stream = tl.program_id(1).to(tl.int64)
    b, g = stream // G, (stream % G).to(tl.int32)
    block = first_block + tl.program_id(0)
    base = tl.load(origins + b) + shift + block * 64
    held = tokens - block * 64
    if LIMITED:
        held = tl.minimum(tl.maximum(tl.load(limits + b) - base, 0), held).to(tl.int32)
    if held <= 0:  # of this block nothing is stored
        return
    token, pair, channel = tl.arange(0, 64), tl.arange(0, PAIRS), tl.arange(0, CHANNELS)
    token_ok = (token < held) & (base + token >= 0)
    first, second = pair, pair + D // 2
    if 2 * ROTARY_HALF != D:  # else the compiler would not see neighbours as such
        first, second = first_of_pair(pair, ROTARY_HALF, D // 2), second_of_pair(pair, ROTARY_HALF, D // 2)
    pair_ok, channel_ok = pair < D // 2, channel < D

    # what belongs to this sequence, head and block
    words += (b * blocks + block) * block_words
    scales += (b * blocks + block) * 128
    dense += b * dense_stride_b + g.to(tl.int64) * dense_stride_g + (block * 64).to(tl.int64) * dense_stride_t
    tables = (levels, scale + g * D, zero + g * D, width + g * D, offset + g * D, first_level + g * D, slot + g * D)
    source = (words, scales, tables, dense, dense_stride_t)
    outliers = (index, value, starts, ends)
    result += (stream * room + tl.program_id(0) * 64) * D
    to = result + token[:, None] * D
    ELEMENT: tl.constexpr = result.dtype.element_ty

    if ROTATED:
        a = raw_tile(source, token, first, token_ok, pair_ok, SOURCE, PLANES, PAIRS)
        b_half = raw_tile(source, token, second, token_ok, pair_ok, SOURCE, PLANES, PAIRS)
        if SOURCE != DENSE:
            a = decoded(a, source, token, first, token_ok, pair_ok, DYNAMIC)
            b_half = decoded(b_half, source, token, second, token_ok, pair_ok, DYNAMIC)
        ok = pair_ok[None, :]
        if OUTLIERS:
            tl.store(to + first[None, :], a.to(ELEMENT), mask=ok)
            tl.store(to + second[None, :], b_half.to(ELEMENT), mask=ok)
            tl.debug_barrier()
            put_outliers(result, outliers, stream, block, blocks, held, D, ENTRIES)
            tl.debug_barrier()
            a = tl.load(to + first[None, :], mask=ok, other=0)
            b_half = tl.load(to + second[None, :], mask=ok, other=0)
            tl.debug_barrier()
        base_at = bases + (b * segment_blocks + block) * D + pair
        base_cos = tl.load(base_at, mask=pair_ok, other=0)[None, :]
        base_sin = tl.load(base_at + D // 2, mask=pair_ok, other=0)[None, :]
        turn_at = turn + token[:, None] * (D // 2) + pair[None, :]
        turn_cos, turn_sin = tl.load(turn_at, mask=ok, other=0), tl.load(turn_at + D * 32, mask=ok, other=0)
        cos, sin = base_cos * turn_cos - base_sin * turn_sin, base_sin * turn_cos + base_cos * turn_sin
        a, b_half = a.to(tl.float32), b_half.to(tl.float32)
        tl.store(to + first[None, :], (a * cos - b_half * sin).to(ELEMENT), mask=ok)
        tl.store(to + second[None, :], (b_half * cos + a * sin).to(ELEMENT), mask=ok)
    else:
        tile = raw_tile(source, token, channel, token_ok, channel_ok, SOURCE, PLANES, CHANNELS)
        if SOURCE != DENSE:
            tile = decoded(tile, source, token, channel, token_ok, channel_ok, DYNAMIC)
        tl.store(to + channel[None, :], tile.to(ELEMENT), mask=channel_ok[None, :])
        if OUTLIERS:
            tl.debug_barrier()
            put_outliers(result, outliers, stream, block, blocks, held, D, ENTRIES)


@triton.jit
def raw_tile(source, token, channel, token_ok, channel_ok, SOURCE: tl.constexpr, PLANES: tl.constexpr, N: tl.constexpr):
    """`[64, N]` fp32 of channels: elements of a plain tensor, zeros where no token is; or levels of codes."""
    words, _, tables, dense, dense_stride = source
    if SOURCE == DENSE:
        at = dense + token[:, None] * dense_stride + channel[None, :]
        tile = tl.load(at, mask=token_ok[:, None] & channel_ok[None, :], other=0).to(tl.float32)
    else:
        levels, _, _, width, offset, first_level, slot = tables
        bits = tl.load(width + channel, mask=channel_ok, other=0)
        start = tl.load(offset + channel, mask=channel_ok, other=0)
        base = tl.load(first_level + channel, mask=channel_ok, other=0)[None, :]
        if SOURCE == CHANNEL_ORDER:
            codes = tl.trans(channel_codes(words, start, bits, channel_ok, PLANES, N))
        else:
            inner = tl.load(slot + channel, mask=channel_ok, other=0) % 16
            codes = group_codes(words, start, bits, token, inner, PLANES, SOURCE == KEYS_IN_GROUPS, N)
        tile = tl.load(levels + base + codes, mask=channel_ok[None, :], other=0)
    return tile


@triton.jit
def group_codes(words, offset, width, token, inner, PLANES: tl.constexpr, KEYS: tl.constexpr, N: tl.constexpr):
    """Codes `[64, N]` int32 of channels `inner` of their groups; words, offset and width as below."""
    codes = tl.zeros([64, N], tl.int32)
    if PLANES & 4:
        codes |= group_plane(words, offset, width, token, inner, 4, KEYS)
    if PLANES & 2:
        codes |= group_plane(words, offset, width, token, inner, 2, KEYS)
    if PLANES & 1:
        codes |= group_plane(words, offset, width, token, inner, 1, KEYS)
    return codes


@triton.jit
def group_plane(words, offset, width, token, inner, PLANE: tl.constexpr, KEYS: tl.constexpr):
    """The bits of these codes that a plane holds, in their place."""
    shift = (width & (16 - 2 * PLANE))[None, :]
    word, bit = group_place(token[:, None], inner[None, :], PLANE, KEYS)
    held = tl.load(words + offset[None, :] + 32 * shift + word, mask=((width & PLANE) != 0)[None, :], other=0)
    return ((held >> bit) & ((1 << PLANE) - 1)) << shift


@triton.jit
def channel_codes(words, offset, width, ok, PLANES: tl.constexpr, N: tl.constexpr):
    """Codes `[N, 64]` int32 of N channels in channel order.

    words: pointer to the block's words. offset, width, ok: `[N]`. PLANES: the union of all widths' binary digits.
    """
    codes = tl.zeros([N, 64], tl.int32)
    if PLANES & 8:
        codes |= channel_plane(words, offset, width, ok, 8, N)
    if PLANES & 4:
        codes |= channel_plane(words, offset, width, ok, 4, N)
    if PLANES & 2:
        codes |= channel_plane(words, offset, width, ok, 2, N)
    if PLANES & 1:
        codes |= channel_plane(words, offset, width, ok, 1, N)
    return codes


@triton.jit
def channel_plane(words, offset, width, ok, PLANE: tl.constexpr, N: tl.constexpr):
    """The bits of `[N, 64]` codes that a plane of PLANE bits holds, in their place; 0 for channels without it."""
    # the planes before this one are as many bits of the code as words of a group of 32 codes
    shift = width & (16 - 2 * PLANE)
    word = tl.arange(0, 2 * PLANE)[None, :]
    at = words + offset[:, None] + word // PLANE * width[:, None] + shift[:, None] + word % PLANE
    held = tl.load(at, mask=(ok & ((width & PLANE) != 0))[:, None], other=0)
    fields = held[:, :, None] >> (tl.arange(0, 32 // PLANE) * PLANE)[None, None, :]
    return tl.reshape(fields & ((1 << PLANE) - 1), [N, 64]) << shift[:, None]


@triton.jit
def decoded(tile, source, token, channel, token_ok, channel_ok, DYNAMIC: tl.constexpr):
    """What a tile `[64, N]` of levels stands for, in its dtype; some finite numbers where no token is."""
    _, scales, tables, _, _ = source
    if DYNAMIC:
        s = tl.load(scales + token * 2, mask=token_ok, other=0).to(tile.dtype)
        z = tl.load(scales + token * 2 + 1, mask=token_ok, other=0).to(tile.dtype)
        tile = tile * s[:, None] + z[:, None]
    else:
        s = tl.load(tables[1] + channel, mask=channel_ok, other=0).to(tile.dtype)
        z = tl.load(tables[2] + channel, mask=channel_ok, other=0).to(tile.dtype)
        tile = tile * s[None, :] + z[None, :]
    return tile


@triton.jit
def outlier_list(starts, ends, stream, block, blocks):
    """(begin, end) of a block's outliers among the entries."""
    if block > 0:  # noqa: SIM108  (the device language evaluates both sides of a conditional expression)
        begin = tl.load(ends + stream * blocks + block - 1)
    else:
        begin = tl.load(starts + stream)
    return begin, tl.load(ends + stream * blocks + block)


@triton.jit
def outlier_place(number, D: tl.constexpr):
    """(token within its block, channel) of an entry of `outlier_list`; see streams.py."""
    return number // D % 64, number % D


@triton.jit
def put_outliers(result, outliers, stream, block, blocks, held, D: tl.constexpr, ENTRIES: tl.constexpr):
    """Write a block's outliers over the elements of `result`, `[64, D]`; from token `held` on there are none."""
    index, value, starts, ends = outliers
    begin, end = outlier_list(starts, ends, stream, block, blocks)
    for entry0 in range(begin, end, ENTRIES):
        entry = entry0 + tl.arange(0, ENTRIES)
        ok = entry < end
        number = tl.load(index + entry, mask=ok, other=0).to(tl.int32) & 0xFFFF
        exact = tl.load(value + entry, mask=ok, other=0)
        token, channel = outlier_place(number, D)
        tl.store(result + token * D + channel, exact.to(result.dtype.element_ty), mask=ok & (token < held))


@triton.jit(do_not_specialize=["shift"])
def bases_kernel(
    origins,  # [B] int64, plus shift: position of the segment's first token
    shift,
    steps,  # [D/2, 2] int32, see `Rotary`
    result,  # [B, blocks, 2, D/2] fp32
    D: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Cos and sin at the first position of block `program_id(0)`; apart, since every head and lane would compute them anew."""
    block, b = tl.program_id(0), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    ok = pair < D // 2
    base = tl.load(origins + b) + shift + block * 64
    high, low = steps_of(steps, pair, ok)
    cos, sin = cos_sin(base, high, low)
    to = result + (b.to(tl.int64) * tl.num_programs(0) + block) * D + pair
    tl.store(to, cos, mask=ok)
    tl.store(to + D // 2, sin, mask=ok)
