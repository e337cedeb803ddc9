"""Which elements are kept exactly: counts, ties, caps."""

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant.outliers import cap_outliers, extreme_elements, outliers_per_end

tied_rows = st.lists(st.integers(-3, 3), min_size=3, max_size=40)


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
