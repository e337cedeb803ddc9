"""Outliers: what the elements kept exactly add to scores and outputs.

The code of an outlier is 0, so that the tiles hold what code 0 decodes to, and the list says by how much that is wrong.
Corrections are linear in the difference: a flat loop over the chunk's list adds them, whichever element they belong to.
"""

import triton
import triton.language as tl

from deployment.kernels.operands import column_of, place_in_operand, row_offset
from deployment.kernels.phase import pair_of
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
    rotated,  # [spans, 2, 16 x PAIRS]: queries rotated back to the first of every TURN tokens, see `rotate_back`
    turn,
    entries,  # index, value, first and last of the chunk, ends of the lists from the chunk's first block on
    place,  # `loaded` of the chunk's first
    exact,
    coded,  # ranges of tokens, levels, floor at the head's first channel
    token0,
    here,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    TURN: tl.constexpr,
    STRETCHES: tl.constexpr,
    ORDERED: tl.constexpr,
    DYNAMIC: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Add the outliers of a chunk's keys to its scores: the difference times what the element is multiplied with."""
    for entry0 in range(entries[2], entries[3], ENTRIES):
        entry = entry0 + tl.arange(0, ENTRIES)
        ok = entry < entries[3]
        number, element = place, exact
        place, exact = loaded(entries[0], entries[1], entry0 + ENTRIES, entries[3], ENTRIES)
        token, channel, delta = outlier_deltas(
            number, element, entries[4], entry, ok, coded, token0, here, CHUNK, D, DYNAMIC
        )
        pair, is_second = pair_of(channel, ROTARY_HALF, D // 2)
        turn_at = turn + (pair * 64 + token % TURN)
        cos = tl.load(turn_at) * delta
        sin = tl.load(turn_at + D * 32) * delta
        on_a, on_b = tl.where(is_second, -sin, cos), tl.where(is_second, cos, sin)
        stretch, column = token // TURN, pair
        if not ORDERED:
            column = column_of(pair, PAIRS)
        at = rotated + stretch // STRETCHES * (32 * PAIRS) + place_in_operand(stretch % STRETCHES * ROWS, column, 16)
        for row in tl.static_range(ROWS):
            a = tl.load(at + row_offset(row)).to(tl.float32)
            b = tl.load(at + row_offset(row) + 16 * PAIRS).to(tl.float32)
            tl.atomic_add(scores + row * CHUNK + token, a * on_a + b * on_b, mask=ok, sem="relaxed")


@triton.jit
def add_to_output(
    extra,  # [ROWS, D] fp32
    weights,  # [ROWS, CHUNK]
    entries,
    place,
    exact,
    coded,
    token0,
    here,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DYNAMIC: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Add the outliers of a chunk's values to the output: the difference times the token's weight."""
    for entry0 in range(entries[2], entries[3], ENTRIES):
        entry = entry0 + tl.arange(0, ENTRIES)
        ok = entry < entries[3]
        number, element = place, exact
        place, exact = loaded(entries[0], entries[1], entry0 + ENTRIES, entries[3], ENTRIES)
        token, channel, delta = outlier_deltas(
            number, element, entries[4], entry, ok, coded, token0, here, CHUNK, D, DYNAMIC
        )
        for row in tl.static_range(ROWS):
            weight = tl.load(weights + row * CHUNK + token).to(tl.float32)
            tl.atomic_add(extra + row * D + channel, weight * delta, mask=ok, sem="relaxed")


@triton.jit
def outlier_deltas(
    place, exact, edges, entry, ok, coded, token0, here, CHUNK: tl.constexpr, D: tl.constexpr, DYNAMIC: tl.constexpr
):
    """(token within the chunk, channel, how much the element exceeds what its code 0 gave) of outliers `entry`."""
    # what does not exist is taken for the first element, so that no further load needs a mask
    place = tl.where(ok, place.to(tl.int32) & 0xFFFF, token0 % _span(D) * D)
    # an index counts tokens from its span's first; chunks and spans are powers of two, so one holds the other whole
    SPAN: tl.constexpr = _span(D)
    token, channel = place // D - token0 % SPAN, place % D
    for later in tl.static_range(1, CHUNK // SPAN):
        last = later * (SPAN // 64) - 1  # the block before that span
        edge = tl.load(edges + last, mask=last < here, other=2147483647)
        token += tl.where(entry >= edge, SPAN, 0)
    if DYNAMIC:
        scale, zero = token_ranges(coded[0], token0 + token, ok)
        level = tl.load(coded[1]) * scale + zero
    else:
        level = tl.load(coded[2] + channel)
    return token, channel, exact.to(tl.float32) - level
