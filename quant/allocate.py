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
from quant.grouping import form_groups
from quant.kmeans import Histogram
from quant.mixed import MixedQuantizer
from quant.scheme import GROUP_CHANNELS, Scheme
from quant.storage import OUTLIER_BITS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

WIDTHS = (0, 1, 2, 3, 4, 5, 6)
SHARES = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04)
CLIPPED = (0.0, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)  # shares that are moved to the end of the range
_FAST_BITS = 4  # of the widest group that the decode kernel reads
_SLACK = 0.5  # bits a budget must be short of the most, for a choice to be left
_FORMINGS = 3  # of groups, each at the price that those before leave
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

    def errors(self, codebook: Codebook, scale: Floats, zero: Floats, clipped: bool = False) -> tuple[Floats, Floats]:
        """(weighted squared error of the inliers, number of outliers) of each channel, `[C]`.

        If ranges are `clipped` there are no outliers, and a single level lies where it is best for its channel.
        """
        if clipped and len(codebook.levels) == 1:
            mass, moment, second = (table.sum(1) for table in (self.mass, self.moment, self.second))
            spent = np.divide(moment**2, mass, out=np.zeros_like(mass), where=mass > 0)
            return (second - spent).clip(min=0), np.zeros(len(mass))
        normalised = (self.centres - zero[:, None]) / np.maximum(scale, np.finfo(np.float64).tiny)[:, None]
        inside = np.full(normalised.shape, True) if clipped else np.abs(normalised) <= 1
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

    def cost(self, price: float) -> Floats:
        """Of every choice, with `price` for a bit."""
        return self.error + price * self.bits


def choices(scheme: Scheme) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(widths, shares beyond a channel's range) that allocation chooses from.

    Groups are as wide as the decode kernel reads if the budget can well be spent so, on outliers too; else wider ones occur.
    """
    fast = scheme.groups > 1 and scheme.bits + _SLACK <= _FAST_BITS + OUTLIER_BITS * scheme.outliers
    widths = WIDTHS[: _FAST_BITS + 1] if fast else WIDTHS
    return widths, tuple(share for share in SHARES if share <= scheme.outliers) if scheme.outliers else CLIPPED


def price(histograms: ChannelHistograms, scheme: Scheme) -> Options:
    """All options of one layer's keys or values, each width with one codebook for all channels; bits are per token."""
    tokens = histograms.count[0].sum()
    widths, shares = choices(scheme)
    ranges = [histograms.ranges(share) for share in shares]
    scale, zero = histograms.ranges(_PRICING_SHARE)
    points, weights = histograms.pooled(np.ones(len(scale), dtype=bool), scale, zero)
    error, bits = [], []
    for width in widths:
        codebook = shared_codebook(points, weights, width)
        both = [histograms.errors(codebook, *one, clipped=not scheme.outliers) for one in ranges]
        error.append([weighted for weighted, _ in both])
        bits.append([width + OUTLIER_BITS * outliers / tokens for _, outliers in both])
    return Options(np.array(error), np.array(bits))


def allocate(options: Sequence[Options], budget: float, places: Sequence[Ints | None] = ()) -> list[Ints]:
    """For each of several tensors, every channel's choice as an index into the flattened (width, share) grid.

    Args:
        budget: the mean of bits per element over all of them.
        places: each tensor's channels `[G, D]`, of which 16 after 16 share a width; None for widths of their own.
    """
    all_options, every, sizes = _together(options, places or [None] * len(options))
    return np.split(_choose(all_options, every, _price_of(all_options, every, budget)), sizes[:-1].cumsum())


def form_all_groups(options: Sequence[Options], budget: float, units: Sequence[Ints | None]) -> list[Ints | None]:
    """The groups of several tensors' channels, `[G, D]` as of `form_groups`, at the price that a bit has within the budget."""
    places: list[Ints | None] = [None] * len(units)
    for _ in range(_FORMINGS):
        together, groups, _ = _together(options, places)
        price = _price_of(together, groups, budget)
        places = [
            None if unit is None else form_groups(one.cost(price).min(1), unit)
            for one, unit in zip(options, units, strict=True)
        ]
    return places


def _together(options: Sequence[Options], places: Sequence[Ints | None]) -> tuple[Options, list[Ints], Ints]:
    """Tensors as one: (options, groups of one size `[n, size]` each, channels of each tensor)."""
    both = (np.concatenate([getattr(one, name) for one in options], axis=-1) for name in ("error", "bits"))
    sizes = np.array([one.error.shape[-1] for one in options])
    groups: dict[int, list[Ints]] = {}
    for size, start, own in zip(sizes, sizes.cumsum() - sizes, places, strict=True):
        group = np.arange(size)[:, None] if own is None else own.reshape(-1, GROUP_CHANNELS)
        groups.setdefault(group.shape[1], []).append(group + start)
    return Options(*both), [np.concatenate(same) for same in groups.values()], sizes


def _price_of(options: Options, groups: Sequence[Ints], budget: float) -> float:
    """The least price of a bit at which the choices are within the budget."""
    low, high = _LOG_PRICES
    if (options.bits == options.bits[:, :1]).all():  # no share takes bits: of each width one is best at any price
        options = Options(options.error.min(1, keepdims=True), options.bits[:, :1])
    bits = options.bits.reshape(-1, options.bits.shape[-1])
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        chosen = _choose(options, groups, float(np.exp(middle)))
        spent = np.take_along_axis(bits, chosen[None], 0).mean()
        low, high = (middle, high) if spent > budget else (low, middle)
    return float(np.exp(high))


def _choose(options: Options, groups: Sequence[Ints], price: float) -> Ints:
    """The cheapest choice of every channel at a price of a bit, `[C]`; those of a group have one width."""
    cost = options.cost(price)
    best, width = cost.min(1), np.empty(cost.shape[-1], np.int64)
    for same in groups:
        width[same] = best[:, same].sum(-1).argmin(0)[:, None]
    share = np.take_along_axis(cost, width[None, None], 0)[0].argmin(0)
    return width * cost.shape[1] + share


def bind(histograms: ChannelHistograms, chosen: Ints, scheme: Scheme, places: Ints | None = None) -> MixedQuantizer:
    """The quantizer of one layer's keys or values with the chosen options, codebooks fitted to the channels that share them.

    `places` `[G, D]` are as of `form_groups`; None for widths of channels.
    """
    possible, shares = choices(scheme)
    width_index, share_index = np.divmod(chosen, len(shares))
    widths = np.array(possible)[width_index]
    ranges = np.array([histograms.ranges(share) for share in shares])  # [shares, 2, C]
    scale, zero = ranges[share_index, :, np.arange(len(chosen))].T
    codebooks = {
        int(width): shared_codebook(*histograms.pooled(widths == width, scale, zero), int(width))
        for width in np.unique(widths)
    }
    tables = [torch.from_numpy(np.ascontiguousarray(table)).float() for table in (scale, zero)]
    grouping = None if places is None else torch.from_numpy(places % places.shape[1]).to(torch.uint8)
    widths_table = torch.from_numpy(widths).to(torch.uint8)
    return MixedQuantizer(scheme, codebooks, widths_table, tables[0], tables[1], places=grouping)
