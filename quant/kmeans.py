"""Exact weighted k-means in one dimension.

Sorted, the optimal clusters are intervals, so dynamic programming finds the global optimum:

    best[k](j) = min_{i <= j}  best[k-1](i) + cost(i, j),    cost(i, j) = weighted variance of points i..j-1

Prefix sums give cost(i, j) in constant time, and the best i grows with j, so each of the k rounds is solved by
divide and conquer in O(n log n), all spans of one depth at once. Many points are first merged into a
fine histogram whose bins keep their exact mean; a bin is the only thing the search cannot split.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DEFAULT_BINS = 8192


@dataclass
class Histogram:
    """Weighted points of [low, high] merged into bins of equal width; it can be filled piece by piece."""

    low: float
    high: float
    mass: Floats  # [bins] sum of weights
    moment: Floats  # [bins] sum of weight * point

    @classmethod
    def empty(cls, low: float, high: float, bins: int = DEFAULT_BINS) -> "Histogram":
        """No points yet. Raises ValueError for an empty range."""
        if not low < high:
            raise ValueError(f"histogram range {low=} {high=} is empty")
        return cls(low, high, np.zeros(bins), np.zeros(bins))

    def add(self, points: NDArray[np.floating], weights: NDArray[np.floating]) -> None:
        """Count points `[n]`, all within the range, with their weights `[n]`."""
        bins = len(self.mass)
        index = ((points - self.low) * (bins / (self.high - self.low))).astype(np.int64)
        np.clip(index, 0, bins - 1, out=index)
        self.mass += np.bincount(index, weights, bins)
        self.moment += np.bincount(index, np.multiply(weights, points, dtype=np.float64), bins)

    def points(self) -> tuple[Floats, Floats]:
        """(means, masses) of the bins that hold weight, ascending."""
        held = self.mass > 0
        return self.moment[held] / self.mass[held], self.mass[held]


def weighted_kmeans(points: Floats, weights: Floats, clusters: int) -> Floats:
    """The `clusters` centres, ascending, that minimise `sum_i w_i (x_i - nearest centre)^2`; exact.

    Args:
        points: `[n]`, in any order.
        weights: `[n]`, not negative; if all are zero, every point counts alike.

    With fewer distinct points than clusters the last point is repeated. Raises ValueError for no points, for
    numbers that are not finite and for negative weights.
    """
    points, weights = np.asarray(points, np.float64), np.asarray(weights, np.float64)
    if not len(points):
        raise ValueError("k-means needs at least one point")
    if not (np.isfinite(points).all() and np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("k-means needs finite points and finite weights that are not negative")
    if not weights.any():
        weights = np.ones_like(weights)
    x, w = _merge_equal(points[weights > 0], weights[weights > 0])
    if len(x) <= clusters:
        return np.concatenate([x, np.full(clusters - len(x), x[-1])])
    cuts = _optimal_cuts(x, w, clusters)
    mass = np.add.reduceat(w, cuts)
    centres = np.add.reduceat(w * x, cuts) / mass
    # where one more cluster gains less than rounding, the search may leave it empty
    return np.concatenate([centres, np.full(clusters - len(centres), centres[-1])])


def weighted_error(points: Floats, weights: Floats, centres: Floats) -> float:
    """`sum_i w_i (x_i - nearest centre)^2` for ascending centres."""
    nearest = np.searchsorted((centres[1:] + centres[:-1]) / 2, points)
    return float(np.sum(weights * (points - centres[nearest]) ** 2))


def _merge_equal(points: Floats, weights: Floats) -> tuple[Floats, Floats]:
    x, inverse = np.unique(points, return_inverse=True)
    return x, np.asarray(np.bincount(inverse, weights, len(x)), np.float64)


def _optimal_cuts(x: Floats, w: Floats, clusters: int) -> NDArray[np.int64]:
    """First index of each cluster of the optimal partition of ascending points."""
    # centred points keep the differences of prefix sums from cancelling
    x = x - np.average(x, weights=w)
    mass, first = (np.concatenate([[0.0], np.cumsum(w * x**power)]) for power in (0, 1))
    # cost(i, j) is what one cluster at zero would cost less gain(i, j), so that the gains are all that matters
    lowered = -np.divide(first**2, mass, out=np.zeros_like(mass), where=mass > 0)
    split_of: list[NDArray[np.int64]] = []
    for _ in range(1, clusters):
        lowered, split = _next_round(lowered, mass, first)
        split_of.append(split)
    cuts = [len(x)]
    for split in reversed(split_of):
        cuts.append(int(split[cuts[-1]]))
    return np.array(sorted({0, *cuts[1:]}), dtype=np.int64)


def _next_round(lowered: Floats, mass: Floats, first: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """One more cluster, for every end j at once.

    Returns the least `lowered[i] - gain(i, j)` with `gain(i, j) = (first[j] - first[i])^2 / (mass[j] - mass[i])`, and the
    least i that attains it, both `[n + 1]`.
    """
    n = len(lowered) - 1
    value, split = np.empty(n + 1), np.zeros(n + 1, np.int64)
    # spans of ends still to solve, each with the range in which its splits must lie
    low, high = np.array([0]), np.array([n])
    split_low, split_high = np.array([0]), np.array([n])
    while len(low):
        middle = (low + high) // 2
        lengths = np.minimum(split_high, middle) - split_low + 1
        offsets = np.cumsum(lengths) - lengths
        candidates = np.arange(offsets[-1] + lengths[-1]) + np.repeat(split_low - offsets, lengths)
        moment = np.repeat(first[middle], lengths) - first[candidates]
        weight = np.repeat(mass[middle], lengths) - mass[candidates]
        gain = np.divide(moment * moment, weight, out=np.zeros_like(weight), where=weight > 0)
        totals = lowered[candidates] - gain
        least = np.minimum.reduceat(totals, offsets)
        found = np.minimum.reduceat(np.where(totals == np.repeat(least, lengths), candidates, n), offsets)
        value[middle], split[middle] = least, found
        left, right = low < middle, middle < high
        low, high, split_low, split_high = (
            np.concatenate([low[left], middle[right] + 1]),
            np.concatenate([middle[left] - 1, high[right]]),
            np.concatenate([split_low[left], found[right]]),
            np.concatenate([found[left], split_high[right]]),
        )
    return value, split
