"""First operands of products as they are kept in memory, against which lane of a tensor core takes what; other neighbours."""

import numpy as np
import pytest
import torch
from ptx import in_kernels, run_ptx

pytest.importorskip("triton")

import triton
import triton.language as tl

from deployment.kernels import operands
from deployment.kernels.operands import (
    GLOBAL_OPERAND,
    PLAIN,
    SHARED_OPERAND,
    column_of,
    keep_operand,
    operand,
    place_in_operand,
    row_offset,
)
from deployment.kernels.shared import shared_memory
from deployment.kernels.vectors import four_floats, two_floats

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="checked in the interpreter")
ROWS = [1, 2, 4, 8, 16]


def fragment(lane: int) -> list[tuple[int, int]]:
    """(row, column) of the eight numbers of a 16 x 16 first operand of `mma.m16n8k16` that a lane holds."""
    group, in_group = lane >> 2, lane & 3
    return [
        (group if i < 2 or 4 <= i < 6 else group + 8, 2 * in_group + (i & 1) + (8 if i >= 4 else 0)) for i in range(8)
    ]


@triton.jit
def columns_kernel(out, COLUMNS: tl.constexpr):
    number = tl.arange(0, COLUMNS)
    tl.store(out + number, column_of(number, COLUMNS))


@triton.jit
def places_kernel(out, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(out + row * COLUMNS + column, place_in_operand(row, column, ROWS))


@triton.jit
def kept_kernel(
    x,
    memory,
    out,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ORDERED: tl.constexpr,
    KEEP: tl.constexpr,
    KIND: tl.constexpr,
):
    """Keep `x` as an operand, plainly or in shared memory, and read all of it again as a KIND."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    at = memory
    if KEEP == 2:
        at = shared_memory(4 * COLUMNS * ROWS)
    keep_operand(at, tl.load(x + row * COLUMNS + column), ROWS, ORDERED, KEEP)
    mma_row = tl.arange(0, 16)[:, None]
    tl.store(out + mma_row * COLUMNS + column, operand(at, COLUMNS, ROWS, KIND))


@triton.jit
def neighbours_kernel(x, out, QUICK: tl.constexpr):
    """Eight numbers, in fours and in twos."""
    number = tl.arange(0, 4)
    a, b, c, d = four_floats(x + 4 * (number % 2), QUICK)
    e, f = two_floats(x + 2 * number, QUICK)
    four = tl.where(number < 2, tl.join(a, b).sum(1), tl.join(c, -d).sum(1))
    tl.store(out + number, four)
    tl.store(out + 4 + number, e - 2 * f)


def columns(count: int) -> list[int]:
    out = torch.empty(count, dtype=torch.int32)
    columns_kernel[(1,)](out, count)
    return out.tolist()


def places(count: int, rows: int) -> np.ndarray:
    out = torch.empty(rows, count, dtype=torch.int32)
    places_kernel[(1,)](out, count, rows)
    return out.numpy()


@pytest.mark.parametrize("count", [32, 64, 128, 256])
def test_columns_are_a_permutation_of_every_32(count: int) -> None:
    found = columns(count)
    for start in range(0, count, 32):
        assert sorted(found[start : start + 32]) == list(range(start, start + 32))
    seen = set()
    for s in range(count // 16):  # the hardware's column, and the formula for Triton's
        for h in range(2):
            for q in range(4):
                for e in range(2):
                    number = 32 * (s // 2) + 16 * h + 4 * q + 2 * (s % 2) + e
                    assert found[number] == 16 * s + 8 * h + 2 * q + e
                    seen.add(number)
    assert len(seen) == count


def test_fewer_than_32_columns_keep_their_order() -> None:
    assert columns(16) == list(range(16))


@pytest.mark.parametrize("count", [16, 64])
def test_a_lane_finds_its_fragment_in_eight_numbers(count: int) -> None:
    found = places(count, 16)
    assert sorted(found.ravel()) == list(range(16 * count))
    held = {place: (row, column) for (row, column), place in np.ndenumerate(found)}
    for step in range(count // 16):
        for lane in range(32):
            first = 8 * (32 * step + lane)
            expected = [(row, 16 * step + column) for row, column in fragment(lane)]
            assert [held[first + i] for i in range(8)] == expected


@pytest.mark.parametrize("rows", ROWS[:-1])
def test_few_rows_are_held_once_for_all_lanes_that_repeat_them(rows: int) -> None:
    found = places(64, rows)
    for step in range(4):
        for lane in range(32):
            first = 8 * (4 * rows * step + 4 * (lane // 4 % rows) + lane % 4)
            for i, (row, column) in enumerate(fragment(lane)):
                if row < 8:  # the numbers of rows g + 8 lie behind those of rows g, and are the same
                    assert found[row % rows, 16 * step + column] == first + i
                else:
                    assert found[row % 8 % rows, 16 * step + column] == first + i - 2


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_a_stretch_lie_as_far_behind_its_first_as_said(rows: int) -> None:
    found = places(32, 16)
    for first in range(0, 16, rows):
        for row in range(rows):
            assert (found[first + row] - found[first] == row_offset(row)).all()


def kept(rows: int, count: int, ordered: bool, keep: int, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows, and the operand that is read after they were kept."""
    x = torch.randn(rows, count, generator=torch.Generator().manual_seed(rows + count)).half()
    memory, out = torch.full((32 * count,), torch.nan, dtype=torch.float16), torch.empty(16, count, dtype=torch.float16)
    kept_kernel[(1,)](x, memory, out, count, rows, ordered, keep, kind)
    return x, out


def expected_operand(x: torch.Tensor, ordered: bool) -> torch.Tensor:
    """Rows repeat, and column L is the hardware's `column_of(L)`, where the rows came in the hardware's order."""
    count = x.shape[1]
    shown = x[torch.arange(16) % len(x)]
    return shown[:, columns(count)] if ordered else shown


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("count", [16, 64])
@pytest.mark.parametrize("rows", ROWS)
def test_a_plain_operand_is_read_as_it_was_kept(rows: int, count: int, ordered: bool) -> None:
    x, out = kept(rows, count, ordered, PLAIN.value, PLAIN.value)
    assert torch.equal(out, expected_operand(x, ordered))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("count", [32, 64, 128])
@pytest.mark.parametrize("rows", ROWS)
def test_an_operand_in_shared_memory_is_the_plain_one(
    rows: int, count: int, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = in_kernels(monkeypatch)
    x, out = kept(rows, count, ordered, SHARED_OPERAND.value, SHARED_OPERAND.value)
    assert torch.equal(out, expected_operand(x, ordered))
    first = min(shared)  # rows g + 8 are there, too
    assert sorted(shared) == list(range(first, first + 4 * count * min(rows, 8), 4))


@pytest.mark.parametrize("count", [32, 64, 128])
def test_an_operand_in_global_memory_is_the_plain_one(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_kernels(monkeypatch)
    x, out = kept(16, count, True, PLAIN.value, GLOBAL_OPERAND.value)
    assert torch.equal(out, expected_operand(x, True))


def test_what_is_stored_in_shared_memory_is_what_a_lane_loads() -> None:
    shared: dict[int, int] = {}
    for i in range(2):  # columns 2 q and 2 q + 8 of one row for both row g and g + 8
        run_ptx(operands._STORE_TWICE.value, {"$1": 64 + 8 * i, "$2": 10 + i}, shared)
    loaded = run_ptx(operands._LOAD_SHARED.value, {"$4": 64}, shared)
    assert [loaded[f"${i}"] for i in range(4)] == [10, 10, 11, 11]
    run_ptx(operands._STORE_ONCE.value, {"$1": 68, "$2": 12}, shared)
    assert shared == {64: 10, 68: 12, 72: 11, 76: 11}
    with pytest.raises(ValueError, match="at 72"):  # which a GPU refuses
        run_ptx(operands._LOAD_SHARED.value, {"$4": 72}, shared)


@pytest.mark.parametrize("quick", [False, True])
def test_neighbours_are_those_behind(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if quick:
        in_kernels(monkeypatch)
    x, out = torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128]), torch.empty(8)
    neighbours_kernel[(1,)](x, out, quick)
    assert out.tolist() == [3, 48, -4, -64, -3, -12, -48, -192]
