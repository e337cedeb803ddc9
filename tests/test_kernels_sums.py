"""Sums of several lanes: in shared memory what they are in plain memory."""

import pytest
import torch
from ptx import in_kernels

pytest.importorskip("triton")

import triton
import triton.language as tl

from deployment.kernels.shared import shared_memory
from deployment.kernels.sums import UNIT, add, add_units, clear, read, read_units, write

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="checked in the interpreter")


@triton.jit
def histogram_kernel(index, x, out, memory, COUNT: tl.constexpr, SUMS: tl.constexpr, SHARED: tl.constexpr):
    """Clear, add twice, halve, and store all sums."""
    number, place = tl.arange(0, COUNT), tl.arange(0, SUMS)
    sums = memory
    if SHARED:
        sums = shared_memory(4 * SUMS)
    clear(sums, SUMS, SHARED)
    for _ in range(2):
        add(sums, tl.load(index + number), tl.load(x + number), SHARED)
    write(sums, place, read(sums, place, SHARED) * 0.5, SHARED)
    tl.store(out + place, read(sums, place, SHARED))


@pytest.mark.parametrize("shared", [False, True])
def test_lanes_that_meet_add_up(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held = in_kernels(monkeypatch) if shared else {}
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 16, (128,), generator=generator, dtype=torch.int32)
    x, out, memory = torch.randn(128, generator=generator), torch.empty(16), torch.full((16,), torch.nan)
    histogram_kernel[(1,)](index, x, out, memory, 128, 16, shared)
    torch.testing.assert_close(out, torch.zeros(16).index_add(0, index, x), rtol=1e-5, atol=1e-5)
    assert bool(held) == shared and memory.isnan().all() == shared


@triton.jit
def units_kernel(index, x, out, COUNT: tl.constexpr, SUMS: tl.constexpr):
    number, place = tl.arange(0, COUNT), tl.arange(0, SUMS)
    sums = shared_memory(4 * SUMS)
    clear(sums, SUMS, True)
    add_units(sums, tl.load(index + number), tl.load(x + number) / UNIT)
    tl.store(out + place, read_units(sums, place))


def test_whole_units_add_up_to_the_same_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    in_kernels(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 16, (128,), generator=generator, dtype=torch.int32)
    x, order = 10 * torch.randn(128, generator=generator), torch.randperm(128, generator=generator)
    out, again = torch.empty(16), torch.empty(16)
    units_kernel[(1,)](index, x, out, 128, 16)
    units_kernel[(1,)](index[order], x[order], again, 128, 16)
    expected = torch.zeros(16).index_add(0, index, x)
    torch.testing.assert_close(out, expected, rtol=0, atol=float(UNIT.value) * 16)
    assert torch.equal(out, again)
