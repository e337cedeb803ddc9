"""The main README's three numbers and three small tables, from the rows of which `scripts/results/README.md` shows all."""

import math
from collections.abc import Sequence
from typing import Any

from scripts.report.gpu_tables import latest, short

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

_QUALITY = [
    "nuq4-1%",
    "nuq3-1%",
    "nuq2-1%",
    "nuq3+fb",
    "rdnuq3.4+fb",
    "rdnuq2.4+fb",
    "turbo3",
    "kivi2 residual_tokens=0",
]
_METHODS = {"nuq": "KVQuant", "rdnuq": "ours", "turbo": "TurboQuant", "kivi": "KIVI, no exact window"}
_TIMED = ("nuq4", "nuq3", "nuq2")
_SHAPES = ("llama-7b", "llama-3-8b")
_OURS, _THEIRS, _BEST = "nuq3+fb", "nuq3-1%", "rdnuq3.4+fb"
_CONTEXTS = [4096, 16_384, 131_072]
_LONG_CACHES = ("fp16", "rdnuq3.4+fb")
_LONG = 131_072  # tokens
_CPU_CACHES = ("dynamic", "hqq4", "nuq4-1%")


def headline(schemes: Sequence[Row], gpu: Sequence[Row]) -> str:
    """Memory, quality and speed, as a list of three points."""
    by_name = {row["scheme"]: row for row in schemes}
    ours, theirs, best = (by_name[name] for name in (_OURS, _THEIRS, _BEST))
    reads_as = _OURS.removesuffix("+fb")  # feedback changes what is stored, not how it is read
    timed = [
        row
        for row in _decode_rows(gpu)
        if (row["scheme"], row["context"]) == (reads_as, _LONG) and row["shape"] in _SHAPES
    ]
    speeds = " and ".join(f"{_decode(row)['speedup']:.1f}x ({row['shape']}'s shape)" for row in timed)
    return (
        f"- **{16 / ours['bits_per_element']:.1f}x smaller** than fp16: {ours['bits_per_element']:.2f} bits per element "
        f"(`{_OURS}`, ours), everything counted\n"
        f"- **{_change(ours)} perplexity** there, where the paper's `{_THEIRS}` costs {_change(theirs)} "
        f"at {theirs['bits_per_element']:.2f} bits, and ours of that size, `{_BEST}`, {_change(best)}\n"
        f"- **faster** than fp16: decode attention at {_LONG:,} tokens {speeds}, one {short(timed[0]['device'])}\n"
    )


def quality_table(schemes: Sequence[Row]) -> Table:
    """Few schemes: bits, perplexity, and how often the most likely token stays."""
    by_name = {row["scheme"]: row for row in schemes}
    cells = [["fp32 cache", "", "32", f"{_unquantized(schemes[0]):.2f}", "", "100 %"]]
    for row in sorted((by_name[name] for name in _QUALITY), key=lambda row: float(row["bits_per_element"])):
        name = row["scheme"].split()[0]
        method = "ours" if "+fb" in name else _METHODS[name.rstrip("0123456789.-%")]
        figures = [f"{row['bits_per_element']:.2f}", f"{row['perplexity']:.2f}", _change(row)]
        cells.append([f"`{name}`", method, *figures, f"{100 * row['top1_agreement']:.1f} %"])
    return ["scheme", "method", "bits/element", "perplexity", "change", "top-1 agreement"], cells


def speed_table(gpu: Sequence[Row]) -> Table:
    """Decode attention of one layer, as a multiple of fp16's speed: a column for each context."""
    lines: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in (row for row in _decode_rows(gpu) if row["scheme"] in _TIMED and row["shape"] in _SHAPES):
        line = lines.setdefault((short(row["device"]), row["shape"], row["scheme"]), {})
        line[row["context"]] = f"{_decode(row)['speedup']:.2f}x"
    cells = [
        [device, shape, f"`{scheme}`", *(line.get(context, "") for context in _CONTEXTS)]
        for (device, shape, scheme), line in sorted(
            lines.items(), key=lambda line: (*line[0][:2], _TIMED.index(line[0][2]))
        )
    ]
    return ["GPU", "shape", "scheme", *(f"{context:,} tokens" for context in _CONTEXTS)], cells


def long_table(generate: Sequence[Row], sharded: Sequence[Row], cpu: Sequence[Row]) -> Table:
    """Long contexts that were decoded from, beside fp16 where it fits, and the longest asked for on several GPUs."""
    cells = []
    steps = [row for row in generate if row["op"] == "decode" and row.get("mode", "graph") == "graph"]
    fitted = {row["shape"] for row in steps if (row["context"], row["cache"]) == (_LONG, "fp16") and "error" not in row}
    for row in latest(steps, lambda row: (row["device"], row["shape"], row["context"], row["cache"])):
        beside = row["context"] == _LONG and row["cache"] in _LONG_CACHES and row["shape"] in fitted
        if row["context"] > _LONG or (beside and "error" not in row):
            size = f"{row['cache_bytes'] / 1e9:.1f} GB" if row.get("cache_bytes") else ""
            cells.append(_long_line(row, short(row["device"]), row["shape"], size))
    if several := [row for row in sharded if row["world_size"] > 1 and row["asked"] != "longest"]:
        row = max(several, key=lambda row: (row["context"], row["tokens_per_second"]))
        gpus = f"{row['world_size']} x {short(row['device'])}"
        cells.append(_long_line({**row, "cache": row["scheme"]}, gpus, row["shape"], ""))
    timed = [row for row in cpu if (row["dtype"], row["measured"]) == ("bfloat16", "decode")]
    longest = max(row["context"] for row in timed)
    sizes = {
        row["cache"]: row["cache_bytes"] for row in cpu if (row["context"], row["measured"]) == (longest, "prefill")
    }
    for row in timed:
        if row["context"] == longest and row["cache"] in _CPU_CACHES:
            rate = {"tokens_per_second": row["tokens_per_cpu_second"]}
            cells.append(_long_line({**row, **rate}, "CPU", "smollm2", f"{sizes[row['cache']] / 1e6:.0f} MB"))
    return ["device", "model", "context", "cache", "cache size", "tokens/s"], cells


def _long_line(row: Row, device: str, model: str, size: str) -> list[str]:
    rate = row["error"] if "error" in row else f"{row['tokens_per_second']:.1f}"
    return [device, model, f"{row['context']:,}", f"`{row['cache']}`", size, rate]


def _decode_rows(gpu: Sequence[Row]) -> list[Row]:
    """The last row of each cell that timed a decode step of one sequence."""
    timed = [row for row in gpu if row["batch"] == 1 and any(op["op"] == "decode" for op in row["ops"])]
    return latest(timed, lambda row: (row["device"], row["shape"], row["scheme"], row["context"]))


def _decode(row: Row) -> Row:
    step: Row = next(op for op in row["ops"] if op["op"] == "decode")
    return step


def _unquantized(row: Row) -> float:
    return math.exp(row["baseline_nll"])


def _change(row: Row) -> str:
    return f"{100 * (row['perplexity'] / _unquantized(row) - 1):+.1f} %"
