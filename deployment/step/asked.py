"""What a step is asked for: one layer's new tokens, and how to attend with them."""

from typing import Literal, NamedTuple

from torch import Tensor

from deployment.layer import PackedLayer
from deployment.rope import Rope

Backend = Literal["auto", "triton", "torch"]


class Step(NamedTuple):
    """The arguments of one layer's attention.

    Fields:
        query: `[B, H, S, D]`, pre-RoPE; key, value `[B, G, S, D]`, of the chunk.
        scaling: factor on the scores.
        mask: `[B or 1, 1, 1, T + S]` bool, False for padding on the left; None if there is none.
        positions: `[B or 1, S]` int64, what the model counts the chunk's tokens as; None if nobody said.
        backend: kernels or torch; None leaves it to the environment (dispatch.py).
    """

    layer: PackedLayer
    rope: Rope
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    mask: Tensor | None = None
    positions: Tensor | None = None
    backend: Backend | None = None
