"""Numbers that were found by measuring, not by reasoning, with the device and the day.

Measured on one layer, one query to a KV head (LLaMA-7B, 32 heads of 128) or four (Llama-3-8B), 131072 tokens, 1 % outliers, in us. What is compared was
timed in one run. `python -m deployment.benchmark --tune entries=256` times others. A device that is not listed takes the nearest older one's, and one that is
older than all the same numbers, untried.

    H100, 2026-11-26                           LLaMA-7B, 4 bits    2 bits    Llama-3-8B, 4 bits    2 bits
        chunks of 512                                       357       331                   212       198
        128 registers, 4 programs                           461       392                   238       222
        256 outliers at a time                              386       356
        chunks of 256                                       414                             184       182
        2 blocks of words ahead instead of 4 (2 bits)                 328 instead of 343

So chunks are halved from four queries on (`schedule.chunk_tokens`), and where a program would not fill one. With parts that are alike (schedule.py) it is still so: chunks of
512 / 256 / 128 tokens took 184 / 154 / 157 us of Llama-3-8B at 2 bits. At 2048 tokens of LLaMA-7B, 2 bits, they took 26 / 23 / 25 us, of a kernel before this one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch

LEAST_CHUNK = 128  # tokens of a pair of blocks: they are taken two at a time


@dataclass(frozen=True)
class Tuning:
    """How the decode kernel runs on a kind of GPU."""

    registers: int  # of a lane at most
    waves: int  # programs per multiprocessor
    chunk: int  # tokens between two phases, at most
    entries: int  # outliers at a time
    stages: int  # blocks of words on their way, at most

    def __post_init__(self) -> None:
        powers = all(number & (number - 1) == 0 for number in (self.chunk, self.entries, self.stages))
        if not (
            powers
            and self.chunk >= LEAST_CHUNK
            and min(self.entries, self.stages) > 0
            and self.registers > 0
            and self.waves > 0
        ):
            raise ValueError(
                f"{self}: chunk ({LEAST_CHUNK} or more), entries and stages must be powers of two, the others positive"
            )


_MEASURED = {90: Tuning(registers=168, waves=3, chunk=512, entries=128, stages=4)}
_ELSEWHERE = _MEASURED[90]  # untried


_changes: dict[str, int | bool] = {}


@contextmanager
def tuned(**changes: int | bool) -> Iterator[None]:
    """Within, kernels run with other numbers than those found, such as `entries=256`.

    Raises TypeError for names that `Tuning` does not have, and ValueError for numbers that it does not take.
    """
    global _changes
    replace(_ELSEWHERE, **changes)  # type: ignore[arg-type]  # nothing runs before names and numbers are checked
    before, _changes = _changes, {**_changes, **changes}
    try:
        yield
    finally:
        _changes = before


def tuning_of(device: torch.device) -> Tuning:
    """For a device; the interpreter takes what unlisted GPUs take."""
    found = _found_for(device)
    return replace(found, **_changes) if _changes else found  # type: ignore[arg-type]


@cache
def _found_for(device: torch.device) -> Tuning:
    if device.type != "cuda":
        return _ELSEWHERE
    major, minor = torch.cuda.get_device_capability(device)
    return tuning_for(10 * major + minor)


def tuning_for(capability: int) -> Tuning:
    """For GPUs of a compute capability, such as 80 or 90, which need not be there."""
    older = [measured for measured in _MEASURED if measured <= capability]
    return _MEASURED[max(older)] if older else _ELSEWHERE
