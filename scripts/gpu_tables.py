"""Tables of what was measured on GPUs, from rows of deployment.benchmark, scripts.benchmark_generate and scripts.check_device.

Each is a header and lines of cells. Of rows that measure the same thing, the last counts.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
_EQUAL = ("equal_tokens", "rounded_equal_tokens")


def latest(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """The last row of each key, in the order in which keys first came."""
    return list({key(row): row for row in rows}.values())


def short(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` as `H100`."""
    return device.removeprefix("NVIDIA ").split()[0]


def speed_table(rows: Sequence[Row]) -> Table:
    """Decode attention of one layer from the packed cache against fp16, in one run."""
    lines = []
    rows = [row for row in rows if any(op["op"] == "decode" for op in row["ops"])]
    for row in latest(rows, lambda row: (row["device"], row["shape"], row["batch"], row["scheme"], row["context"])):
        for step in (op for op in row["ops"] if op["op"] == "decode"):
            smaller = row["fp16_bytes_per_token"] / row["bytes_per_token"]
            what = [
                short(row["device"]),
                row["shape"],
                str(row["batch"]),
                row["scheme"],
                f"{row['context']:,}",
                f"{smaller:.1f}x",
            ]
            times = [f"{step['us']:.0f}", f"{step['fp16_us']:.0f}", f"{step['speedup']:.2f}x"]
            lines.append([*what, *times, f"{step['percent_of_copy']:.0f} %"])
    header = [
        "GPU",
        "shape",
        "batch",
        "scheme",
        "context",
        "smaller than fp16",
        "decode, us",
        "fp16, us",
        "faster",
        "of a copy's rate",
    ]
    return header, lines


def generate_table(rows: Sequence[Row]) -> Table:
    """Greedy decoding with whole models: a line for each shape, context and cache."""
    steps = latest(
        [row for row in rows if row["op"] == "decode"],
        lambda row: (row["device"], row["shape"], row["layers"], row["context"], row["cache"], row.get("mode")),
    )
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in steps:
        line = lines.setdefault((short(row["device"]), row["shape"], row["context"], row["cache"]), {})
        line |= {mode: row for mode in ([row["mode"]] if "mode" in row else ["eager", "graph"])}
    cells = []
    for (device, shape, context, cache), modes in sorted(lines.items(), key=lambda line: line[0][0]):
        rates = [_rate(modes[mode]) if mode in modes else "" for mode in ("eager", "graph")]
        sizes = [
            max((row.get(name) or 0 for row in modes.values()), default=0) for name in ("cache_bytes", "peak_bytes")
        ]
        cells.append(
            [device, shape, f"{context:,}", cache, *rates, *(f"{size / 1e9:.1f}" if size else "" for size in sizes)]
        )
    return [
        "GPU",
        "shape",
        "context",
        "cache",
        "tokens/s",
        "tokens/s, CUDA graph",
        "cache, GB",
        "peak memory, GB",
    ], cells


def _rate(row: Row) -> str:
    if "error" in row:
        return row["error"] if row["error"] in ("out of memory", "not installed") else "failed"
    return f"{row['tokens_per_second']:.1f}"


def prefill_table(rows: Sequence[Row]) -> Table:
    """Tokens per second of reading, a column for each size of chunk."""
    chunks = sorted({row["chunk"] for row in rows if row["op"] == "prefill" and "chunk" in row})
    lines: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in rows:
        if row["op"] == "prefill":
            line = lines.setdefault((short(row["device"]), row["shape"], row["context"], row["cache"]), {})
            line |= {chunk: _rate(row) for chunk in ([row["chunk"]] if "chunk" in row else chunks)}
    cells = [
        [device, shape, f"{context:,}", cache, *(line.get(chunk, "") for chunk in chunks)]
        for (device, shape, context, cache), line in sorted(lines.items(), key=lambda line: line[0][0])
    ]
    return ["GPU", "shape", "tokens before", "cache", *(f"chunks of {chunk}" for chunk in chunks)], cells


def sharded_table(rows: Sequence[Row]) -> Table:
    """A model on one GPU and on several: speed, bytes against the plan, tokens."""
    cells = []
    for row in rows:
        gpus = f"{row['world_size']} x {short(row['device'])}"
        what = [row["shape"], row["scheme"], f"{row['context']:,}", row["filled"], gpus]
        held = ", ".join(f"{part['held'] / 2**30:.2f}" for part in row["memory"])
        planned = ", ".join(f"{part['predicted_held'] / 2**30:.2f}" for part in row["memory"])
        equal = {True: "yes", False: "no", None: ""}[row.get("tokens_equal_one_device")]
        cells.append([*what, f"{row['tokens_per_second']:.1f}", held, planned, equal])
    header = ["shape", "scheme", "context", "cache filled by", "GPUs", "tokens/s", "held, GiB", "planned, GiB"]
    return [*header, "tokens as on one GPU"], cells


def processes_table(rows: Sequence[Row]) -> Table:
    """Commands in several processes against one."""
    cells = []
    for row in rows:
        speed = f"{row['speedup']:.2f}x" if "speedup" in row else ""
        same = "yes" if row["identical"] else f"within {row['largest_difference']:.1e}"
        cells.append([row["command"], str(row["world_size"]), short(row["device"]), same, speed])
    return ["command", "processes", "GPU", "equal to one process", "faster"], cells


def device_table(rows: Sequence[Row]) -> Table:
    """A real model on a device, against simulation there and against the CPU."""
    cells = []
    for row in latest(rows, lambda row: (row["device"], row["model"], row["scheme"], row["dtype"])):
        losses = [f"{row['nll_simulated']:.4f}", f"{row['nll_packed']:.4f}", f"{row['nll_difference']:.1e}"]
        # what rounding does on the CPU was not asked of the oldest rows
        equal = [f"{row[name]} of {row['tokens']}" if name in row else "" for name in _EQUAL]
        cells.append([row["device"], row["scheme"], row["dtype"], *losses, *equal])
    header = [
        "device",
        "scheme",
        "dtype",
        "NLL simulated",
        "NLL packed",
        "relative difference",
        "greedy tokens equal to the CPU's",
    ]
    return [*header, "the CPU's own, rounded otherwise"], cells
