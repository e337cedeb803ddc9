"""Attention of some queries over keys and values that come in segments, by an online softmax.

The segments (sinks, pages, the current chunk) are dequantized one at a time, so no full-precision copy of the
cache ever exists. For each query the running maximum m, the sum l and the output o are kept:

    m' = max(m, max_j s_j)      l' = l e^(m - m') + sum_j e^(s_j - m')      o' = o e^(m - m') + sum_j e^(s_j - m') v_j
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradients.precision import widened


@dataclass(frozen=True)
class Segment:
    """Consecutive cached tokens: `key` (rotated) and `value` `[B, G, n, D]` in the precision of the queries.

    `visible` `[B, S, n]` bool, or broadcastable to it, says which queries see which tokens; None for all.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None


def attend_torch(query: Tensor, segments: Iterable[Segment], scaling: float) -> Tensor:
    """Softmax attention in float32, or in float64 for such queries.

    Args:
        query: `[B, H, S, D]`, rotated; query head h reads KV head h // (H / G).
        scaling: factor on the scores.

    Returns `[B, H, S, D]`; a query that sees nothing gets zeros.
    """
    batch, heads, tokens, dim = query.shape
    query = widened(query) * scaling
    highest = query.new_full((batch, heads, tokens, 1), -torch.inf)
    total = query.new_zeros(batch, heads, tokens, 1)
    output = query.new_zeros(batch, heads, tokens, dim)
    for segment in segments:
        kv_heads = segment.key.shape[1]
        grouped = query.reshape(batch, kv_heads, -1, dim)
        scores = (grouped @ segment.key.transpose(-1, -2)).view(batch, heads, tokens, -1)
        if segment.visible is not None:
            scores = scores.masked_fill(~segment.visible[:, None], -torch.inf)
        raised = torch.maximum(highest, scores.amax(-1, keepdim=True))
        # where nothing has been visible yet the maximum is still -inf, and -inf - -inf is not a number
        reference = raised.masked_fill(raised == -torch.inf, 0.0)
        shrink, weights = (highest - reference).exp(), (scores - reference).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        attended = weights.view(batch, kv_heads, -1, weights.shape[-1]) @ segment.value
        output = output * shrink + attended.view_as(output)
        highest = raised
    return output / total.masked_fill(total == 0, 1.0)
