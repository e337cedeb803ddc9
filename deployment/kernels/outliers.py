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
def add_to_scores(
    scores,  # [ROWS, CHUNK] fp32
    queries,  # [PAIRS, ROWS, 2] fp32, rotated to their own positions
    angles,  # steps, see `Rotary`, and the position of the chunk's first
    entries,  # index, value, first and last of the chunk
    ahead,  # `loaded` of the chunk's first, and of those after
    coded,  # `zero_code`
    token0,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    DYNAMIC: tl.constexpr,
    ENTRIES: tl.constexpr,
    QUICK: tl.constexpr,
):
    """Add the outliers of a chunk's keys to its scores: the difference, rotated to its token's position, times the query."""
    even_place, even_exact, odd_place, odd_exact = ahead
    # entries are loaded two rounds ahead, in the place of those just used up: to hand them on from round to round would be to wait for them
    for even in range(entries[2], entries[3], 2 * ENTRIES):
        odd = even + ENTRIES
        deltas = outlier_deltas(even_place, even_exact, entries[3], even, coded, token0, CHUNK, D, DYNAMIC, ENTRIES)
        even_place, even_exact = loaded(entries[0], entries[1], odd + ENTRIES, entries[3], ENTRIES)
        add_scores(scores, queries, angles, deltas, ROWS, CHUNK, D, ROTARY_HALF, QUICK)
        if odd < entries[3]:
            deltas = outlier_deltas(odd_place, odd_exact, entries[3], odd, coded, token0, CHUNK, D, DYNAMIC, ENTRIES)
            odd_place, odd_exact = loaded(entries[0], entries[1], odd + 2 * ENTRIES, entries[3], ENTRIES)
            add_scores(scores, queries, angles, deltas, ROWS, CHUNK, D, ROTARY_HALF, QUICK)


@triton.jit
def add_scores(
    scores,
    queries,
    angles,
    deltas,  # `outlier_deltas`
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    QUICK: tl.constexpr,
):
    """Add some outliers of keys; other arguments as of `add_to_scores`."""
    token, channel, delta = deltas
    pair, is_second = pair_of(channel, ROTARY_HALF, D // 2)
    at = queries + pair * (2 * ROWS)
    # all queries before the first addition, since no load passes an addition that may be to the same place
    halves = ()
    for row in tl.static_range(0, ROWS, 2):
        halves += two_floats(at, QUICK) if ROWS == 1 else four_floats(at + 2 * row, QUICK)
    high, low = steps_of(angles[0], pair, pair >= 0)
    # the second half of a pair stands a quarter of a turn ahead
    phase = phase_of(angles[1] + token, high, low, SIGNED=False) + tl.where(is_second, 1 << 30, 0)
    cos, sin = cos_sin_of(phase, QUICK)
    on_a, on_b = cos * delta, sin * delta
    for row in tl.static_range(ROWS):
        tl.atomic_add(scores + row * CHUNK + token, halves[2 * row] * on_a + halves[2 * row + 1] * on_b, sem="relaxed")


@triton.jit
def add_to_output(
    output,  # [CHANNELS, ROWS] fp32: additions to neighbours are one instruction, where GPUs have it
    weights,  # [CHUNK, ROWS]
    entries,
    ahead,
    coded,
    token0,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DYNAMIC: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Add the outliers of a chunk's values to the output: the difference times the token's weight."""
    even_place, even_exact, odd_place, odd_exact = ahead
    for even in range(entries[2], entries[3], 2 * ENTRIES):
        odd = even + ENTRIES
        deltas = outlier_deltas(even_place, even_exact, entries[3], even, coded, token0, CHUNK, D, DYNAMIC, ENTRIES)
        even_place, even_exact = loaded(entries[0], entries[1], odd + ENTRIES, entries[3], ENTRIES)
        add_outputs(output, weights, deltas, ROWS)
        if odd < entries[3]:
            deltas = outlier_deltas(odd_place, odd_exact, entries[3], odd, coded, token0, CHUNK, D, DYNAMIC, ENTRIES)
            odd_place, odd_exact = loaded(entries[0], entries[1], odd + 2 * ENTRIES, entries[3], ENTRIES)
            add_outputs(output, weights, deltas, ROWS)


@triton.jit
def add_outputs(output, weights, deltas, ROWS: tl.constexpr):
    """Add some outliers of values."""
    token, channel, delta = deltas
    row = tl.arange(0, ROWS)[None, :]
    weight = tl.load(weights + (token * ROWS)[:, None] + row).to(tl.float32)
    tl.atomic_add(output + (channel * ROWS)[:, None] + row, weight * delta[:, None], sem="relaxed")


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
