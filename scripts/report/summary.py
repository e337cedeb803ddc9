"""The main README's three numbers and three small tables, from the rows of which `scripts/results/README.md` shows all."""

import math
from collections.abc import Sequence

from scripts.report.cells import Line, Row, latest, line, percent, short
from scripts.report.gpu_tables import decode_step, latest_decode_rows

_QUALITY = (
    "nuq4-1%",
    "nuq3-1%",
    "nuq2-1%",
    "nuq3+fb",
    "rdnuq3.4+fb",
    "rdnuq2.4+fb",
    "turbo3",
    "kivi2 residual_tokens=0",
)
_METHODS = {"nuq": "KVQuant", "rdnuq": "ours", "turbo": "TurboQuant", "kivi": "KIVI, no exact window"}
_TIMED = ("nuq4", "nuq3", "nuq2", "rdnuq2.4")
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
        for row in _of_one_sequence(gpu)
        if (row["scheme"], row["context"]) == (reads_as, _LONG) and row["shape"] in _SHAPES
    ]
    speeds = " and ".join(f"{decode_step(row)['speedup']:.1f}x ({row['shape']}'s shape)" for row in timed)
    return (
        f"- **{16 / ours['bits_per_element']:.1f}x smaller** than fp16: {ours['bits_per_element']:.2f} bits per element "
        f"(`{_OURS}`, ours), everything counted\n"
        f"- **{_change(ours)} perplexity** there, where the paper's `{_THEIRS}` costs {_change(theirs)} "
        f"at {theirs['bits_per_element']:.2f} bits, and ours of that size, `{_BEST}`, {_change(best)}\n"
        f"- **faster** than fp16: decode attention at {_LONG:,} tokens {speeds}, one {short(timed[0]['device'])}\n"
    )


def quality_table(schemes: Sequence[Row]) -> list[Line]:
    """Few schemes: bits, perplexity, and how often the most likely token stays."""
    columns = {"scheme": "{scheme}", "method": "{method}", "bits/element": "{bits_per_element:.2f}"}
    columns |= {"perplexity": "{perplexity:.2f}", "change": "{change}", "top-1 agreement": "{agreement}"}
    exact = ["fp32 cache", "", "32", f"{_unquantized(schemes[0]):.2f}", "", "100 %"]
    lines = [dict(zip(columns, exact, strict=True))]
    chosen = [row for row in schemes if row["scheme"] in _QUALITY]
    for row in sorted(chosen, key=lambda row: float(row["bits_per_element"])):
        name = row["scheme"].split()[0]
        method = "ours" if "+fb" in name else _METHODS[name.rstrip("0123456789.-%")]
        shares = {"change": _change(row), "agreement": percent(row["top1_agreement"], ".1%")}
        lines.append(line(columns, row | shares, scheme=f"`{name}`", method=method))
    return lines


def speed_table(gpu: Sequence[Row]) -> list[Line]:
    """Decode attention of one layer, as a multiple of fp16's speed: a column for each context."""
    speeds: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in _of_one_sequence(gpu):
        if row["scheme"] in _TIMED and row["shape"] in _SHAPES:
            speed = speeds.setdefault((short(row["device"]), row["shape"], row["scheme"]), {})
            speed[row["context"]] = f"{decode_step(row)['speedup']:.2f}x"
    return [
        {"GPU": device, "shape": shape, "scheme": f"`{scheme}`"}
        | {f"{context:,} tokens": speeds[device, shape, scheme].get(context, "") for context in _CONTEXTS}
        for device, shape, scheme in sorted(speeds, key=lambda key: (*key[:2], _TIMED.index(key[2])))
    ]


def long_table(generate: Sequence[Row], sharded: Sequence[Row], cpu: Sequence[Row]) -> list[Line]:
    """Long contexts that were decoded from, beside fp16 where it fits, and the longest asked for on several GPUs."""
    lines = []
    steps = [row for row in generate if row["op"] == "decode" and row.get("mode", "graph") == "graph"]
    fitted = {row["shape"] for row in steps if (row["context"], row["cache"]) == (_LONG, "fp16") and "error" not in row}
    for row in latest(steps, lambda row: (row["device"], row["shape"], row["context"], row["cache"])):
        beside = row["context"] == _LONG and row["cache"] in _LONG_CACHES and row["shape"] in fitted
        if row["context"] > _LONG or (beside and "error" not in row):
            size = f"{row['cache_bytes'] / 1e9:.1f} GB" if row.get("cache_bytes") else ""
            lines.append(_long_line(row, short(row["device"]), row["shape"], size))
    if several := [row for row in sharded if row["world_size"] > 1 and row["asked"] != "longest"]:
        row = max(several, key=lambda row: (row["context"], row["tokens_per_second"]))
        gpus = f"{row['world_size']} x {short(row['device'])}"
        lines.append(_long_line({**row, "cache": row["scheme"]}, gpus, row["shape"], ""))
    timed = [row for row in cpu if (row["dtype"], row["measured"]) == ("bfloat16", "decode")]
    longest = max(row["context"] for row in timed)
    sizes = {
        row["cache"]: row["cache_bytes"] for row in cpu if (row["context"], row["measured"]) == (longest, "prefill")
    }
    for row in timed:
        if row["context"] == longest and row["cache"] in _CPU_CACHES:
            rate = {"tokens_per_second": row["tokens_per_cpu_second"]}
            lines.append(_long_line({**row, **rate}, "CPU", "smollm2", f"{sizes[row['cache']] / 1e6:.0f} MB"))
    return lines


def _long_line(row: Row, device: str, model: str, size: str) -> Line:
    rate = row["error"] if "error" in row else f"{row['tokens_per_second']:.1f}"
    columns = {"device": device, "model": model, "context": "{context:,}", "cache": "`{cache}`"}
    return line(columns | {"cache size": size, "tokens/s": rate}, row)


def _of_one_sequence(gpu: Sequence[Row]) -> list[Row]:
    return [row for row in latest_decode_rows(gpu) if row["batch"] == 1]


def _unquantized(row: Row) -> float:
    return math.exp(row["baseline_nll"])


def _change(row: Row) -> str:
    return percent(row["perplexity"] / _unquantized(row) - 1, "+.1%")
