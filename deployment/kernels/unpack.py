"""Dequantized blocks of the context: tokens of a page as plain tensors, for attention with many queries.

Many queries read a block many times, so it pays to unpack it once. A program unpacks 64 tokens of some KV heads:

    1  words, each once, into codes in registers; levels of codes    2  channels in their own order, where their groups have another
    3  times scale plus zero    4  outliers, written over them    5  rotation, of keys only

Outliers go to wherever their index says, and the rotation mixes channels: so with outliers keys are written unrotated, and read back, after
barriers and from a cache that is near. Without outliers all stays in registers.

A token at position t = base + i, i within its block, is rotated by the angles of `base`, exact at any position, and by those
of `turn`, which are the same for every block (see `phase.py`).
"""

import triton
import triton.language as tl

from deployment.format.groups import GroupOrder
from deployment.format.order import Order
from deployment.kernels.phase import cos_sin, first_of_pair, second_of_pair, steps_of

# in which of two orders codes lie (order.py), groups of keys and of values being two
CHANNEL_ORDER = tl.constexpr(0)
IN_GROUPS = tl.constexpr(1)
KEYS_IN_GROUPS = tl.constexpr(2)


def source_of(order: Order) -> int:
    """Which of these an order is."""
    if not isinstance(order, GroupOrder):
        return CHANNEL_ORDER.value
    return (KEYS_IN_GROUPS if order.kind == "key" else IN_GROUPS).value


_ENTRIES = tl.constexpr(256)  # outliers at a time


@triton.jit(do_not_specialize=["shift", "row0", "first_block", "blocks", "room", "at"])
def unpack_kernel(
    page,  # tensors of a page (unpacking.py)
    origins,  # [B] int64, plus shift: position of the page's first token
    shift,
    limits,  # [B] int64, positions from here on are not stored
    steps,  # [D/2, 2] int32, see `Rotary`
    turn,  # [2, 64, D/2] fp32
    row0,  # the first sequence
    first_block,
    blocks,  # of the page
    block_words,  # W
    room,  # tokens of the result per sequence
    at,  # where the first block goes
    result,  # [rows, room, G, PITCH] fp16 or fp32
    KIND: tl.constexpr,  # of the page (unpacking.py)
    SHAPE: tl.constexpr,  # G, D, half of the channels that rotate, D / 2 and D rounded up
    PITCH: tl.constexpr,
    HEADS: tl.constexpr,  # of a program; a divisor of G
    ROTATED: tl.constexpr,  # keys are, values are not
):
    """Block `first_block + i` of every sequence and head, i the program's number; finite numbers where no token is."""
    G: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[1]
    CHANNELS: tl.constexpr = SHAPE[4]
    row, part = tl.program_id(1) // (G // HEADS), tl.program_id(1) % (G // HEADS)
    b = (row0 + row).to(tl.int64)
    block = first_block + tl.program_id(0)
    base = tl.load(origins + b) + shift + block * 64
    held = tl.minimum(tl.maximum(tl.load(limits + b) - base, 0), 64).to(tl.int32)
    channel = tl.arange(0, CHANNELS)
    first, second, pair_ok = pairs_of(SHAPE)
    result += (row.to(tl.int64) * room + at + tl.program_id(0) * 64) * (G * PITCH)
    ELEMENT: tl.constexpr = result.dtype.element_ty
    to_token = tl.arange(0, 64)[:, None] * (G * PITCH)
    if ROTATED:
        cos, sin = block_angles(base, steps, turn, SHAPE)
    for g in range(part * HEADS, (part + 1) * HEADS):
        own = result + g * PITCH
        if ROTATED:
            a, c = key_halves(page, own, b, g, block, blocks, block_words, held, KIND, SHAPE, G * PITCH)
            tl.store(own + to_token + first[None, :], (a * cos - c * sin).to(ELEMENT), mask=pair_ok[None, :])
            tl.store(own + to_token + second[None, :], (c * cos + a * sin).to(ELEMENT), mask=pair_ok[None, :])
        else:
            tile = decoded(page, b, g, block, blocks, block_words, channel, channel < D, 0, held, KIND, SHAPE, CHANNELS)
            tl.store(own + to_token + channel[None, :], tile.to(ELEMENT), mask=(channel < D)[None, :])
            if KIND[5]:
                put_outliers(page, own, b * G + g, block, blocks, held, G * PITCH, D)


@triton.jit
def pairs_of(SHAPE: tl.constexpr):
    """(first channels, second channels, which there are) of rotary pairs."""
    D: tl.constexpr = SHAPE[1]
    ROTARY_HALF: tl.constexpr = SHAPE[2]
    PAIRS: tl.constexpr = SHAPE[3]
    pair = tl.arange(0, PAIRS)
    return first_of_pair(pair, ROTARY_HALF, D // 2), second_of_pair(pair, ROTARY_HALF, D // 2), pair < D // 2


@triton.jit
def block_angles(base, steps, turn, SHAPE: tl.constexpr):
    """(cos, sin) `[64, pairs]` fp32 of the positions from `base` on."""
    D: tl.constexpr = SHAPE[1]
    PAIRS: tl.constexpr = SHAPE[3]
    token, pair = tl.arange(0, 64), tl.arange(0, PAIRS)
    ok = pair < D // 2
    high, low = steps_of(steps, pair, ok)
    base_cos, base_sin = cos_sin(base, high, low)
    at = turn + token[:, None] * (D // 2) + pair[None, :]
    cos, sin = tl.load(at, mask=ok[None, :], other=0), tl.load(at + D * 32, mask=ok[None, :], other=0)
    return base_cos[None, :] * cos - base_sin[None, :] * sin, base_sin[None, :] * cos + base_cos[None, :] * sin


@triton.jit
def key_halves(
    page, own, b, g, block, blocks, block_words, held, KIND: tl.constexpr, SHAPE: tl.constexpr, TOKEN: tl.constexpr
):
    """First and second halves of a head's pairs, `[64, pairs]` fp32, not rotated; through `own`, TOKEN apart from token to token, if there are outliers."""
    G: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[1]
    PAIRS: tl.constexpr = SHAPE[3]
    first, second, ok = pairs_of(SHAPE)
    a = decoded(page, b, g, block, blocks, block_words, first, ok, 0, held, KIND, SHAPE, PAIRS)
    c = decoded(page, b, g, block, blocks, block_words, second, ok, 1, held, KIND, SHAPE, PAIRS)
    if KIND[5]:
        to = own + tl.arange(0, 64)[:, None] * TOKEN
        tl.store(to + first[None, :], a.to(own.dtype.element_ty), mask=ok[None, :])
        tl.store(to + second[None, :], c.to(own.dtype.element_ty), mask=ok[None, :])
        put_outliers(page, own, b * G + g, block, blocks, held, TOKEN, D)
        tl.debug_barrier()
        a = tl.load(to + first[None, :], mask=ok[None, :], other=0).to(tl.float32)
        c = tl.load(to + second[None, :], mask=ok[None, :], other=0).to(tl.float32)
        tl.debug_barrier()
    return a, c


@triton.jit
def decoded(
    page,
    b,
    g,
    block,
    blocks,
    block_words,
    channel,  # [N]
    ok,
    second,  # of keys: whether these are second halves of pairs
    held,
    KIND: tl.constexpr,
    SHAPE: tl.constexpr,
    N: tl.constexpr,
):
    """What the codes of some channels of a head stand for, `[64, N]` fp32; some finite numbers where no token is."""
    SOURCE: tl.constexpr = KIND[0]
    D: tl.constexpr = SHAPE[1]
    PLANES: tl.constexpr = KIND[2]
    WIDTH: tl.constexpr = KIND[3]
    number = b * blocks + block
    words, scales, levels = page[0] + number * block_words, page[1] + number * 128, page[2]
    scale, zero, width = page[3] + g * D, page[4] + g * D, page[5] + g * D
    offset, first_level = page[6] + g * D, page[7] + g * D
    if SOURCE == CHANNEL_ORDER:
        bits, start = tl.load(width + channel, mask=ok, other=0), tl.load(offset + channel, mask=ok, other=0)
        codes = tl.zeros([N, 64], tl.int32)
        for digit in tl.static_range(4):
            if PLANES & (8 >> digit):
                codes |= channel_plane(words, start, bits, ok, 8 >> digit, N)
        tile = tl.trans(tl.load(levels + tl.load(first_level + channel, mask=ok, other=0)[:, None] + codes))
    else:
        KEYS: tl.constexpr = SOURCE == KEYS_IN_GROUPS
        tables = (levels, width, offset, first_level, page[9] + g * D)
        tile = group_levels(words, tables, g, second, PLANES, WIDTH, KEYS, D, N)
        if KIND[1]:
            place = tl.load(page[8] + g * D + channel, mask=ok, other=0)
            if KEYS:
                place = place // 32 * 16 + place % 16
            tile = tl.gather(tile, tl.broadcast_to(place[None, :], [64, N]), 1)
    if KIND[4]:
        token = tl.arange(0, 64)
        s = tl.load(scales + token * 2, mask=token < held, other=0).to(tl.float32)
        z = tl.load(scales + token * 2 + 1, mask=token < held, other=0).to(tl.float32)
        tile = tile * s[:, None] + z[:, None]
    else:
        s, z = tl.load(scale + channel, mask=ok, other=0), tl.load(zero + channel, mask=ok, other=0)
        tile = tile * s[None, :] + z[None, :]
    return tile


@triton.jit
def group_levels(
    words,
    tables,
    g,
    second,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Levels `[64, N]` fp32 of N / 16 groups, their channels one after another: of all groups, or of every second one of keys."""
    levels, width, offset, first_level, channel_at = tables
    row = tl.arange(0, 2 * N)  # 32 lanes of every group
    group = row // 32
    if KEYS:
        group = 2 * group + second
    if WIDTH:
        group = tl.minimum(group, D // 16 - 1)
        bits = tl.full([2 * N], WIDTH, tl.int32)
        at = words + (g * (D // 16) + group) * (32 * WIDTH)
        levels += tl.load(first_level)
    else:  # a group's tables are those of any of its channels
        ok = group * 16 < D
        channel = tl.load(channel_at + group * 16, mask=ok, other=0)
        bits = tl.load(width + channel, mask=ok, other=0)
        at = words + tl.load(offset + channel, mask=ok, other=0)
        levels += tl.load(first_level + channel, mask=ok, other=0)[:, None, None]
    codes = tl.zeros([2 * N, 4, 8], tl.int32)  # in the order of nibbles
    for digit in tl.static_range(3):
        if PLANES & (4 >> digit):
            codes |= group_plane(at, bits, row % 32, 4 >> digit, 2 * N)
    held = tl.load(levels + codes)
    if KEYS:  # nibble j of word n of lane 4 r + c: token 16 n + 8 (j / 4) + r, channel 8 (j / 2 % 2) + 2 c + j % 2
        tile = tl.permute(tl.reshape(held, [N // 16, 8, 4, 4, 2, 2, 2]), [3, 4, 1, 0, 5, 2, 6])
    else:  # token 16 c + 8 (n % 2) + j, channel 8 (n / 2) + r
        tile = tl.permute(tl.reshape(held, [N // 16, 8, 4, 2, 2, 8]), [2, 4, 5, 0, 3, 1])
    return tl.reshape(tile, [64, N])


@triton.jit
def group_plane(at, bits, lane, PLANE: tl.constexpr, ROWS: tl.constexpr):
    """The bits that a plane holds of the codes of lanes, `[ROWS, 4, 8]` int32, in their place; 0 for groups without it."""
    EACH: tl.constexpr = 4 // PLANE  # codes in a nibble
    shift = bits & (16 - 2 * PLANE)
    word = (at + 32 * shift + lane * PLANE)[:, None] + tl.arange(0, PLANE)[None, :]
    held = tl.load(word, mask=((bits & PLANE) != 0)[:, None], other=0)
    place = PLANE * tl.arange(0, EACH)[:, None] + 4 * tl.arange(0, 8)[None, :]
    fields = (held[:, :, None, None] >> place[None, None, :, :]) & ((1 << PLANE) - 1)
    return tl.reshape(fields, [ROWS, 4, 8]) << shift[:, None, None]


@triton.jit
def channel_plane(words, offset, width, ok, PLANE: tl.constexpr, N: tl.constexpr):
    """The bits of `[N, 64]` codes that a plane of PLANE bits holds, in their place; 0 for channels without it. `offset`, `width`, `ok`: `[N]`."""
    # the planes before this one are as many bits of the code as words of a group of 32 codes
    shift = width & (16 - 2 * PLANE)
    word = tl.arange(0, 2 * PLANE)[None, :]
    at = words + offset[:, None] + word // PLANE * width[:, None] + shift[:, None] + word % PLANE
    held = tl.load(at, mask=(ok & ((width & PLANE) != 0))[:, None], other=0)
    fields = held[:, :, None] >> (tl.arange(0, 32 // PLANE) * PLANE)[None, None, :]
    return tl.reshape(fields & ((1 << PLANE) - 1), [N, 64]) << shift[:, None]


@triton.jit
def put_outliers(page, own, stream, block, blocks, held, TOKEN: tl.constexpr, D: tl.constexpr):
    """Write a block's outliers over its elements, TOKEN apart from token to token; none from token `held` on."""
    begin = tl.load(page[12] + stream)
    if block > 0:
        begin = tl.load(page[13] + stream * blocks + block - 1)
    end = tl.where(held > 0, tl.load(page[13] + stream * blocks + block), begin)
    tl.debug_barrier()  # the elements have been written
    for first in range(begin, end, _ENTRIES):
        entry = first + tl.arange(0, _ENTRIES)
        number = tl.load(page[10] + entry, mask=entry < end, other=0).to(tl.int32) & 0xFFFF
        exact = tl.load(page[11] + entry, mask=entry < end, other=0).to(own.dtype.element_ty)
        token = number // D % 64
        tl.store(own + token * TOKEN + number % D, exact, mask=(entry < end) & (token < held))
