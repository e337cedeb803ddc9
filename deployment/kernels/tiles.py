"""From the words of a block to tiles of numbers: what the attention kernels know of the layout.

Every function here is called within a kernel. A tile of keys is a pair of `[D/2, 64]` tiles, the first and the second halves
of the rotary pairs; a tile of values is `[64, D]`. Two orders of codes exist (`deployment/order.py`), and a third
source of tiles is a plain tensor: sinks, or the chunk that is being read.
"""

import triton
import triton.language as tl

from deployment.kernels.lookup import SHARED, unit_levels
from deployment.kernels.pairs import quad_levels

CHANNEL_ORDER = tl.constexpr(0)
FRAGMENT_ORDER = tl.constexpr(1)
DENSE = tl.constexpr(2)


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
def block_words(at, BITS: tl.constexpr, GEOMETRY: tl.constexpr):
    """Words of a head's block in fragment order, `[units / (8 VECTOR), 8 VECTOR]` int32; three such tiles at 3 bits."""
    ROW: tl.constexpr = 8 * GEOMETRY[5]
    UNITS: tl.constexpr = GEOMETRY[3] * GEOMETRY[4] * GEOMETRY[6] * 32
    word = at + tl.arange(0, UNITS // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    first = tl.load(word, eviction_policy="evict_first")
    second, third = first, first
    if BITS == 3:
        second = tl.load(word + UNITS, eviction_policy="evict_first")
        third = tl.load(word + 2 * UNITS, eviction_policy="evict_first")
    return first, second, third


@triton.jit
def units(first, second, third, table, BITS: tl.constexpr, FAST: tl.constexpr):
    """What `unit_levels` finds for whole units of `block_words`, codes of a unit along the last axis."""
    PER_WORD: tl.constexpr = 4 if FAST else 8
    if BITS == 2 and FAST == SHARED:
        a, b, c, d, e, f, g, h = quad_levels(first, table[0])
        # pairs 0 to 3 are of the low halves, then those of the high ones
        even, odd = tl.join(tl.join(a, b), tl.join(e, f)), tl.join(tl.join(c, d), tl.join(g, h))
        levels = tl.join(even, odd)  # [..., high, second of two, odd]
        levels = tl.reshape(levels, [first.shape[0], first.shape[1], 2 * PER_WORD])
    elif BITS == 3:
        spare = ((first >> 3) & 0x11111111) | ((second >> 2) & 0x22222222) | ((third >> 1) & 0x44444444)
        if FAST != SHARED:  # whose table does not look at the spare bits
            first, second, third = first & 0x77777777, second & 0x77777777, third & 0x77777777
        a = unit_levels(first, table, BITS, FAST)
        b = unit_levels(second, table, BITS, FAST)
        c = unit_levels(third, table, BITS, FAST)
        quarters = tl.join(tl.join(a, c), tl.join(b, unit_levels(spare, table, BITS, FAST)))
        levels = tl.reshape(tl.permute(quarters, (0, 1, 3, 4, 2)), [first.shape[0], first.shape[1], 4 * PER_WORD])
    elif BITS == 4:
        levels = unit_levels(first, table, BITS, FAST)
    else:
        low = unit_levels(first & 0x33333333, table, BITS, FAST)
        high = unit_levels((first >> 2) & 0x33333333, table, BITS, FAST)
        levels = tl.reshape(
            tl.permute(tl.join(low, high), (0, 1, 3, 2)), [first.shape[0], first.shape[1], 2 * PER_WORD]
        )
    return levels


@triton.jit
def arrange(units, GEOMETRY: tl.constexpr, FAST: tl.constexpr, WIDE: tl.constexpr = False):
    """`[k, n, halves]` of what units hold; no element leaves its lane (see `Fragment.index`).

    Of pairs (FAST) it is `[k / 2, n, halves]`. WIDE: with k in the order of `column_of` (operands.py).
    """
    HALVES: tl.constexpr = GEOMETRY[0]
    SLOTS_N: tl.constexpr = GEOMETRY[1]
    SLOTS_K: tl.constexpr = GEOMETRY[2]
    TILES_N: tl.constexpr = GEOMETRY[3]
    TILES_K: tl.constexpr = GEOMETRY[4]
    VECTOR: tl.constexpr = GEOMETRY[5]
    WARPS: tl.constexpr = GEOMETRY[6]
    REPEATS: tl.constexpr = TILES_N * TILES_K // VECTOR
    PAIR: tl.constexpr = 1 if FAST else 2
    lanes = tl.reshape(units, (REPEATS, WARPS, 4, 2, 4, VECTOR, HALVES, SLOTS_N, SLOTS_K, PAIR))
    in_order = tl.permute(lanes, (0, 5, 1, 2, 3, 4, 6, 7, 8, 9))
    tiled = tl.reshape(in_order, (TILES_N, TILES_K, WARPS, 4, 2, 4, HALVES, SLOTS_N, SLOTS_K, PAIR))
    ordered = tl.permute(tiled, (1, 8, 5, 9, 0, 7, 2, 3, 4, 6))
    if WIDE:
        EIGHTS: tl.constexpr = TILES_K * SLOTS_K
        steps = tl.reshape(ordered, (EIGHTS // 4, 2, 2, 4, PAIR, TILES_N * SLOTS_N * WARPS * 8, HALVES))
        ordered = tl.permute(steps, (0, 2, 3, 1, 4, 5, 6))
    return tl.reshape(ordered, (TILES_K * SLOTS_K * 4 * PAIR, TILES_N * SLOTS_N * WARPS * 8, HALVES))


@triton.jit
def channel_levels(words, levels, width, offset, first_level, channel, ok, PLANES: tl.constexpr, N: tl.constexpr):
    """Levels `[N, 64]` of channels in channel order."""
    bits = tl.load(width + channel, mask=ok, other=0)
    start = tl.load(offset + channel, mask=ok, other=0)
    base = tl.load(first_level + channel, mask=ok, other=0)
    return tl.load(levels + base[:, None] + channel_codes(words, start, bits, ok, PLANES, N))
