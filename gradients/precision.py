"""The compute dtype: float32 for half-precision tensors, float64 where the model is loaded so (`--dtype float64`)."""

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float64 if it is that already, else in float32."""
    return x if x.dtype == torch.float64 else x.float()
