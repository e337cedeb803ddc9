"""The softmax of a chunk's scores, online over chunks, for real queries only.

With m the largest score so far, a weight is 2^(score - m): queries carry log2 e. What was summed with an older m shrinks.
"""

import triton
import triton.language as tl

from deployment.kernels.operands import keep_operand
from deployment.kernels.outliers import ranges_of


@triton.jit
def both_sums(a, b, c, d):
    """Of two pairs."""
    return a + c, b + d


@triton.jit
def seen_tokens(position, origin, token0, held, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """`[ROWS, CHUNK]` bool: tokens that are stored, are no padding, and do not follow the query.

    position: `[ROWS]` int64 of the queries. origin: int64, of the segment's first token.
    """
    token = tl.arange(0, CHUNK)
    end = tl.minimum(position - origin + 1, held) - token0
    end = tl.maximum(tl.minimum(end, CHUNK), 0).to(tl.int32)
    begin = tl.minimum(tl.maximum(-(origin + token0), 0), CHUNK).to(tl.int32)
    return (token[None, :] < end[:, None]) & (token >= begin)[None, :]


@triton.jit
def weigh_chunk(
    scores,  # [ROWS, CHUNK] fp32
    weights,  # [CHUNK, ROWS], written
    scaled,  # as `attend_chunk` takes it, written: weights, times the tokens' scales where values have ranges of their own
    ranges,  # [CHUNK] int32, where values have ranges of their own: a token's scale and zero
    seen,
    state,  # [ROWS] each: highest score, sum of weights, and of weights times the tokens' zeros
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DYNAMIC: tl.constexpr,
    OUTLIERS: tl.constexpr,
    ORDERED: tl.constexpr,  # as are the next, see `keep_operand`
    KIND: tl.constexpr,
    LIFT: tl.constexpr,  # weights are 2^LIFT larger
    LOWER: tl.constexpr,  # and the scaled ones LOWER times that
):
    """The new state, and `[ROWS]` what all that was summed before shrinks by."""
    highest, total, offset = state
    token = tl.arange(0, CHUNK)
    to = tl.arange(0, ROWS)[:, None] * CHUNK + token[None, :]
    score = tl.load(scores + to, mask=seen, other=float("-inf"), cache_modifier=".cg")
    raised = tl.maximum(highest, tl.max(score, 1))
    reference = tl.where(raised == float("-inf"), 0.0, raised)
    weight = tl.exp2(score - reference[:, None] + LIFT)
    shrink = tl.exp2(highest - reference)
    if OUTLIERS:
        tl.store(weights + token[None, :] * ROWS + tl.arange(0, ROWS)[:, None], weight.to(weights.dtype.element_ty))
    if DYNAMIC:  # level * scale + zero: scales go to the weights, zeros add up on their own
        scale, zero = ranges_of(ranges)
        keep_operand(scaled, weight * (scale * LOWER)[None, :], ROWS, ORDERED, KIND)
        weight_sum, zero_sum = tl.reduce((weight, weight * zero[None, :]), 1, both_sums)
        total, offset = total * shrink + weight_sum, offset * shrink + zero_sum
    else:
        keep_operand(scaled, weight, ROWS, ORDERED, KIND)
        total = total * shrink + tl.sum(weight, 1)
    return raised, total, offset, shrink
