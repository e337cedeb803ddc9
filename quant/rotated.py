"""Rotation and Lloyd-Max levels: the data-free rival (TurboQuant, arXiv 2504.19874, in its form for the squared error).

A random rotation makes the coordinates of any vector nearly Gaussian, so one codebook, the best for a Gaussian, serves
every head vector once its norm is divided out. Stored: codes, and one fp16 scale per token and head.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from quant.codebook import Codebook, nuq_codebook
from quant.kmeans import Histogram
from quant.quantizer import Encoded, Quantizer, as_stored, codebook_tables

_WIDEST = 6.0  # standard deviations; 2e-9 of a Gaussian's mass lies beyond
_SEED = 0


@dataclass(frozen=True)
class RotatedQuantizer(Quantizer):
    """`rotation` `[D, D]` float32, orthogonal; the codebook's unit is a coordinate's root mean square."""

    codebook: Codebook
    rotation: Tensor

    def encode(self, x: Tensor) -> Encoded:
        """Quantize `x`, `[..., T, C]`, in float32; scales are `[..., T, G]` fp16."""
        turned = x.float().unflatten(-1, (-1, len(self.rotation))) @ self.rotation
        scale = as_stored(turned.square().mean(-1).sqrt())
        unit = turned / scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        return Encoded(self.codebook.encode(unit.flatten(-2)), None, None, scale)

    def dense(self, encoded: Encoded) -> Tensor:
        """Float32 values `[..., T, C]`; there are no outliers."""
        assert encoded.scale is not None
        levels = self.codebook.decode(encoded.codes).unflatten(-1, (-1, len(self.rotation)))
        return ((levels * encoded.scale.float()[..., None]) @ self.rotation.T).flatten(-2)

    @property
    def tables(self) -> dict[str, Tensor]:
        """The fitted tensors, by the name they have in the artefact."""
        return {**codebook_tables(self.codebook), "rotation": self.rotation}


@cache
def random_rotation(dim: int) -> Tensor:
    """Random orthogonal `[D, D]`: signs, then Hadamard where D is a power of two, else a Gaussian matrix's QR."""
    generator = torch.Generator().manual_seed(_SEED)
    if dim & (dim - 1):
        return torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    hadamard = torch.ones(1, 1)
    while len(hadamard) < dim:
        hadamard = torch.kron(hadamard, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    signs = torch.randint(0, 2, (dim, 1), generator=generator) * 2.0 - 1
    return signs * hadamard * dim**-0.5


@cache
def gaussian_codebook(levels: int) -> Codebook:
    """The levels of least squared error for a standard normal (Lloyd-Max)."""
    histogram = Histogram.empty(-_WIDEST, _WIDEST)
    grid = np.linspace(-_WIDEST, _WIDEST, len(histogram.mass))
    histogram.add(grid, np.exp(-(grid**2) / 2))
    return nuq_codebook(histogram, levels)
