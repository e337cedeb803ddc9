"""Codebooks: golden tables, ties, nearest levels, Q-Norm."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from quant.codebook import Codebook, fit_codebook, int_codebook, match_moments, nf_codebook, nuq_codebook
from quant.kmeans import Histogram

# bitsandbytes' table of QLoRA's NF4, to four digits
NF4 = [
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
]  # fmt: skip

# multiples of 1/256: midpoints of two are exact in float32
levels_lists = st.lists(st.integers(-256, 256), min_size=2, max_size=16).map(
    lambda numbers: torch.tensor(sorted(numbers)) / 256
)


def filled(points: torch.Tensor, masses: torch.Tensor) -> Histogram:
    histogram = Histogram.empty(-1, 1)
    histogram.add(points.numpy(), masses.numpy())
    return histogram


def test_int_levels_are_even_and_include_both_ends() -> None:
    book = int_codebook(4)
    assert torch.allclose(book.levels, torch.tensor([-1, -1 / 3, 1 / 3, 1]), rtol=0, atol=1e-7)
    assert torch.allclose(book.boundaries, torch.tensor([-2 / 3, 0, 2 / 3]), rtol=0, atol=1e-7)


def test_nf4_is_qloras() -> None:
    assert nf_codebook(16).levels.tolist() == pytest.approx(NF4, abs=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nf_levels_are_normal_quantiles_around_an_exact_zero(bits: int) -> None:
    levels = nf_codebook(2**bits).levels
    assert len(levels) == 2**bits
    assert (levels < 0).sum() == 2 ** (bits - 1) - 1
    assert (levels > 0).sum() == 2 ** (bits - 1)
    assert (levels == 0).sum() == 1
    assert (levels[0], levels[-1]) == (-1, 1)
    # undo the scaling: the probabilities of the positive levels and of zero are evenly spaced
    offset = 1 - (1 / 2**bits + 1 / (2**bits - 1)) / 4
    outermost = torch.special.ndtri(torch.tensor(offset, dtype=torch.float64))
    steps = torch.special.ndtr(levels[levels >= 0].double() * outermost).diff()
    assert torch.allclose(steps, steps.mean(), rtol=1e-5)


@pytest.mark.parametrize("levels", [4, 8, 16])
@pytest.mark.parametrize("make", [int_codebook, nf_codebook])
def test_a_tie_goes_to_the_lower_level(make: type, levels: int) -> None:
    book = make(levels)
    lower = torch.arange(levels - 1, dtype=torch.uint8)
    infinity = torch.tensor(math.inf)
    assert torch.equal(book.encode(book.boundaries), lower)
    assert torch.equal(book.encode(torch.nextafter(book.boundaries, infinity)), lower + 1)
    assert torch.equal(book.encode(torch.nextafter(book.boundaries, -infinity)), lower)


@pytest.mark.parametrize("make", [int_codebook, nf_codebook])
def test_values_beyond_the_ends_take_the_end_levels(make: type) -> None:
    codes = make(8).encode(torch.tensor([-math.inf, -1e30, -1.5, 1.5, 1e30, math.inf]))
    assert codes.tolist() == [0, 0, 0, 7, 7, 7]
    assert codes.dtype == torch.uint8


@given(levels_lists, st.lists(st.integers(-1200, 1200), min_size=1))
def test_every_number_goes_to_a_nearest_level(levels: torch.Tensor, numbers: list[int]) -> None:
    book = Codebook.from_levels(levels)
    x = torch.tensor(numbers) / 1024
    distances = (x[:, None] - levels).abs()
    nearest = distances.min(1).values
    assert torch.equal((x - book.decode(book.encode(x))).abs(), nearest)
    # of two levels equally near, the lower
    assert torch.equal(book.decode(book.encode(x)), levels[(distances == nearest[:, None]).int().argmax(1)])


@pytest.mark.parametrize(
    ("levels", "boundaries"),
    [
        pytest.param([0.0, 1.0], [0.25, 0.75], id="too many boundaries"),
        pytest.param([0.0, 1.0, 2.0], [0.5], id="too few boundaries"),
        pytest.param([1.0, 0.0], [0.5], id="descending levels"),
        pytest.param([0.0, 1.0, 2.0], [1.5, 0.5], id="descending boundaries"),
        pytest.param([0.0, math.nan], [0.5], id="NaN"),
        pytest.param([0.0, math.inf], [0.5], id="infinite"),
    ],
)
def test_refuses_tables_that_are_no_codebook(levels: list[float], boundaries: list[float]) -> None:
    with pytest.raises(ValueError, match="codebook"):
        Codebook(torch.tensor(levels), torch.tensor(boundaries))


def test_nuq_puts_its_levels_on_the_only_points_there_are() -> None:
    points = torch.tensor([-1, -0.5, 0.125, 0.25, 0.5, 0.625, 0.75, 1])
    book = nuq_codebook(filled(points.repeat(3), torch.arange(1.0, 25)), 8)
    assert torch.allclose(book.levels, points, rtol=0, atol=1e-7)
    assert torch.equal(book.boundaries, (book.levels[1:] + book.levels[:-1]) / 2)


def test_nuq_without_weight_falls_back_to_int() -> None:
    book = nuq_codebook(Histogram.empty(-1, 1), 8)
    assert torch.equal(book.levels, int_codebook(8).levels)


def test_only_nuq_looks_at_the_data() -> None:
    histogram = filled(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), torch.ones(5))
    assert torch.equal(fit_codebook("int", 4, histogram).levels, int_codebook(4).levels)
    assert torch.equal(fit_codebook("nf", 4, histogram).levels, nf_codebook(4).levels)
    assert fit_codebook("nuq", 4, histogram).levels.min() == pytest.approx(0.1)


@given(
    st.dictionaries(st.integers(-512, 511), st.integers(1, 9), min_size=2, max_size=80),
    st.sampled_from(["int", "nf", "nuq"]),
)
def test_q_norm_matches_mean_and_deviation(counts: dict[int, int], datatype: str) -> None:
    points = (torch.tensor(list(counts), dtype=torch.float64) + 0.5) / 512  # each in a bin of its own
    masses = torch.tensor(list(counts.values()), dtype=torch.float64)
    histogram = filled(points, masses)
    before = fit_codebook(datatype, 4, histogram)
    assume(len(before.encode(points.float()).unique()) > 1)
    after = match_moments(before, histogram, float((masses * points**2).sum()))
    assert torch.equal(after.boundaries, before.boundaries)

    data = points.repeat_interleave(masses.long()).numpy()
    dequantized = after.decode(after.encode(torch.from_numpy(data).float())).double().numpy()
    assert dequantized.mean() == pytest.approx(data.mean(), abs=2e-6)
    assert dequantized.std() == pytest.approx(data.std(), rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("points", [[], [0.25]], ids=["no points", "one level used"])
def test_q_norm_leaves_what_it_cannot_match(points: list[float]) -> None:
    data = torch.tensor(points)
    book = int_codebook(4)
    matched = match_moments(book, filled(data, torch.ones_like(data)), float(np.square(points).sum()))
    assert torch.equal(matched.levels, book.levels)
