"""A datatype is two small tables on the normalised axis [-1, 1]: L ascending levels, and L - 1 boundaries.

`code = bucketize(x, boundaries)`, and a tie goes to the lower level. int, nf and nuq are three ways to fill the
tables, Q-Norm is a change of one of them, and nothing downstream knows which it runs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quant.kmeans import Histogram, weighted_kmeans
from quant.scheme import Datatype


@dataclass(frozen=True)
class Codebook:
    """`levels` `[L]` and `boundaries` `[L-1]`, both float32 and ascending."""

    levels: Tensor
    boundaries: Tensor

    def __post_init__(self) -> None:
        if self.levels.ndim != 1 or self.boundaries.shape != (len(self.levels) - 1,):
            raise ValueError(f"codebook shapes {tuple(self.levels.shape)=} {tuple(self.boundaries.shape)=} do not fit")
        for name in ("levels", "boundaries"):
            table = getattr(self, name)
            if not table.isfinite().all() or (table.diff() < 0).any():
                raise ValueError(f"codebook {name} {table.tolist()} are not finite and ascending")

    @classmethod
    def from_levels(cls, levels: Tensor) -> "Codebook":
        """Boundaries at the midpoints, so that every number goes to its nearest level."""
        levels = levels.float()
        return cls(levels, (levels[1:] + levels[:-1]) / 2)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of normalised values; values beyond the ends take the end levels."""
        return torch.bucketize(x, self.boundaries).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Normalised values (float32) of codes of any integer dtype."""
        return self.levels.index_select(0, codes.flatten().int()).view(codes.shape)

    def to(self, device: torch.device | str) -> "Codebook":
        """The same tables on a device."""
        return Codebook(self.levels.to(device), self.boundaries.to(device))


def int_codebook(levels: int) -> Codebook:
    """Evenly spaced levels that include both ends; a single one lies in the middle."""
    return Codebook.from_levels(torch.linspace(-1, 1, levels) if levels > 1 else torch.zeros(1))


def nf_codebook(levels: int) -> Codebook:
    """NormalFloat (QLoRA, arXiv 2305.14314): quantiles of a standard normal, zero among them, scaled to [-1, 1].

    Half the levels lie above zero, half minus one below; the outermost quantile is QLoRA's offset, here derived
    from the number of levels (0.9677 at 16), where the original KVQuant keeps the 4-bit constant at every width.
    """
    if levels == 2:
        return int_codebook(levels)
    offset = 1 - (1 / levels + 1 / (levels - 1)) / 4
    upper = torch.special.ndtri(torch.linspace(offset, 0.5, levels // 2 + 1, dtype=torch.float64)[:-1])
    lower = -torch.special.ndtri(torch.linspace(offset, 0.5, levels // 2, dtype=torch.float64)[:-1])
    quantiles = torch.cat([lower, torch.zeros(1, dtype=torch.float64), upper]).sort().values
    return Codebook.from_levels(quantiles / quantiles.abs().max())


def nuq_codebook(histogram: Histogram, levels: int) -> Codebook:
    """The levels of least weighted squared error (KVQuant, Eq. 2 and 7) over a histogram of inliers."""
    points, masses = histogram.points()
    if not len(points):  # every weight was zero, or there were no inliers: nothing prefers one level to another
        return int_codebook(levels)
    return Codebook.from_levels(torch.from_numpy(weighted_kmeans(points, masses, levels)))


def fit_codebook(datatype: Datatype, levels: int, histogram: Histogram) -> Codebook:
    """The codebook of a datatype; only nuq looks at the data."""
    if datatype == "nuq":
        return nuq_codebook(histogram, levels)
    return int_codebook(levels) if datatype == "int" else nf_codebook(levels)


def match_moments(codebook: Codebook, histogram: Histogram, second_moment: float) -> Codebook:
    """Q-Norm: levels `a * levels + b` whose dequantized mean and deviation are those of the data.

    `histogram` counts the inliers with equal weights, `second_moment` is the sum of their squares. Boundaries stay.
    """
    points, masses = histogram.points()
    total = masses.sum()
    if not total:
        return codebook
    mean = histogram.moment.sum() / total
    deviation = np.sqrt(max(second_moment / total - mean**2, 0.0))
    quantized = codebook.decode(codebook.encode(torch.from_numpy(points).float())).double().numpy()
    quantized_mean = np.average(quantized, weights=masses)
    quantized_deviation = np.sqrt(np.average((quantized - quantized_mean) ** 2, weights=masses))
    if quantized_deviation == 0:
        return codebook
    stretch = float(deviation / quantized_deviation)
    shift = float(mean - stretch * quantized_mean)
    return Codebook(codebook.levels * stretch + shift, codebook.boundaries)
