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


@triton.jit(do_not_specialize=["shift", "row0", "first_block", "blocks", "room", "at"])
def unpack_kernel(
    words,  # [B, blocks, W] int32
    scales,  # [B, blocks * 64, 2] fp16
    levels,  # the quantizer's tables (tables.py), as are the next seven
    scale,
    zero,
    width,
    offset,
    first_level,
    slot,
    channel_at,
    index,  # outliers (streams.py), as are the next three
    value,
    starts,
    ends,
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
    G: tl.constexpr,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    HEADS: tl.constexpr,  # of a program; a divisor of G
    PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    SOURCE: tl.constexpr,
    PERMUTED: tl.constexpr,  # whether groups have channels in another order than their own
    PLANES: tl.constexpr,  # the union of all widths' binary digits
    WIDTH: tl.constexpr,  # of all groups; 0 if they have several
    DYNAMIC: tl.constexpr,
    OUTLIERS: tl.constexpr,
    ROTATED: tl.constexpr,  # keys are, values are not
    ENTRIES: tl.constexpr,
):
    """Block `first_block + i` of every sequence and head, i the program's number; finite numbers where no token is."""
    row, part = tl.program_id(1) // (G // HEADS), tl.program_id(1) % (G // HEADS)
    b = (row0 + row).to(tl.int64)
    block = first_block + tl.program_id(0)
    base = tl.load(origins + b) + shift + block * 64
    held = tl.minimum(tl.maximum(tl.load(limits + b) - base, 0), 64).to(tl.int32)
    token, pair, channel = tl.arange(0, 64), tl.arange(0, PAIRS), tl.arange(0, CHANNELS)
    first, second = pair, pair + D // 2
    if 2 * ROTARY_HALF != D:  # else the compiler would not see neighbours as such
        first, second = first_of_pair(pair, ROTARY_HALF, D // 2), second_of_pair(pair, ROTARY_HALF, D // 2)
    pair_ok, channel_ok = pair < D // 2, channel < D
    words += (b * blocks + block) * block_words
    scales += (b * blocks + block) * 128
    result += (row.to(tl.int64) * room + at + tl.program_id(0) * 64) * (G * PITCH)
    ELEMENT: tl.constexpr = result.dtype.element_ty
    if ROTATED:
        high, low = steps_of(steps, pair, pair_ok)
        base_cos, base_sin = cos_sin(base, high, low)
        turn_at, ok = turn + token[:, None] * (D // 2) + pair[None, :], pair_ok[None, :]
        turn_cos, turn_sin = tl.load(turn_at, mask=ok, other=0), tl.load(turn_at + D * 32, mask=ok, other=0)
        cos = base_cos[None, :] * turn_cos - base_sin[None, :] * turn_sin
        sin = base_sin[None, :] * turn_cos + base_cos[None, :] * turn_sin

    for g in range(part * HEADS, (part + 1) * HEADS):
        at_head = g * D
        tables = (
            levels,
            scale + at_head,
            zero + at_head,
            width + at_head,
            offset + at_head,
            first_level + at_head,
            slot + at_head,
            channel_at + at_head,
        )
        source, own = (words, scales, tables), result + g * PITCH
        to = own + token[:, None] * (G * PITCH)
        if OUTLIERS:  # the first ones are on their way while the codes are unpacked
            begin, end = outlier_list(starts, ends, b * G + g, block, blocks, held)
            number, exact = outliers_from(index, value, begin, end, ENTRIES)
        if ROTATED:
            a = decoded(source, g, first, pair_ok, 0, held, SOURCE, PERMUTED, PLANES, WIDTH, DYNAMIC, D, PAIRS)
            b_half = decoded(source, g, second, pair_ok, 1, held, SOURCE, PERMUTED, PLANES, WIDTH, DYNAMIC, D, PAIRS)
            if OUTLIERS:
                tl.store(to + first[None, :], a.to(ELEMENT), mask=ok)
                tl.store(to + second[None, :], b_half.to(ELEMENT), mask=ok)
                tl.debug_barrier()
                put_outliers(own, index, value, number, exact, begin, end, held, G * PITCH, D, ENTRIES)
                tl.debug_barrier()
                a = tl.load(to + first[None, :], mask=ok, other=0).to(tl.float32)
                b_half = tl.load(to + second[None, :], mask=ok, other=0).to(tl.float32)
                tl.debug_barrier()
            tl.store(to + first[None, :], (a * cos - b_half * sin).to(ELEMENT), mask=ok)
            tl.store(to + second[None, :], (b_half * cos + a * sin).to(ELEMENT), mask=ok)
        else:
            tile = decoded(
                source, g, channel, channel_ok, 0, held, SOURCE, PERMUTED, PLANES, WIDTH, DYNAMIC, D, CHANNELS
            )
            tl.store(to + channel[None, :], tile.to(ELEMENT), mask=channel_ok[None, :])
            if OUTLIERS:
                tl.debug_barrier()
                put_outliers(own, index, value, number, exact, begin, end, held, G * PITCH, D, ENTRIES)


@triton.jit
def decoded(
    source,
    g,
    channel,  # [N]
    ok,
    second,  # of keys: whether these are second halves of pairs
    held,
    SOURCE: tl.constexpr,
    PERMUTED: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
    DYNAMIC: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """What the codes of some channels of a head stand for, `[64, N]` fp32; some finite numbers where no token is."""
    words, scales, tables = source
    levels, scale, zero, width, offset, first_level, slot, _ = tables
    if SOURCE == CHANNEL_ORDER:
        bits, start = tl.load(width + channel, mask=ok, other=0), tl.load(offset + channel, mask=ok, other=0)
        codes = channel_codes(words, start, bits, ok, PLANES, N)
        tile = tl.trans(tl.load(levels + tl.load(first_level + channel, mask=ok, other=0)[:, None] + codes))
    else:
        KEYS: tl.constexpr = SOURCE == KEYS_IN_GROUPS
        tile = group_levels(words, tables, g, second, PLANES, WIDTH, KEYS, D, N)
        if PERMUTED:
            place = tl.load(slot + channel, mask=ok, other=0)
            if KEYS:
                place = place // 32 * 16 + place % 16
            tile = tl.gather(tile, tl.broadcast_to(place[None, :], [64, N]), 1)
    if DYNAMIC:
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
    levels, _, _, width, offset, first_level, _, channel_at = tables
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
    if PLANES & 4:
        codes |= group_plane(at, bits, row % 32, 4, 2 * N)
    if PLANES & 2:
        codes |= group_plane(at, bits, row % 32, 2, 2 * N)
    if PLANES & 1:
        codes |= group_plane(at, bits, row % 32, 1, 2 * N)
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
def outlier_list(starts, ends, stream, block, blocks, held):
    """(begin, end) of a block's outliers among the entries; none if nothing of it is held."""
    if block > 0:  # noqa: SIM108  (the device language evaluates both sides of a conditional expression)
        begin = tl.load(ends + stream * blocks + block - 1)
    else:
        begin = tl.load(starts + stream)
    return begin, tl.where(held > 0, tl.load(ends + stream * blocks + block), begin)


@triton.jit
def outliers_from(index, value, begin, end, ENTRIES: tl.constexpr):
    """(number in the block's span, value) of up to ENTRIES outliers."""
    entry = begin + tl.arange(0, ENTRIES)
    number = tl.load(index + entry, mask=entry < end, other=0).to(tl.int32) & 0xFFFF
    return number, tl.load(value + entry, mask=entry < end, other=0)


@triton.jit
def put_outliers(
    own, index, value, number, exact, begin, end, held, TOKEN: tl.constexpr, D: tl.constexpr, ENTRIES: tl.constexpr
):
    """Write a block's outliers, the first ones given, over its elements, TOKEN apart from token to token; none from token `held` on."""
    for entry0 in range(begin, end, ENTRIES):
        if entry0 > begin:
            number, exact = outliers_from(index, value, entry0, end, ENTRIES)
        token, ok = number // D % 64, entry0 + tl.arange(0, ENTRIES) < end
        tl.store(own + token * TOKEN + number % D, exact.to(own.dtype.element_ty), mask=ok & (token < held))
