"""Tables of what was measured on GPUs, from rows of deployment.benchmark, scripts.bench.generate and scripts.checks.device.

Of rows that measure the same thing, the last counts.
"""

from collections.abc import Sequence

from scripts.report.cells import Line, Row, latest, line, short

_SPEED = {
    "GPU": "{gpu}",
    "shape": "{shape}",
    "batch": "{batch}",
    "scheme": "{scheme}",
    "context": "{context:,}",
    "smaller than fp16": "{smaller:.1f}x",
    "decode, us": "{us:.0f}",
    "fp16, us": "{fp16_us:.0f}",
    "faster": "{speedup:.2f}x",
    "of copy bandwidth": "{percent_of_copy:.0f} %",
}


def speed_table(rows: Sequence[Row]) -> list[Line]:
    """Decode attention of one layer from the packed cache against fp16, in one run."""
    lines = []
    for row in latest_decode_rows(rows):
        smaller = row["fp16_bytes_per_token"] / row["bytes_per_token"]
        lines.append(line(_SPEED, row | decode_step(row), gpu=short(row["device"]), smaller=smaller))
    return lines


def latest_decode_rows(rows: Sequence[Row]) -> list[Row]:
    """The last row of each cell that timed a decode step."""
    timed = [row for row in rows if any(op["op"] == "decode" for op in row["ops"])]
    return latest(timed, lambda row: (row["device"], row["shape"], row["batch"], row["scheme"], row["context"]))


def decode_step(row: Row) -> Row:
    """What a row of `latest_decode_rows` says of the step."""
    step: Row = next(op for op in row["ops"] if op["op"] == "decode")
    return step


_OTHER_OPS = {
    "append": "store 1 token",
    "chunk": "store 1024 tokens",
    "prefill": "attend 1024 queries over past and chunk",
}
_OTHER = {
    "GPU": "{gpu}",
    "shape": "{shape}",
    "operation": "{operation}",
    "scheme": "{scheme}",
    "tokens before": "{context:,}",
    "us": "{us:.1f}",
    "fp16, us": "{fp16_us:.1f}",
    "faster": "{speedup:.2f}x",
}


def other_ops_table(rows: Sequence[Row]) -> list[Line]:
    """What one layer does besides decode: storing new tokens, and attention of a chunk of a prompt, against fp16."""
    steps = [
        row | op | {"gpu": short(row["device"]), "operation": _OTHER_OPS[op["op"]]}
        for row in rows
        for op in row["ops"]
        if op["op"] in _OTHER_OPS
    ]
    steps = latest(steps, lambda step: tuple(step[name] for name in ("gpu", "shape", "op", "scheme", "context")))
    return [
        line(_OTHER, step) for step in sorted(steps, key=lambda step: (step["operation"], step["shape"], step["gpu"]))
    ]


_MODEL = {"GPU": "{gpu}", "shape": "{shape}", "context": "{context:,}", "cache": "{cache}"}
_MODES = {"tokens/s": "eager", "CUDA graph": "graph", "`generate`": "generate"}
_SIZES = {"cache, GB": "cache_bytes", "peak memory, GB": "peak_bytes"}


def generate_table(rows: Sequence[Row]) -> list[Line]:
    """Greedy decoding with whole models: a line for each shape, context and cache."""
    lines = []
    for steps in _models([row for row in rows if row["op"] == "decode"]):
        modes = {mode: row for row in steps for mode in ([row["mode"]] if "mode" in row else _MODES.values())}
        rates = {name: _rate(modes[mode]) if mode in modes else "" for name, mode in _MODES.items()}
        sizes = {name: max(row.get(size) or 0 for row in modes.values()) for name, size in _SIZES.items()}
        shown = {name: f"{size / 1e9:.1f}" if size else "" for name, size in sizes.items()}
        lines.append(line(_MODEL, steps[0], gpu=short(steps[0]["device"])) | rates | shown)
    return lines


def prefill_table(rows: Sequence[Row]) -> list[Line]:
    """Tokens per second of reading, a column for each size of chunk."""
    reads = [row for row in rows if row["op"] == "prefill"]
    chunks = sorted({row["chunk"] for row in reads if "chunk" in row})
    lines = []
    for cells in _models(reads):
        rates = {chunk: _rate(row) for row in cells for chunk in ([row["chunk"]] if "chunk" in row else chunks)}
        shown = {f"chunks of {chunk}": rates.get(chunk, "") for chunk in chunks}
        lines.append(line(_MODEL, cells[0], gpu=short(cells[0]["device"])) | shown)
    return lines


def _models(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same GPU, shape, context and cache together, by GPU."""
    models: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in rows:
        models.setdefault((short(row["device"]), row["shape"], row["context"], row["cache"]), []).append(row)
    return [models[key] for key in sorted(models, key=lambda key: key[0])]


def _rate(row: Row) -> str:
    return str(row["error"]) if "error" in row else f"{row['tokens_per_second']:.1f}"


_SEVERAL = {"shape": "{shape}", "scheme": "{scheme}", "context": "{context:,}"}


def sharded_table(rows: Sequence[Row]) -> list[Line]:
    """A model on one GPU and on several: speed, bytes against the plan, tokens."""
    columns = _SEVERAL | {"cache filled by": "{filled}", "GPUs": "{gpus}", "tokens/s": "{tokens_per_second:.1f}"}
    columns |= {"held, GiB": "{held}", "planned, GiB": "{predicted_held}", "tokens as on one GPU": "{equal}"}
    lines = []
    for row in rows:
        sizes = {
            name: ", ".join(f"{part[name] / 2**30:.2f}" for part in row["memory"])
            for name in ("held", "predicted_held")
        }
        equal = {True: "yes", False: "no", None: ""}[row.get("tokens_equal_one_device")]
        lines.append(line(columns, row | sizes, gpus=_gpus(row), equal=equal))
    return lines


def parallel_table(rows: Sequence[Row]) -> list[Line]:
    """A model on one GPU and tensor-parallel on several: speed, and bytes of each GPU against the plan."""
    columns = _SEVERAL | {"GPUs": "{gpus}", "tokens/s": "{tokens_per_second:.1f}", "of one GPU's": "{times}"}
    columns |= {"held by each, GiB": "{held:.2f}", "planned, GiB": "{predicted_held:.2f}"}
    alone = {_decoded(row): row["tokens_per_second"] for row in rows if row["world_size"] == 1}
    lines = []
    for row in sorted(rows, key=lambda row: (*_decoded(row), row["world_size"])):
        several = row["world_size"] > 1 and _decoded(row) in alone
        times = f"{row['tokens_per_second'] / alone[_decoded(row)]:.2f}x" if several else ""
        most = max(row["memory"], key=lambda part: part["held"])
        sizes = {name: most[name] / 2**30 for name in ("held", "predicted_held")}
        lines.append(line(columns, row | sizes, gpus=_gpus(row), times=times))
    return lines


def _gpus(row: Row) -> str:
    return f"{row['world_size']} x {short(row['device'])}"


def _decoded(row: Row) -> tuple[str, str, int]:
    """What is decoded, whatever it is decoded on."""
    return row["shape"], row["scheme"], row["context"]


def processes_table(rows: Sequence[Row]) -> list[Line]:
    """Commands in several processes against one."""
    columns = {"command": "{command}", "processes": "{world_size}", "GPU": "{gpu}"}
    columns |= {"equal to one process": "{equal}", "faster": "{faster}"}
    lines = []
    for row in rows:
        faster = f"{row['speedup']:.2f}x" if "speedup" in row else ""
        equal = "yes" if row["identical"] else f"within {row['largest_difference']:.1e}"
        lines.append(line(columns, row, gpu=short(row["device"]), equal=equal, faster=faster))
    return lines


_DEVICE = {
    "device": "{device}",
    "scheme": "{scheme}",
    "dtype": "{dtype}",
    "NLL simulated": "{nll_simulated:.4f}",
    "NLL packed": "{nll_packed:.4f}",
    "relative difference": "{nll_difference:.1e}",
    "greedy tokens equal to the CPU's": "{equal_tokens} of {tokens}",
    "the CPU's own, rounded otherwise": "{rounded_equal_tokens} of {tokens}",
}


def device_table(rows: Sequence[Row]) -> list[Line]:
    """A real model on a device, against simulation there and against the CPU."""
    return [
        line(_DEVICE, row)
        for row in latest(rows, lambda row: (row["device"], row["model"], row["scheme"], row["dtype"]))
    ]
