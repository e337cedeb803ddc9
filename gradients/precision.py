"""The precision to compute in: float32 for what is stored in less, float64 for a model that is loaded so (`--dtype float64`)."""

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float64 if it is that already, else in float32."""
    return x if x.dtype == torch.float64 else x.float()
