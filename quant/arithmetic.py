"""Normalise, denormalise, round to fp16: elementwise arithmetic in float32, each operation rounded on its own."""

import torch
from torch import Tensor


def normalise(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x^ = (x - z) / s (KVQuant, Eq. 2). Where s = 0, x = z maps to 0 and any other x far beyond the ends."""
    return (x - zero) / scale.clamp(min=torch.finfo(torch.float32).tiny)


def denormalise(levels: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x' = s * q[code] + z, of levels that were looked up; inverse of `normalise`."""
    return levels * scale + zero


def as_stored(x: Tensor) -> Tensor:
    """fp16, saturating: what exact elements, scales and sink tokens are stored as."""
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).half()
