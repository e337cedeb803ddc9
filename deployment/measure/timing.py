"""Timing on a device: mean and error of a call, and copy bandwidth.

Calls are visited in turn, and on CUDA a graph of them is replayed, so that launches cost nothing; but for what no graph
is made of in use.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

_SECONDS = 0.3  # of measuring each
_MOMENT = 0.02  # of finding out which is worth measuring
_REPEATS = 10
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}  # of one copy: less does not reach the memory's rate
_COPIES = 4


def microseconds(
    calls: Sequence[Callable[[], object]], device: torch.device, seconds: float = _SECONDS, recorded: bool = True
) -> tuple[float, float]:
    """(mean, standard error) of one call, all of them made in turn for about `seconds`; on CUDA `recorded` in a graph."""
    for call in calls[:2]:
        call()
    run = _graph(calls) if recorded and device.type == "cuda" else lambda: [call() for call in calls]
    times = [_timed(run, 1, device)]
    count = max(1, int(seconds / _REPEATS / max(times[0], 1e-7)))
    times = [_timed(run, count, device) / len(calls) for _ in range(_REPEATS if device.type == "cuda" else 3)]
    return statistics.mean(times) * 1e6, statistics.stdev(times) / math.sqrt(len(times)) * 1e6


def fastest(
    ways: Mapping[str, Sequence[Callable[[], object]]], device: torch.device, recorded: bool = True
) -> tuple[str, float]:
    """(name, microseconds of a call) of the way that takes the least; those that raise RuntimeError are none.

    With several, each is first timed for a moment. Raises RuntimeError when there is none.
    """
    quick: dict[str, float] = {}
    for name, calls in ways.items():
        try:
            quick[name] = microseconds(calls, device, _MOMENT, recorded)[0] if len(ways) > 1 else 0.0
        except RuntimeError as error:
            print(f"{name} is left out: {(str(error).strip().splitlines() or ['no reason given'])[0]}", file=sys.stderr)
    if not quick:
        raise RuntimeError(f"none of {', '.join(ways)} runs on {device}")
    best = min(quick, key=lambda name: quick[name])
    return best, microseconds(ways[best], device, recorded=recorded)[0]


def _graph(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    # or else a call would run beside one that is still running on the same layer, as on a GPU that is shared
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _timed(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of one run."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - started) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def copy_rate(device: torch.device) -> float:
    """Bytes per second read and written, at best: by copies, or by a kernel that reads and writes as much."""
    size = _COPY_BYTES[device.type] // 8
    pairs = [torch.zeros(2, size, dtype=torch.int64, device=device).unbind() for _ in range(_COPIES)]
    ways: list[list[Callable[[], object]]] = [
        [partial(target.copy_, source) for source, target in pairs],
        [partial(torch.bitwise_not, source, out=target) for source, target in pairs],
    ]
    return max(2 * 8 * size / microseconds(calls, device)[0] * 1e6 for calls in ways)
