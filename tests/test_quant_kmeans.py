"""Weighted 1-D k-means: the optimum by brute force, scikit-learn's as an upper bound, and degenerate inputs."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from quant.kmeans import Floats, Histogram, weighted_error, weighted_kmeans

LABELLINGS = {
    (count, clusters): np.array(list(itertools.product(range(clusters), repeat=count)))
    for count in range(1, 7)
    for clusters in range(1, 4)
}


def brute_force_error(points: Floats, weights: Floats, clusters: int) -> float:
    """The least weighted error over every assignment of points to clusters, contiguous or not."""
    labels = LABELLINGS[len(points), clusters]
    member = (labels[:, None, :] == np.arange(clusters)[None, :, None]).astype(float)  # [labellings, clusters, n]
    mass, moment = member @ weights, member @ (weights * points)
    explained = np.divide(moment**2, mass, out=np.zeros_like(mass), where=mass > 0).sum(1)
    return float((weights * points**2).sum() - explained.max())


weighted_points = st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 5)), min_size=1, max_size=6)


@given(weighted_points, st.integers(1, 3))
def test_is_optimal_among_all_partitions(pairs: list[tuple[int, int]], clusters: int) -> None:
    points, weights = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    centres = weighted_kmeans(points, weights, clusters)
    assert centres.shape == (clusters,)
    assert (np.diff(centres) >= 0).all()
    assert weighted_error(points, weights, centres) == pytest.approx(
        brute_force_error(points, weights, clusters), abs=1e-9
    )


@pytest.mark.parametrize("clusters", [4, 8, 16])
@pytest.mark.parametrize("distribution", ["normal", "uniform", "laplace", "bimodal", "lognormal"])
def test_is_never_worse_than_scikit_learn(distribution: str, clusters: int) -> None:
    rng = np.random.default_rng(0)
    count = 1500
    points = {
        "normal": lambda: rng.normal(size=count),
        "uniform": lambda: rng.uniform(-1, 1, count),
        "laplace": lambda: rng.laplace(size=count),
        "bimodal": lambda: np.where(rng.random(count) < 0.3, rng.normal(-4, 0.1, count), rng.normal(3, 1, count)),
        "lognormal": lambda: rng.lognormal(sigma=1.5, size=count),
    }[distribution]()
    weights = rng.lognormal(sigma=3, size=count)
    baseline = KMeans(clusters, n_init="auto", max_iter=50, random_state=0)
    baseline.fit(points[:, None], sample_weight=weights)
    theirs = weighted_error(points, weights, np.sort(baseline.cluster_centers_[:, 0]))
    ours = weighted_error(points, weights, weighted_kmeans(points, weights, clusters))
    assert ours <= theirs * (1 + 1e-9)


@given(
    st.lists(st.tuples(st.integers(-500, 500), st.integers(-40, 10)), min_size=1, max_size=60),
    st.sampled_from([2, 4, 8, 16]),
)
def test_error_falls_with_more_clusters_whatever_the_weights(pairs: list[tuple[int, int]], clusters: int) -> None:
    points = np.array([point for point, _ in pairs]) / 512
    weights = np.exp2([float(exponent) for _, exponent in pairs])
    few, many = (weighted_kmeans(points, weights, count) for count in (clusters, 2 * clusters))
    assert (len(few), len(many)) == (clusters, 2 * clusters)
    error = weighted_error(points, weights, few)
    assert weighted_error(points, weights, many) <= error * (1 + 1e-9) + 1e-15 * weights.sum()


def test_ignores_order_and_position_of_points() -> None:
    points, weights = np.array([5.0, -3.0, 5.5, 0.25, -2.5]), np.array([1.0, 2.0, 3.0, 4.0, 0.5])
    centres = weighted_kmeans(points, weights, 3)
    assert np.array_equal(weighted_kmeans(points[::-1], weights[::-1], 3), centres)
    assert np.allclose(weighted_kmeans(points + 1000, weights, 3), centres + 1000, rtol=1e-13)
    assert np.allclose(centres, [-2.9, 0.25, 5.375], rtol=1e-13)


def test_a_large_common_offset_does_not_cancel() -> None:
    points = 1e6 + np.array([0.0, 0.001, 1.0, 1.001])
    assert np.allclose(weighted_kmeans(points, np.ones(4), 2) - 1e6, [0.0005, 1.0005], atol=1e-6)


@pytest.mark.parametrize("clusters", [1, 2, 3, 5])
def test_fewer_distinct_points_than_clusters_repeat_the_last(clusters: int) -> None:
    centres = weighted_kmeans(np.array([2.0, -1.0, 2.0, -1.0]), np.array([1.0, 3.0, 1.0, 1.0]), clusters)
    assert np.allclose(centres, [-0.0] if clusters == 1 else [-1.0] + [2.0] * (clusters - 1), atol=1e-15)


def test_points_of_zero_weight_attract_no_centre() -> None:
    points = np.array([-9.0, 0.0, 1.0, 2.0, 9.0])
    assert np.array_equal(weighted_kmeans(points, np.array([0.0, 1, 1, 1, 0.0]), 3), [0.0, 1.0, 2.0])


def test_all_weights_zero_count_alike() -> None:
    points = np.array([0.0, 1.0, 10.0, 11.0])
    assert np.array_equal(weighted_kmeans(points, np.zeros(4), 2), [0.5, 10.5])


@pytest.mark.parametrize(
    ("points", "weights", "clusters"),
    [
        pytest.param([0.0, 1e-9, 2e-9, 1.0], [1.0] * 4, 3, id="points closer than rounding of the prefix sums"),
        pytest.param(np.linspace(-1, 1, 20), [1.0] * 10 + [1e-20] * 10, 16, id="weights of vastly different size"),
    ],
)
def test_gives_as_many_centres_as_asked_for(points: list[float], weights: list[float], clusters: int) -> None:
    """A codebook of L levels needs L numbers, even where another cluster gains next to nothing."""
    centres = weighted_kmeans(np.array(points), np.array(weights), clusters)
    assert len(centres) == clusters
    assert (np.diff(centres) >= 0).all()
    assert weighted_error(np.array(points), np.array(weights), centres) <= 1e-15


@pytest.mark.parametrize(
    ("points", "weights"),
    [
        pytest.param([], [], id="no points"),
        pytest.param([0.0, np.nan], [1.0, 1.0], id="NaN point"),
        pytest.param([0.0, np.inf], [1.0, 1.0], id="infinite point"),
        pytest.param([0.0, 1.0], [1.0, np.nan], id="NaN weight"),
        pytest.param([0.0, 1.0], [1.0, np.inf], id="infinite weight"),
        pytest.param([0.0, 1.0], [1.0, -1.0], id="negative weight"),
    ],
)
def test_refuses_bad_input(points: list[float], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="k-means needs"):
        weighted_kmeans(np.array(points), np.array(weights), 2)


def test_histogram_means_are_exact() -> None:
    rng = np.random.default_rng(0)
    points, weights = rng.integers(-64, 65, 500) / 64, rng.integers(0, 9, 500).astype(float)
    histogram = Histogram.empty(-1, 1, bins=8)
    histogram.add(points[:123], weights[:123])
    histogram.add(points[123:], weights[123:])
    bins = np.minimum(((points + 1) * 4).astype(int), 7)  # 1.0 belongs to the last bin
    masses = np.array([weights[bins == index].sum() for index in range(8)])
    moments = np.array([(weights * points)[bins == index].sum() for index in range(8)])
    means, held = histogram.points()
    assert np.array_equal(held, masses)
    assert np.array_equal(means, moments / masses)


def test_histogram_of_float32_data_accumulates_in_float64() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, 400).astype(np.float32)
    weights = rng.lognormal(sigma=3, size=400).astype(np.float32)
    histogram = Histogram.empty(-1, 1, bins=1)
    histogram.add(points, weights)
    (mean,), _ = histogram.points()
    assert mean == pytest.approx(np.average(points.astype(float), weights=weights.astype(float)), rel=1e-12)


def test_histogram_keeps_the_smallest_weights() -> None:
    """Fisher times squared scale can be subnormal in float32; its product with a point must not become zero."""
    histogram = Histogram.empty(-1, 1)
    histogram.add(np.array([0.001], dtype=np.float32), np.array([1e-43], dtype=np.float32))
    means, _ = histogram.points()
    assert means == pytest.approx([0.001], rel=1e-6)


def test_histogram_leaves_empty_bins_out() -> None:
    histogram = Histogram.empty(-1, 1, bins=4)
    histogram.add(np.array([-0.75, -0.7, 0.9]), np.array([1.0, 0.0, 2.0]))
    means, masses = histogram.points()
    assert np.array_equal(means, [-0.75, 0.9])
    assert np.array_equal(masses, [1.0, 2.0])


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_histogram_refuses_an_empty_range(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="range"):
        Histogram.empty(low, high)
