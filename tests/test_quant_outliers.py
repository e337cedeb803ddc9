"""Which elements are kept exactly: counts, ties, caps."""

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.outliers import cap_outliers, extreme_elements, outliers_per_end

tied_rows = st.lists(st.integers(-3, 3), min_size=3, max_size=40)


@pytest.mark.parametrize(
    ("channels", "share", "count"),
    [
        (4096, 0.01, 21),
        (1024, 0.01, 6),
        (200, 0.01, 1),
        (201, 0.01, 2),
        (24, 0.01, 1),
        (300, 0.02, 3),
        (64, 0.0, 0),
        (200, 0.07, 7),
        (400, 0.035, 7),
    ],
)
def test_count_per_end(channels: int, share: float, count: int) -> None:
    assert outliers_per_end(channels, share) == count


@pytest.mark.parametrize("channels", [0, 1, 2])
def test_something_is_left_of_the_smallest_groups(channels: int) -> None:
    assert outliers_per_end(channels, 0.1) == 0


@given(st.integers(3, 9000), st.integers(0, 100))
def test_count_per_end_is_the_ceiling_of_the_decimal_share(channels: int, per_mille: int) -> None:
    assert outliers_per_end(channels, per_mille / 1000) == ceil(Fraction(channels * per_mille, 2000))


@given(tied_rows, st.data())
def test_extremes_are_exactly_so_many_and_the_first_among_equals(row: list[int], data: st.DataObject) -> None:
    per_end = data.draw(st.integers(0, (len(row) - 1) // 2))
    by_size = sorted(range(len(row)), key=lambda i: (-row[i], i))
    largest, rest = by_size[:per_end], by_size[per_end:]
    smallest = sorted(rest, key=lambda i: (row[i], i))[:per_end]
    mask = extreme_elements(torch.tensor(row, dtype=torch.float32), per_end)
    assert mask.nonzero().flatten().tolist() == sorted(largest + smallest)


def test_extremes_of_a_constant_token_are_its_first_channels() -> None:
    mask = extreme_elements(torch.full((2, 3, 9), 7.0), 2)
    assert torch.equal(mask, (torch.arange(9) < 4).expand(2, 3, 9))


@pytest.mark.parametrize("tokens", [1, 31, 33, 257])
def test_extremes_count_per_token(tokens: int) -> None:
    x = torch.randn(2, tokens, 40, generator=torch.Generator().manual_seed(tokens)).mul(2).round()
    assert torch.equal(extreme_elements(x, 3).sum(-1), torch.full((2, tokens), 6))


def test_extremes_must_leave_something() -> None:
    with pytest.raises(ValueError, match="3 outliers at each end leave nothing of 6 channels"):
        extreme_elements(torch.randn(4, 6), 3)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=30), st.integers(0, 40))
def test_cap_keeps_the_most_distant_and_the_first_among_equals(elements: list[tuple[bool, int]], cap: int) -> None:
    mask, distance = torch.tensor([e[0] for e in elements]), torch.tensor([float(e[1]) for e in elements])
    candidates = [i for i, (masked, _) in enumerate(elements) if masked]
    expected = sorted(sorted(candidates, key=lambda i: (-elements[i][1], i))[:cap])
    assert cap_outliers(mask, distance, cap).nonzero().flatten().tolist() == expected


def test_cap_is_per_token() -> None:
    mask = torch.tensor([[True, True, True], [False, False, True]])
    capped = cap_outliers(mask, torch.tensor([[1.0, 3.0, 2.0], [9.0, 9.0, 1.5]]), 2)
    assert capped.tolist() == [[False, True, True], [False, False, True]]
