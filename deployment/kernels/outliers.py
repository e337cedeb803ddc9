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
    word = tl.load(scales.to(tl.pointer_type(tl.int32)) + token, mask=ok, other=0)
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
    entries,  # index, value, first and last of the chunk, ends of the lists from the chunk's first block on
    ahead,  # `loaded` of the chunk's first, and of those after
    coded,  # ranges of tokens, levels, floor, and the head's first channel
    token0,
    here,
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
        deltas = outlier_deltas(even_place, even_exact, entries, even, coded, token0, here, CHUNK, D, DYNAMIC, ENTRIES)
        even_place, even_exact = loaded(entries[0], entries[1], odd + ENTRIES, entries[3], ENTRIES)
        add_scores(scores, queries, angles, deltas, ROWS, CHUNK, D, ROTARY_HALF, QUICK)
        if odd < entries[3]:
            deltas = outlier_deltas(odd_place, odd_exact, entries, odd, coded, token0, here, CHUNK, D, DYNAMIC, ENTRIES)
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
    high, low = steps_of(angles[0], pair, pair >= 0)
    # the second half of a pair stands a quarter of a turn ahead
    phase = phase_of(angles[1] + token, high, low, SIGNED=False) + tl.where(is_second, 1 << 30, 0)
    cos, sin = cos_sin_of(phase, QUICK)
    on_a, on_b = cos * delta, sin * delta
    at = queries + pair * (2 * ROWS)
    for row in tl.static_range(0, ROWS, 2):
        if ROWS == 1:
            a, b = two_floats(at, QUICK)
        else:
            a, b, c, d = four_floats(at + 2 * row, QUICK)
            tl.atomic_add(scores + (row + 1) * CHUNK + token, c * on_a + d * on_b, sem="relaxed")
        tl.atomic_add(scores + row * CHUNK + token, a * on_a + b * on_b, sem="relaxed")


@triton.jit
def add_to_output(
    output,  # [ROWS, CHANNELS] fp32
    weights,  # [ROWS, CHUNK]
    entries,
    ahead,
    coded,
    token0,
    here,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Add the outliers of a chunk's values to the output: the difference times the token's weight."""
    even_place, even_exact, odd_place, odd_exact = ahead
    for even in range(entries[2], entries[3], 2 * ENTRIES):
        odd = even + ENTRIES
        deltas = outlier_deltas(even_place, even_exact, entries, even, coded, token0, here, CHUNK, D, DYNAMIC, ENTRIES)
        even_place, even_exact = loaded(entries[0], entries[1], odd + ENTRIES, entries[3], ENTRIES)
        add_outputs(output, weights, deltas, ROWS, CHUNK, CHANNELS)
        if odd < entries[3]:
            deltas = outlier_deltas(odd_place, odd_exact, entries, odd, coded, token0, here, CHUNK, D, DYNAMIC, ENTRIES)
            odd_place, odd_exact = loaded(entries[0], entries[1], odd + 2 * ENTRIES, entries[3], ENTRIES)
            add_outputs(output, weights, deltas, ROWS, CHUNK, CHANNELS)


@triton.jit
def add_outputs(output, weights, deltas, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr):
    """Add some outliers of values."""
    token, channel, delta = deltas
    for row in tl.static_range(ROWS):
        weight = tl.load(weights + row * CHUNK + token).to(tl.float32)
        tl.atomic_add(output + row * CHANNELS + channel, weight * delta, sem="relaxed")


@triton.jit
def outlier_deltas(
    place,
    exact,
    entries,
    entry0,
    coded,
    token0,
    here,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DYNAMIC: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """(token within the chunk, channel, how much the element exceeds what its code 0 gave) of ENTRIES from `entry0` on.

    Past the end they are elements of the chunk that exceed by 0, neighbours, so that to add them takes no branch and little time.
    """
    SPAN: tl.constexpr = _span(D)
    number = tl.arange(0, ENTRIES)
    entry = entry0 + number
    ok = entry < entries[3]
    # an index counts tokens from its span's first; chunks and spans are powers of two, so one holds the other whole
    spare = (token0 % SPAN + number % min(CHUNK, SPAN)) * D + number % D
    place = tl.where(ok, place.to(tl.int32) & 0xFFFF, spare)
    token, channel = place // D - token0 % SPAN, place % D
    for later in tl.static_range(1, CHUNK // SPAN):
        last = later * (SPAN // 64) - 1  # the block before that span
        edge = tl.load(entries[4] + last, mask=last < here, other=2147483647)
        token += tl.where(ok & (entry >= edge), SPAN, 0)
    if DYNAMIC:
        scale, zero = token_ranges(coded[0], token0 + token, ok)
        level = tl.load(coded[1]) * scale + zero
    else:
        level = tl.load(coded[2] + (coded[3] + channel))
    return token, channel, tl.where(ok, exact.to(tl.float32) - level, 0.0)
