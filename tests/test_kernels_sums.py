"""Sums of a tensor-parallel model's processes: sums.cu as host C++, one process after the other."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernels_on_cpu import has_compiler, run, sizes
from torch import Tensor

from deployment.kernels.sums import Params, Shape, Sums

_CAPACITY = 600
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs g++")


@pytest.fixture
def processes() -> Callable[[int], tuple[list[Sums], Tensor]]:
    def make(parts: int) -> tuple[list[Sums], Tensor]:
        inboxes = torch.zeros(parts, 2, parts, _CAPACITY, dtype=torch.int64)
        places = [inbox.data_ptr() for inbox in inboxes]
        return [Sums(run, places, number, _CAPACITY, CPU) for number in range(parts)], inboxes

    return make


def _deliver(part: Tensor, sender: int, inbox: Tensor, rounds: Tensor) -> None:
    """What `sender` will have stored in an inbox `[2, PARTS, capacity]`, before it has its turn here."""
    words = part.flatten().view(torch.int32).long() & 0xFFFFFFFF
    of_word = rounds.repeat_interleave(256)[: len(words)].long() + 1
    for parity in (0, 1):
        mine = of_word % 2 == parity
        inbox[parity, sender, : len(words)][mine] = (of_word << 32 | words)[mine]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parts", [2, 3])
def test_all_processes_have_the_sum_of_all_parts(processes: Any, parts: int, dtype: torch.dtype) -> None:
    sums, inboxes = processes(parts)
    generator = torch.Generator().manual_seed(0)
    for size in (600, 40, 1200, 2, 600):  # blocks take part in different numbers of rounds
        numbers = size if dtype != torch.float32 else size // 2
        states = [torch.randn(1, numbers, generator=generator).to(dtype) for _ in range(parts)]
        for later in range(1, parts):
            for earlier in range(later):
                _deliver(states[later], later, inboxes[earlier], sums[later]._rounds)
        totals = [own(state) for own, state in zip(sums, states, strict=True)]  # the earlier send to the later
        expected = torch.stack(states).float().sum(0).to(dtype)
        torch.testing.assert_close(totals[0], expected)
        assert all(torch.equal(total, totals[0]) for total in totals)


def test_all_processes_have_the_parts_of_all_in_their_order(processes: Any) -> None:
    sums, inboxes = processes(2)
    for size in (64, 1200):
        states = [torch.randn(size // 4, 1, 4).half() for _ in range(2)]
        _deliver(states[1], 1, inboxes[0], sums[1]._rounds)
        for own in sums:
            assert torch.equal(own.gathered(states[own.number]), torch.stack(states))


def test_what_is_taken(processes: Any) -> None:
    own = processes(2)[0][0]
    assert own.takes(1200, torch.float16) and own.takes(600, torch.float32)
    assert not own.takes(1202, torch.float16) and not own.takes(601, torch.float32)
    assert not own.takes(3, torch.float16) and not own.takes(4, torch.float64)


def test_c_and_python_have_the_same_parameters() -> None:
    assert sizes(Shape(2)) == [ctypes.sizeof(Params)]
