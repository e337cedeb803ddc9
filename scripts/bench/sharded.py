"""Decode with a random model and its packed cache spread over devices; compare with one device and with the plan.

    python -m scripts.bench.sharded --shape llama-7b --scheme nuq3-1% --contexts 2K --filled prefill --against-one
    python -m scripts.bench.sharded --shape llama-7b --scheme nuq3-1% --contexts 128K longest --against-one
    python -m scripts.bench.sharded --shape llama-7b --scheme nuq2 --contexts 10000000 longest --device-memory 79GiB
    python -m scripts.bench.sharded --shape tiny --scheme nuq3-1% --contexts 500 --devices cpu disk --against-one
    torchrun --nproc-per-node 4 -m scripts.bench.sharded --tensor-parallel --graph --shape llama-3-8b --scheme nuq2 \
        --contexts 128K 10000000 longest

`longest` asks how much fits: first the largest context that `deployment.plan` predicts, then less while memory runs
out, then halves of what is between. `--against-one` does the same on the first device alone, and says whether the
tokens are equal. What is filled and what is decoded: `scripts/bench/sharded_decoding.py`. With `--tensor-parallel` it is every layer
that is spread, over the processes of torchrun (`scripts/bench/parallel_decoding.py`).
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from deployment.measure.shapes import SHAPES, ModelShape
from deployment.plan import Plan, parse_bytes, parse_tokens
from gradients.cli import UserError, command_parser, format_table, non_negative_int, positive_int, run_command
from gradients.parallel import Part, add_tensor_parallel_argument, own_part
from gradients.placement import exists
from gradients.processes import process_state
from quant.results import append_row, results_file
from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS
from scripts.bench.parallel_decoding import ROOM, Parallel, everybodys, own_device
from scripts.bench.random_model import config_of
from scripts.bench.sharded_decoding import WARM_UP, Decoded, Request, Sharded, free, rounded_context

LONGEST = "longest"
_STEP = 64  # the first step down is this part of the context, and each further one twice the last
_PRECISION = 256  # halving ends where this part of the context is left open
_BESIDE = 1 << 29  # bytes of a device for what is not allocated by torch: kernels, handles of libraries


def parse_context(text: str) -> int | str:
    """argparse type: a number of tokens, or `longest`."""
    return LONGEST if text == LONGEST else parse_tokens(text)


def largest(holds: Callable[[int], bool], first: int, attempts: int) -> int:
    """The largest number up to `first`, about, for which `holds`; 0 if none was found in `attempts` tries."""
    number, step, low, high = first, max(1, first // _STEP), 0, 0
    for _ in range(attempts):
        if holds(number):
            low = number
        else:
            high = number
        if low and high - low <= max(1, first // _PRECISION):
            break
        number, step = ((low + high) // 2, step) if low else (high - step, 2 * step)
        if number < 1:
            break
    return low


@dataclass
class Bench:
    """Everything that stays the same from context to context."""

    shape: str
    config: PreTrainedConfig
    scheme: Scheme
    memory: int | None  # bytes per device that may be used; None: not known, so that nothing can be planned
    part: Part
    arguments: argparse.Namespace

    def planned(self, devices: int) -> int:
        """The largest context that should fit. Raises `UserError` if there is none, or nothing to plan with."""
        if self.memory is None:
            raise UserError("context longest on a cpu needs a limit; give --device-memory, or a number of tokens")
        parts = self.part.count
        plan = Plan(ModelShape.of(self.config, parts), self.scheme, self.memory, devices * parts, prefill_chunk=1)
        tokens = plan.largest_context() - self.arguments.new_tokens
        if tokens < self.scheme.sink_tokens + BLOCK_TOKENS:
            raise UserError(
                f"not even one block fits in {self.memory} bytes of {devices} devices; give more, or a smaller --shape"
            )
        return rounded_context(self.scheme, tokens - BLOCK_TOKENS + 1)

    def row(self, sharded: Sharded, context: int | str) -> dict[str, Any]:
        """One row: what came of decoding at a context."""
        arguments = self.arguments
        request = Request(
            self.scheme,
            0,
            arguments.new_tokens,
            arguments.filled,
            arguments.prefill_chunk,
            arguments.seed,
            arguments.graph,
        )
        tried: list[dict[str, Any]] = []
        best: dict[int, Decoded] = {}

        def holds(blocks: int) -> bool:
            tokens = self.scheme.sink_tokens + blocks * BLOCK_TOKENS
            decoded = sharded.decode(replace(request, context=tokens), self.memory)
            tried.append({"context": tokens, "fits": decoded is not None})
            if decoded is not None:
                best[blocks] = decoded
            return decoded is not None

        row: dict[str, Any] = {"part": arguments.part, "shape": self.shape, "scheme": self.scheme.describe()}
        row |= {"asked": context, "filled": arguments.filled, "devices": sharded.devices}
        count = self.part.count
        row |= {"world_size": len(sharded.devices) * count, "processes": count, "device_memory": self.memory}
        row |= {"tensor_parallel": count} if count > 1 else {}
        row |= {"layers_per_device": [sharded.layers.count(place) for place in range(len(sharded.devices))]}
        if context == LONGEST:
            planned = self.planned(len(sharded.devices))
            blocks = largest(holds, (planned - self.scheme.sink_tokens) // BLOCK_TOKENS, arguments.attempts)
            row["planned_context"] = planned
        else:
            exact = rounded_context(self.scheme, int(context))
            blocks = (exact - self.scheme.sink_tokens) // BLOCK_TOKENS
            holds(blocks)
        row |= {"tried": tried, "fits": blocks in best}
        if blocks not in best:
            return row | {"context": tried[-1]["context"]}
        return row | {"context": self.scheme.sink_tokens + blocks * BLOCK_TOKENS} | _measured(best[blocks])


def _measured(decoded: Decoded) -> dict[str, Any]:
    return {
        "path": decoded.path,
        "new_tokens": len(decoded.tokens),
        "replays": decoded.replays,
        "timed_tokens": len(decoded.tokens) - WARM_UP,
        "seconds": round(decoded.seconds, 4),
        "tokens_per_second": round(decoded.tokens_per_second, 3),
        "fill_seconds": round(decoded.fill_seconds, 2),
        "held_off_percent": max((part["held_off_percent"] for part in decoded.memory), key=abs),
        "memory": decoded.memory,
        "tokens": decoded.tokens,
    }


def visible_devices() -> list[str]:
    """All accelerators, or the CPU."""
    kind = torch.accelerator.current_accelerator()
    return [f"{kind.type}:{number}" for number in range(torch.accelerator.device_count())] if kind else ["cpu"]


def check_devices(devices: Sequence[str]) -> None:
    """Raise `UserError` for one that is not there, for devices of several kinds, and for a disk beside accelerators."""
    for device in devices:
        if not exists(device):
            count = torch.accelerator.device_count()
            raise UserError(f"device {device!r} is not there; use cpu, disk, or one of {count} accelerators (cuda:0)")
    kinds = {device.partition(":")[0] for device in devices}
    if len(kinds) > 1 and kinds != {"cpu", "disk"}:
        raise UserError(f"devices {' '.join(devices)} are of several kinds; use accelerators alone, or cpu and disk")


def memory_of(devices: Sequence[str], limit: int | None) -> int | None:
    """Bytes that each device may use: `limit`, which CUDA is told, and no more than the fullest one has free."""
    if not devices[0].startswith("cuda"):
        return limit
    free = []
    for device in devices:
        available, total = torch.cuda.mem_get_info(device)
        free.append(available - _BESIDE)
        if limit is not None:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    return min(free) if limit is None else min(limit, *free)


def add_equality(rows: Sequence[dict[str, Any]]) -> None:
    """Tell every row of several devices whether a row of one device, equal in all else, has its tokens."""
    alone = {(row["scheme"], row["context"]): row["tokens"] for row in rows if row["world_size"] == 1 and row["fits"]}
    for row in rows:
        here = row["scheme"], row["context"]
        if row["world_size"] > 1 and row["fits"] and here in alone:
            row["tokens_equal_one_device"] = row["tokens"] == alone[here]


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all schemes and contexts, on one device first if that is asked for, each written as it is measured."""
    schemes = [Scheme.parse(name) for name in arguments.scheme]
    part = own_part(arguments.tensor_parallel, "scripts.bench.sharded")
    if not part.is_whole:
        arguments.devices = [own_device()]
        everybodys([0.0], part)  # makes the channels between processes, which take memory
    config, memory = config_of(arguments.shape, arguments.layers), memory_of(arguments.devices, arguments.device_memory)
    if not part.is_whole and memory is not None:
        memory = int(min(everybodys([float(memory)], part)[0])) - ROOM
    alone = arguments.against_one and len(arguments.devices) > 1
    rows: list[dict[str, Any]] = []
    packages = ["torch", "transformers", "accelerate"]
    for devices in [arguments.devices[:1], arguments.devices] if alone else [arguments.devices]:
        with tempfile.TemporaryDirectory() as folder:
            sharded = (
                Sharded(config, devices, arguments.seed, folder)
                if part.is_whole
                else Parallel(config, part, arguments.seed)
            )
            for context, scheme in itertools.product(arguments.contexts, schemes):
                rows.append(Bench(arguments.shape, config, scheme, memory, part, arguments).row(sharded, context))
                add_equality(rows)
                triton = ["triton"] if rows[-1].get("path") == "triton" else []
                append_row(arguments.results if part.number == 0 else None, rows[-1], [*packages, *triton])
            del sharded  # and with it the model, before the next one is made
            free(devices)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What a person wants to read of the rows."""
    lines = []
    for row in rows:
        memory = row.get("memory", [])
        line = {name: row[name] for name in ("shape", "scheme", "context", "filled", "world_size")}
        line["fits"] = "yes" if row["fits"] else "no"
        line["tokens/s"] = f"{row['tokens_per_second']:.2f}" if row["fits"] else ""
        line["held GiB, most"] = f"{max(part['held'] for part in memory) / 2**30:.3f}" if memory else ""
        line["off the plan, %"] = row.get("held_off_percent", "")
        line["tokens as on one"] = {True: "yes", False: "NO", None: ""}[row.get("tokens_equal_one_device")]
        lines.append(line)
    return format_table(lines)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("scripts.bench.sharded", __doc__)
    parser.add_argument("--shape", default="llama-7b", help=f"tiny, {', '.join(SHAPES)}, or a model")
    parser.add_argument("--layers", type=positive_int, help="number of the model's layers (all)")
    parser.add_argument("--scheme", nargs="+", default=["nuq3-1%"])
    add_tensor_parallel_argument(parser)
    parser.add_argument("--graph", action="store_true", help="record the steps in a CUDA graph")
    parser.add_argument("--devices", nargs="+", default=visible_devices(), help="cuda:0 cuda:1 ... (all), or cpu disk")
    parser.add_argument("--contexts", type=parse_context, nargs="+", default=[1 << 17], help="128K, or longest")
    parser.add_argument("--filled", choices=("synthetic", "prefill"), default="synthetic", help="how the cache is")
    parser.add_argument(
        "--new-tokens", type=positive_int, default=32, help=f"to decode; {WARM_UP} of them are not timed"
    )
    parser.add_argument("--prefill-chunk", type=positive_int, default=1024, help="tokens per forward of a prefill")
    parser.add_argument("--against-one", action="store_true", help="the same on the first device alone, before")
    parser.add_argument("--device-memory", type=parse_bytes, help="use no more of each device, 79GiB say")
    parser.add_argument("--attempts", type=positive_int, default=8, help="at finding the longest context")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of weights, prompts and blocks")
    parser.add_argument("--part", default="sharded", help="what the rows are called")
    parser.add_argument("--results", type=results_file, help="JSONL file to append to")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The command; returns its JSON summary (None in all but the main process)."""
    arguments = _parser().parse_args(argv)
    if arguments.new_tokens <= WARM_UP:
        raise UserError(f"--new-tokens {arguments.new_tokens}: the first {WARM_UP} are not timed; ask for more")
    check_devices(arguments.devices)
    rows = measure(arguments)
    if not process_state().is_main_process:
        return None
    print(table(rows))
    return {"rows": rows}


if __name__ == "__main__":
    run_command(main)
