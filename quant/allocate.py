"""Rate-distortion allocation: every channel gets the bits and the outliers that pay most.

The paper gives all channels equally many bits, though what an error costs (Fisher information times squared range)
varies widely within a layer and between layers. Minimising

    sum_c E_c(b_c, p_c)    subject to    sum_c R_c(b_c, p_c) <= budget

over the bits b and the outlier share p of every channel c of every layer, keys and values alike, is a Lagrangian
problem: for a price `lambda` per bit each channel takes the option of least E + lambda * R, on its own, and the price
is raised or lowered until the budget is met. E is the Fisher-weighted squared error of the calibration tokens under
the layer's codebook for b bits, R the bits stored: codes, and 32 per outlier.

All options are priced from one weighted histogram per channel; the data is read a second time to fit what was chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant.codebook import Codebook, nuq_codebook
from quant.kmeans import Histogram
from quant.mixed import MixedQuantizer
from quant.scheme import Scheme
from quant.storage import OUTLIER_BITS

Floats = NDArray[np.float64]

WIDTHS = (0, 1, 2, 3, 4, 5, 6)
SHARES = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04)
BINS = 512
_CODEBOOK_BINS = 2048  # fewer than elsewhere: seven codebooks of up to 64 levels are searched for each side
_TILE_CHANNELS, _TILE_TOKENS = 32, 8192  # binned at a time: what is counted and the counts stay in the cache
_PRICING_SHARE = 0.01  # of the ranges behind the codebooks that options are priced with
_LOG_PRICES = (-60.0, 20.0)  # of a bit, in units of the error; Fisher information of mean losses lies around e^-25
_BISECTIONS = 60


@dataclass(frozen=True)
class ChannelHistograms:
    """Calibration data of one layer's keys or values: a histogram for each channel, `[C, bins]` each.

    `mass`, `moment` and `second` are sums of w, w x and w x^2 with w the Fisher information; `count` counts tokens.
    """

    mass: Floats
    moment: Floats
    second: Floats
    count: Floats
    low: Floats  # [C] lower end of the first bin
    width: Floats  # [C] of a bin

    @classmethod
    def of(cls, activation: Tensor, fisher: Tensor, bins: int = BINS) -> "ChannelHistograms":
        """Histograms of `activation` `[N, C]` weighted by `fisher` `[N, C]`."""
        channels = activation.shape[1]
        low, high = activation.amin(0).double().numpy(), activation.amax(0).double().numpy()
        width = np.maximum((high - low) / bins, np.finfo(np.float32).tiny)
        sums = np.zeros((4, channels, bins))
        for first in range(0, channels, _TILE_CHANNELS):
            some = slice(first, first + _TILE_CHANNELS)
            offsets = np.arange(len(low[some]))[:, None] * bins
            columns = zip(activation[:, some].split(_TILE_TOKENS), fisher[:, some].split(_TILE_TOKENS), strict=True)
            for x, w in ((x.T.double().contiguous().numpy(), w.T.double().contiguous().numpy()) for x, w in columns):
                position = np.clip((x - low[some, None]) / width[some, None], 0, bins - 1)
                index = (position.astype(np.int64) + offsets).ravel()
                moments = (w, w * x, w * x * x, None)
                for total, weights in zip(sums, moments, strict=True):
                    flat = np.bincount(index, None if weights is None else weights.ravel(), offsets.size * bins)
                    total[some] += flat.reshape(-1, bins)
        mass, moment, second, count = sums
        return cls(mass, moment, second, count, low, width)

    @property
    def centres(self) -> Floats:
        """Mid-points of the bins, `[C, bins]`."""
        return self.low[:, None] + (np.arange(self.mass.shape[1]) + 0.5) * self.width[:, None]

    def ranges(self, share: float) -> tuple[Floats, Floats]:
        """(scale, zero) `[C]` of the share's quantiles, to the accuracy of a bin."""
        cumulated = self.count.cumsum(1)
        total = cumulated[:, -1:]
        first = (cumulated > share / 2 * total).argmax(1)
        last = (cumulated >= (1 - share / 2) * total).argmax(1)
        low = self.low + first * self.width
        high = self.low + (last + 1) * self.width
        return (high - low) / 2, (high + low) / 2

    def errors(self, codebook: Codebook, scale: Floats, zero: Floats) -> tuple[Floats, Floats]:
        """(weighted squared error of the inliers, number of outliers) of each channel, `[C]`."""
        normalised = (self.centres - zero[:, None]) / np.maximum(scale, np.finfo(np.float64).tiny)[:, None]
        inside = np.abs(normalised) <= 1
        codes = np.searchsorted(codebook.boundaries.numpy(), normalised)
        level = codebook.levels.double().numpy()[codes] * scale[:, None] + zero[:, None]
        error = self.second - 2 * level * self.moment + level**2 * self.mass
        return np.where(inside, error, 0.0).sum(1).clip(min=0), np.where(inside, 0.0, self.count).sum(1)

    def pooled(self, channels: NDArray[np.bool_], scale: Floats, zero: Floats) -> tuple[Floats, Floats]:
        """(normalised points, weights) of some channels' inliers, for a codebook they share."""
        mass = self.mass[channels]
        mean = np.divide(self.moment[channels], mass, out=np.zeros_like(mass), where=mass > 0)
        points = (mean - zero[channels, None]) / np.maximum(scale[channels], np.finfo(np.float64).tiny)[:, None]
        weights = mass * np.square(scale[channels])[:, None]
        kept = (weights > 0) & (np.abs(points) <= 1)
        return points[kept], weights[kept]


def shared_codebook(points: Floats, weights: Floats, width: int) -> Codebook:
    """The best codebook of 2^width levels for normalised points."""
    histogram = Histogram.empty(-1, 1, _CODEBOOK_BINS)
    histogram.add(points, weights)
    return nuq_codebook(histogram, 2**width)


@dataclass(frozen=True)
class Options:
    """What each choice of (width, share) would cost each channel: `error` and `bits`, `[widths, shares, C]`."""

    error: Floats
    bits: Floats


def price(histograms: ChannelHistograms) -> Options:
    """All options of one layer's keys or values, each width with one codebook for all channels; bits are per token."""
    tokens = histograms.count[0].sum()
    ranges = [histograms.ranges(share) for share in SHARES]
    scale, zero = ranges[SHARES.index(_PRICING_SHARE)]
    points, weights = histograms.pooled(np.ones(len(scale), dtype=bool), scale, zero)
    error, bits = [], []
    for width in WIDTHS:
        codebook = shared_codebook(points, weights, width)
        both = [histograms.errors(codebook, *one) for one in ranges]
        error.append([weighted for weighted, _ in both])
        bits.append([width + OUTLIER_BITS * outliers / tokens for _, outliers in both])
    return Options(np.array(error), np.array(bits))


def allocate(options: Sequence[Options], budget: float) -> list[NDArray[np.int64]]:
    """For each of several tensors, every channel's choice as an index into the flattened (width, share) grid.

    `budget` is the mean of bits per element over all of them.
    """
    errors, bits = (
        np.concatenate([getattr(option, name).reshape(-1, option.error.shape[-1]) for option in options], axis=1)
        for name in ("error", "bits")
    )
    low, high = _LOG_PRICES
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        chosen = (errors + np.exp(middle) * bits).argmin(0)
        spent = np.take_along_axis(bits, chosen[None], 0).mean()
        low, high = (middle, high) if spent > budget else (low, middle)
    chosen = (errors + np.exp(high) * bits).argmin(0)
    return np.split(chosen, np.cumsum([option.error.shape[-1] for option in options])[:-1])


def bind(histograms: ChannelHistograms, chosen: NDArray[np.int64], scheme: Scheme) -> MixedQuantizer:
    """The quantizer of one layer's keys or values with the chosen options, codebooks fitted to the channels that share them."""
    width_index, share_index = np.divmod(chosen, len(SHARES))
    widths = np.array(WIDTHS)[width_index]
    ranges = np.array([histograms.ranges(share) for share in SHARES])  # [shares, 2, C]
    scale, zero = ranges[share_index, :, np.arange(len(chosen))].T
    codebooks = {
        int(width): shared_codebook(*histograms.pooled(widths == width, scale, zero), int(width))
        for width in np.unique(widths)
    }
    tables = [torch.from_numpy(np.ascontiguousarray(table)).float() for table in (scale, zero)]
    return MixedQuantizer(scheme, codebooks, torch.from_numpy(widths).to(torch.uint8), tables[0], tables[1])
