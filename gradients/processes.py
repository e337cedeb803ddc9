"""The processes of one command: one, or several started by `accelerate launch` or `torchrun`, on CPUs or GPUs."""

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from gradients.cli import UserError


def process_state() -> PartialState:
    """Number and device of this process, and how many there are.

    accelerate looks for a launcher on the CPU only when told that the CPU is meant.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def own_share(count: int) -> range:
    """Which of `count` pieces of work are this process's: every n-th of n processes, maybe none."""
    state = process_state()
    return range(state.process_index, count, state.num_processes)


def gathered(rows: Tensor) -> Tensor:
    """Rows `[n, k]` float64 of all processes, of which each has filled in its `own_share(n)` and left the others zero.

    Zeros change no number they are added to, so this is exact, and what is then summed row by row is the same for any
    number of processes.
    """
    state = process_state()
    if state.num_processes == 1:
        return rows
    return reduce(rows.to(state.device), "sum").to(rows.device)


def require_one_process(command: str, or_else: str = "") -> None:
    """Raise `UserError` under a launcher of several processes, all of which would do the same work, unless `or_else`."""
    if (processes := process_state().num_processes) > 1:
        raise UserError(
            f"{command} is one process's work and {processes} were started; start one, with --device-map to spread "
            f"the model over several GPUs{or_else}"
        )
