"""Host side of sums.cu: the memory that the GPUs of a tensor-parallel model write to each other, and what they exchange there."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from deployment.kernels import launch
from deployment.kernels.decode.compile import available, runner
from deployment.kernels.launch import ELEMENTS, INT, LONG, POINTER, Run, addresses, structure
from gradients.parallel import Part

MOST_WORDS = 1 << 16  # of 4 bytes in one sum: beyond it the library's takes no longer
MOST_PARTS = 8
_THREADS = 256
Params = structure(
    "Params",
    ("inboxes", POINTER * MOST_PARTS),
    ("own result rounds", POINTER),
    ("capacity", LONG),
    ("words number element gathers", INT),
)


@dataclass(frozen=True)
class Shape(launch.Shape):
    """What sums.cu is compiled for."""

    FILE = "sums.cu"

    parts: int


class Sums:
    """What the processes of one group have, added up or side by side, for number `number` of them; all ask for the same in the same order.

    Args:
        inboxes: addresses of everybody's inbox, as this process sees them, each of `2 * len(inboxes) * capacity` int64, zero at first.
        capacity: words of 4 bytes that each has at most.
    """

    def __init__(self, run: Run, inboxes: Sequence[int], number: int, capacity: int, device: torch.device) -> None:
        self._run, self._shape = run, Shape(len(inboxes))
        self.parts, self.number = len(inboxes), number
        self._inboxes, self._capacity = list(inboxes), capacity
        self._rounds = torch.zeros(-(-capacity // _THREADS), dtype=torch.int32, device=device)

    def takes(self, numbers: int, dtype: torch.dtype) -> bool:
        """Whether each process can exchange this many `numbers` here."""
        size = numbers * dtype.itemsize
        return dtype in ELEMENTS and size % 4 == 0 and size <= 4 * self._capacity

    def __call__(self, part: Tensor) -> Tensor:
        """The sum of all processes' `part`, contiguous; the device is not waited for."""
        return self._exchange(part, torch.empty_like(part), gathers=False)

    def gathered(self, part: Tensor) -> Tensor:
        """All processes' `part` `[...]`, contiguous, one after another: `[N, ...]`."""
        return self._exchange(part, part.new_empty(self.parts, *part.shape), gathers=True)

    def _exchange(self, part: Tensor, result: Tensor, gathers: bool) -> Tensor:
        words = part.nbytes // 4
        params = Params(
            **addresses(own=part, result=result, rounds=self._rounds), capacity=self._capacity, words=words, number=self.number,
            element=ELEMENTS[part.dtype], gathers=gathers,
        )  # fmt: skip
        params.inboxes[: self.parts] = self._inboxes
        self._run("exchange", self._shape, -(-words // _THREADS), _THREADS, 0, params)
        return result


_opened: dict[str, tuple[Sums | None, Tensor | None]] = {}  # by group; the inbox is kept as long as the process lives


def opened(group: ProcessGroup, device: torch.device) -> Sums | None:
    """The sums of a group's processes, each with a GPU of its own; None where these cannot write to each other's memory.

    All of them call it at once.
    """
    if group.group_name not in _opened:
        _opened[group.group_name] = _open(group, device)
    return _opened[group.group_name][0]


def already_opened(part: Part) -> Sums | None:
    """Those in which this process is that part, if there are any."""
    found = (sums for sums, _ in _opened.values() if sums is not None)
    return next((sums for sums in found if (sums.number, sums.parts) == (part.number, part.count)), None)


def _open(group: ProcessGroup, device: torch.device) -> tuple[Sums | None, Tensor | None]:
    parts, inbox, pointers = group.size(), None, []
    able = parts <= MOST_PARTS and available(device) and _is_linked(device, parts)
    if _all(able, group, device):
        import torch.distributed._symmetric_memory as symmetric

        try:
            inbox = symmetric.empty(2 * parts * MOST_WORDS, dtype=torch.int64, device=device)
            pointers = list(symmetric.rendezvous(inbox, group.group_name).buffer_ptrs)
            inbox.zero_()
        except RuntimeError:
            inbox = None
        torch.cuda.synchronize(device)
        if _all(inbox is not None, group, device):  # and all inboxes are empty by now
            return Sums(runner(device), pointers, group.rank(), MOST_WORDS, device), inbox
    return None, None


def _is_linked(device: torch.device, parts: int) -> bool:
    """Whether all processes are on this host, where a GPU can write to the memory of all others that are visible."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", parts))  # as torchrun says
    others = set(range(torch.cuda.device_count())) - {device.index}
    return parts == here <= torch.cuda.device_count() and all(
        torch.cuda.can_device_access_peer(device, other) for other in others
    )


def _all(able: bool, group: ProcessGroup, device: torch.device) -> bool:
    """Whether everybody is."""
    said = torch.tensor(int(able), device=device)
    torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MIN, group)
    return bool(said.item())
