"""Outliers: what the elements kept exactly add to scores and outputs.

The code of an outlier is 0, so that the tiles hold what code 0 decodes to, and the list says by how much that is wrong.
Corrections are linear in the difference: a flat loop over the chunk's list adds them, whichever element they belong to.
"""

import triton
import triton.language as tl

from deployment.kernels.phase import cos_sin_of, pair_of, phase_of, steps_of
from deployment.kernels.vectors import four_floats, two_floats
from deployment.streams import index_span

_span = triton.constexpr_function(index_span)


@triton.jit
def token_ranges(scales, token, ok):
    """(scale, zero) fp32 of tokens; both are loaded as one word."""
    return ranges_of(tl.load(scales.to(tl.pointer_type(tl.int32)) + token, mask=ok, other=0))


@triton.jit
def ranges_of(word):
    """(scale, zero) fp32 of words of both, as they are stored."""
    scale = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    zero = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def list_begin(starts, ends, stream, block, blocks):
    """Where the outlier list of a block begins."""
    if block > 0:  # noqa: SIM108  (the device language evaluates both sides of a conditional expression)
        begin = tl.load(ends + stream * blocks + block - 1)
    else:
        begin = tl.load(starts + stream)
    return begin


@triton.jit
def loaded(index, value, begin, end, ENTRIES: tl.constexpr):
    """(index, value) of ENTRIES entries from `begin` on, as they are stored; zeros from `end` on."""
    entry = begin + tl.arange(0, ENTRIES)
    return tl.load(index + entry, mask=entry < end, other=0), tl.load(value + entry, mask=entry < end, other=0)


@triton.jit
def add_outliers(
    ADD: tl.constexpr,  # `add_scores` or `add_outputs`
    to,  # its arguments but for the deltas
    entries,  # index, value, first and last of the chunk
    ahead,  # `loaded` of the chunk's first, and of those after
    coded,  # `zero_code`
    token0,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DYNAMIC: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Add what the outliers of a chunk exceed the decoded elements by, ENTRIES at a time."""
    index, value, first, end = entries
    even_place, even_exact, odd_place, odd_exact = ahead
    # entries are loaded two rounds ahead, in the place of those just used up: to hand them on from round to round would be to wait for them
    for even in range(first, end, 2 * ENTRIES):
        odd = even + ENTRIES
        deltas = outlier_deltas(even_place, even_exact, end, even, coded, token0, CHUNK, D, DYNAMIC, ENTRIES)
        even_place, even_exact = loaded(index, value, odd + ENTRIES, end, ENTRIES)
        ADD(to, deltas)
        if odd < end:
            deltas = outlier_deltas(odd_place, odd_exact, end, odd, coded, token0, CHUNK, D, DYNAMIC, ENTRIES)
            odd_place, odd_exact = loaded(index, value, odd + 2 * ENTRIES, end, ENTRIES)
            ADD(to, deltas)


@triton.jit
def add_scores(to, deltas):
    """Add some outliers of keys to the scores: the difference, rotated to its token's position, times the query.

    to: scores `[ROWS, CHUNK]` fp32; queries `[PAIRS, ROWS, 2]` fp32, rotated to their own positions; steps, see `Rotary`; position of
    the chunk's first token; ROWS, CHUNK, D, half of the channels that rotate, QUICK. deltas: as of `outlier_deltas`.
    """
    scores, queries, steps, origin = to[0], to[1], to[2], to[3]
    ROWS: tl.constexpr = to[4]
    CHUNK: tl.constexpr = to[5]
    D: tl.constexpr = to[6]
    ROTARY_HALF: tl.constexpr = to[7]
    QUICK: tl.constexpr = to[8]
    token, channel, delta = deltas
    pair, is_second = pair_of(channel, ROTARY_HALF, D // 2)
    at = queries + pair * (2 * ROWS)
    # all queries before the first addition, since no load passes an addition that may be to the same place
    halves = ()
    for row in tl.static_range(0, ROWS, 2):
        halves += two_floats(at, QUICK) if ROWS == 1 else four_floats(at + 2 * row, QUICK)
    high, low = steps_of(steps, pair, pair >= 0)
    # the second half of a pair stands a quarter of a turn ahead
    phase = phase_of(origin + token, high, low, SIGNED=False) + tl.where(is_second, 1 << 30, 0)
    cos, sin = cos_sin_of(phase, QUICK)
    on_a, on_b = cos * delta, sin * delta
    for row in tl.static_range(ROWS):
        tl.atomic_add(scores + row * CHUNK + token, halves[2 * row] * on_a + halves[2 * row + 1] * on_b, sem="relaxed")


@triton.jit
def add_outputs(to, deltas):
    """Add some outliers of values to the output: the difference times the token's weight.

    to: output `[CHANNELS, ROWS]` fp32, so that additions to neighbours are one instruction, where GPUs have it; weights `[CHUNK, ROWS]`; ROWS.
    """
    ROWS: tl.constexpr = to[2]
    token, channel, delta = deltas
    row = tl.arange(0, ROWS)[None, :]
    weight = tl.load(to[1] + (token * ROWS)[:, None] + row).to(tl.float32)
    tl.atomic_add(to[0] + (channel * ROWS)[:, None] + row, weight * delta[:, None], sem="relaxed")


@triton.jit
def zero_code(ranges, levels, floor, channel0, DYNAMIC: tl.constexpr):
    """What code 0 decodes to, as `outlier_deltas` takes it: ranges of tokens and the level of code 0, or the floor of the head's channels."""
    if DYNAMIC:  # noqa: SIM108  (the device language evaluates both sides of a conditional expression)
        coded = (ranges, tl.load(levels))
    else:
        coded = (floor + channel0, 0.0)
    return coded


@triton.jit
def outlier_deltas(
    place,
    exact,
    end,
    entry0,
    coded,
    token0,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DYNAMIC: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """(token within the chunk, channel, how much the element exceeds what its code 0 gave) of ENTRIES from `entry0` on.

    From `end` on they are elements of the chunk that exceed by 0, neighbours, so that to add them takes no branch and little time.
    """
    SPAN: tl.constexpr = _span(D)
    number = tl.arange(0, ENTRIES)
    ok = entry0 + number < end
    # an index counts tokens from its span's first, and no chunk is longer than a span
    spare = (token0 + number % CHUNK) % SPAN * D + number % D
    place = tl.where(ok, place.to(tl.int32) & 0xFFFF, spare)
    token, channel = (place // D - token0) & (SPAN - 1), place % D
    if DYNAMIC:
        scale, zero = token_ranges(coded[0], token0 + token, ok)
        level = coded[1] * scale + zero
    else:
        level = tl.load(coded[0] + channel)
    return token, channel, tl.where(ok, exact.to(tl.float32) - level, 0.0)
