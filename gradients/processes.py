"""The processes of one command: one, or several started by `accelerate launch` or `torchrun`, on CPUs or GPUs."""

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """Number and device of this process, and how many there are.

    accelerate looks for a launcher on the CPU only when told that the CPU is meant.
    """
    return PartialState(cpu=not torch.accelerator.is_available())
