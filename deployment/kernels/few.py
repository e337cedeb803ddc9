"""Attention of one query to a few plain tokens: sinks, and those that are not stored yet.

A handful of tokens is too little work for a program of its own, and every launch costs a decode step some microseconds: `combine`, which
reads a query's parts anyhow, does them on the side, in fp32. A key at t is rotated by its distance t - p to the query at p, and the
query not at all: R(t) k . R(p) q = R(t - p) k . q.
"""

import triton
import triton.language as tl

from deployment.kernels.phase import cos_sin

_FEW = 16
FEW = tl.constexpr(_FEW)  # tokens at most


@triton.jit
def attend_few(
    state,  # output [CHANNELS], highest score, sum of weights: as of `combine`
    query,  # two [PAIRS] fp32: the halves of the query's pairs, scaled, not rotated
    position,  # int64, of the query
    segment,  # keys, values, their strides of sequences, heads, tokens; how many tokens
    origin,  # position int64 of the first
    limit,  # from which position on they are not stored
    stream,  # number of the sequence, and of the KV head
    angles,  # high, low
    channels,  # two [PAIRS], the halves of the pairs, and which of them exist
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUICK: tl.constexpr,
    LIFT: tl.constexpr,  # weights are 2^LIFT larger, as those of the parts are
):
    """The state, with the tokens of a plain segment."""
    output, highest, total = state
    key, value, stride_b, stride_g, stride_t, tokens = segment
    first, second, pair_ok = channels
    token = tl.arange(0, FEW)
    at = origin + token
    seen = (token < tokens) & (at >= 0) & (at < limit) & (at <= position)
    place = stream[0].to(tl.int64) * stride_b + stream[1].to(tl.int64) * stride_g + token.to(tl.int64) * stride_t
    ok = seen[:, None] & pair_ok[None, :]
    a = tl.load(key + place[:, None] + first[None, :], mask=ok, other=0).to(tl.float32)
    c = tl.load(key + place[:, None] + second[None, :], mask=ok, other=0).to(tl.float32)
    cos, sin = cos_sin((at - position)[:, None], angles[0][None, :], angles[1][None, :], QUICK)
    score = tl.sum((a * cos - c * sin) * query[0][None, :] + (c * cos + a * sin) * query[1][None, :], 1)
    score = tl.where(seen, score, float("-inf"))
    raised = tl.maximum(highest, tl.max(score, 0))
    reference = tl.where(raised == float("-inf"), 0.0, raised)
    weight, shrink = tl.exp2(score - reference + LIFT), tl.exp2(highest - reference)
    channel = tl.arange(0, CHANNELS)
    value_ok = seen[:, None] & (channel < D)[None, :]
    x = tl.load(value + place[:, None] + channel[None, :], mask=value_ok, other=0).to(tl.float32)
    return output * shrink + tl.sum(weight[:, None] * x, 0), raised, total * shrink + tl.sum(weight, 0)
