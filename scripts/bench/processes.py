"""Calibration and evaluation in one process and in several: the same artefacts and figures, and how much sooner.

    python -m scripts.bench.processes --model random-7b --text pydoc --processes 2
    python -m scripts.bench.processes --model ./smollm2 --text notes.txt --device cpu --seqlen 128 --windows 4

Every command is run by itself and then by its launcher, `accelerate launch` on GPUs and `torchrun` on a CPU:
recording, evaluation in simulation, evaluation through the packed cache. Quantizers are fitted from both recordings.
`identical` says whether files are equal byte by byte, or figures to the last bit; where they are not (GPUs may add up
gradients in no fixed order), `largest_difference` is relative: of a recorded tensor in norm, or of a figure.

With `--quantizers` only the evaluations are run, with that file.

`seconds` are those of the whole command, with loading the model; tokens per second are those that the command reports
of its work alone, and the speed-up is theirs.
"""

import argparse
import json
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gradients.cli import EXIT_BAD_INPUT, UserError, command_parser, format_table, positive_int, run_command
from quant.artefact import load_quantizers
from quant.results import append_row, results_file

_SPEED, _SECONDS = "tokens_per_second", "seconds"


def command_line(module: str, arguments: Sequence[str], processes: int, device: str) -> list[str]:
    """The command line that starts `processes` processes; a single one gets the first device of its kind."""
    if processes == 1:
        return [sys.executable, "-m", module, *arguments, "--device", f"{device}:0" if device == "cuda" else device]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    if device == "cpu":
        launcher = ["torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    else:
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", port]
    own = ["--device", "cpu"] if device == "cpu" else []  # several GPUs: each process takes its own
    return [sys.executable, "-m", *launcher, "-m", module, *arguments, *own]


def run(command: Sequence[str]) -> dict[str, Any]:
    """Run a command to its end; its JSON summary with its seconds.

    Raises `UserError` with its own words if it was given bad input.
    """
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = round(time.perf_counter() - started, 2)
    if done.returncode == EXIT_BAD_INPUT:
        raise UserError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), _SECONDS: seconds}


def compare_figures(one: Mapping[str, Any], several: Mapping[str, Any]) -> tuple[bool, float]:
    """(whether all but speeds are equal, the largest relative difference of a number)."""
    pairs = [(value, several[name]) for name, value in one.items() if name not in (_SPEED, _SECONDS)]
    apart = [abs(other - mine) / max(abs(mine), 1e-30) for mine, other in pairs if isinstance(mine, float)]
    return all(mine == other for mine, other in pairs), max(apart, default=0.0)


def compare_files(one: Path, several: Path) -> tuple[bool, float]:
    """(whether two files, or all of two folders, are equal; the largest relative difference in norm of a tensor).

    Raises RuntimeError when there are other files, or other tensors, or files of another kind differ.
    """
    names, others = ([path.relative_to(root) for path in _files(root)] for root in (one, several))
    if names != others:
        raise RuntimeError(f"{one} and {several} hold different files")
    identical, worst = True, 0.0
    for name in names:
        if (one / name).read_bytes() == (several / name).read_bytes():
            continue
        if (one / name).suffix not in (".safetensors", ".st"):
            raise RuntimeError(f"{name} of {one} and {several} differ")
        identical, mine, theirs = False, load_file(one / name), load_file(several / name)
        for tensor, values in mine.items():
            difference = (theirs[tensor].double() - values.double()).norm() / values.double().norm().clamp(min=1e-30)
            worst = max(worst, float(difference))
    return identical, worst


def _files(root: Path) -> list[Path]:
    """A file, or those of a folder."""
    return sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]


class Comparison:
    """Rows of one model and text, in a folder for what is written on the way."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments, self.work = arguments, work
        self.rows: list[dict[str, Any]] = []
        self._counts = (1, arguments.processes)

    def run(self) -> list[dict[str, Any]]:
        """All commands, each in one process and in several; returns the rows."""
        quantizers = self.arguments.quantizers or self._fitted()
        for module in ("quant.evaluate", "deployment.evaluate"):
            both = [self._run(module, count, "--quantizers", quantizers) for count in self._counts]
            self._add(module, both, *compare_figures(*both))
        return self.rows

    def _fitted(self) -> Path:
        """Quantizers, fitted from what one process has recorded; what several have recorded is compared."""
        records = [self.work / f"records-{count}" for count in self._counts]
        recorded = [
            self._run("gradients", count, "--output", records[place]) for place, count in enumerate(self._counts)
        ]
        self._add("gradients", recorded, *compare_files(*records))
        fitted = [folder.with_name(f"{folder.name}.safetensors") for folder in records]
        for folder, file in zip(records, fitted, strict=True):
            options = ["--scheme", self.arguments.scheme, "--jobs", str(self.arguments.jobs), "--output", str(file)]
            run([sys.executable, "-m", "quant.fit", "--records", str(folder), *options])
        identical, worst = compare_files(*fitted)
        self._write({"command": "quant.fit", "identical": identical, "largest_difference": worst, "processes": 1})
        return fitted[0]

    def _run(self, module: str, processes: int, option: str, path: Path) -> dict[str, Any]:
        """A command that runs the model on the text, with one more option."""
        names = ("model", "text", "seqlen", "windows")
        shared = [word for name in names for word in (f"--{name}", str(getattr(self.arguments, name)))]
        return run(command_line(module, [*shared, option, str(path)], processes, self.arguments.device))

    def _add(self, module: str, both: Sequence[dict[str, Any]], identical: bool, worst: float) -> None:
        alone, together = both
        speeds = [summary[_SPEED] for summary in both]
        self._write({
            "command": module,
            "processes": self.arguments.processes,
            "identical": identical,
            "largest_difference": worst,
            "seconds": together[_SECONDS],
            "one_process_seconds": alone[_SECONDS],
            "tokens_per_second": round(speeds[1], 1),
            "one_process_tokens_per_second": round(speeds[0], 1),
            "speedup": round(speeds[1] / speeds[0], 3) if speeds[0] else math.nan,
        })  # fmt: skip

    def _write(self, row: dict[str, Any]) -> None:
        arguments = self.arguments
        identity = {name: getattr(arguments, name) for name in ("seqlen", "windows", "scheme")}
        identity |= {"model": Path(arguments.model).name, "text": Path(arguments.text).name}
        devices = ["cpu"]
        if arguments.device == "cuda":
            devices = [torch.cuda.get_device_name(number) for number in range(arguments.processes)]
        row = {"part": "processes", **identity, **row, "devices": devices, "world_size": arguments.processes}
        append_row(arguments.results, row, ("torch", "transformers", "accelerate"))
        self.rows.append(row)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    parser = command_parser("scripts.bench.processes", __doc__)
    parser.add_argument("--model", required=True, help="hub id or local folder (scripts.bench.random_model makes one)")
    parser.add_argument("--text", default="pydoc", help="wikitext2, c4, ptb, pydoc, or FILE[:START-END] in percent")
    parser.add_argument("--seqlen", type=positive_int, default=2048)
    parser.add_argument("--windows", type=positive_int, default=16, help="to record, and to evaluate")
    parser.add_argument("--scheme", default="nuq3-1%", help="to fit; with --quantizers theirs is taken")
    parser.add_argument("--processes", type=positive_int, default=2)
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes that fit quantizers")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=kind)
    parser.add_argument("--quantizers", type=Path, help="evaluate with this file, and record and fit nothing")
    parser.add_argument("--results", type=results_file, help="JSONL file to append to")
    arguments = parser.parse_args(argv)

    if arguments.processes < 2:
        raise UserError(f"--processes {arguments.processes} is what several are compared with; give at least 2")
    available = torch.cuda.device_count()
    if arguments.device == "cuda" and available < arguments.processes:
        raise UserError(f"--processes {arguments.processes} need a GPU each and {available} are visible; give fewer")
    if arguments.quantizers:
        arguments.scheme = load_quantizers(arguments.quantizers).scheme.describe()
    with tempfile.TemporaryDirectory() as work:
        rows = Comparison(arguments, Path(work)).run()
    columns = "command processes identical largest_difference seconds one_process_seconds speedup"
    print(format_table(rows, columns))
    return {"rows": rows}


if __name__ == "__main__":
    run_command(main)
