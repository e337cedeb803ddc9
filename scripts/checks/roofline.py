"""What decode attention over a packed cache can reach at most: memory, shared memory and instructions.

    python -m scripts.checks.roofline                                   # llama-7b, llama-3-8b, llama-3-70b on three GPUs
    python -m scripts.checks.roofline --schemes nuq3-1% --context 1M --results scripts/results/roofline.jsonl

Every element of the cache has to be read, and dequantized by a number of instructions. Three things take their time:

    memory   bits stored per element, as `deployment.plan` counts them / what a large copy reaches
    shared   two bytes of levels per element / 128 bytes a clock and multiprocessor
    issue    instructions per element of the whole kernel (`scripts/checks/compile_kernels.py`) / 128 lanes a clock and multiprocessor

and the longest is the bound: no schedule is faster. Attention over fp16 needs two bytes an element, and is taken to reach the
memory's rate. Not counted: waiting, instructions of less than full rate, what else goes through shared memory, what a
team does once, putting the parts together.

Rows are one layer and one new token of one sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deployment.measure.shapes import ModelShape, named_config
from deployment.plan import parse_tokens
from gradients.cli import UserError, command_parser, format_table, run_command
from gradients.models import kv_shape
from quant.results import append_row, results_file
from quant.scheme import Scheme
from scripts.checks.compile_kernels import HEAD_DIM, compile_for

FP16_BYTES = 2
LEVEL_BYTES = 2
ISSUE_LANES, SHARED_BYTES = 128, 128  # of a multiprocessor in a clock, on sm_80 and sm_90
SHAPES = ("llama-7b", "llama-3-8b", "llama-3-70b")  # 1, 4 and 8 query heads to a KV head
SCHEMES = ("nuq4-1%", "nuq3-1%", "nuq2-1%")


@dataclass(frozen=True)
class Machine:
    """A GPU."""

    target: int  # compute capability times 10
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second that a large copy reads and writes


MACHINES = {
    "A100-80GB": Machine(80, 108, 1.41e9, 0.9 * 2039e9),  # nine tenths of the nominal rate
    "H100": Machine(90, 132, 1.98e9, 2988e9),  # measured, as the next
    "H200": Machine(90, 132, 1.98e9, 4250e9),  # measured, copies of 1 GiB
}


def bounds(machine: Machine, elements: float, bytes_per_element: float, instructions: float) -> dict[str, Any]:
    """Microseconds that each resource needs for `elements` elements, the bound, and how much faster than fp16 it is at most."""
    lanes = machine.multiprocessors * machine.clock
    seconds = {
        "memory": elements * bytes_per_element / machine.bandwidth,
        "shared": elements * LEVEL_BYTES / (lanes * SHARED_BYTES),
        "issue": elements * instructions / (lanes * ISSUE_LANES),
    }
    fp16 = elements * FP16_BYTES / machine.bandwidth
    bound = max(seconds, key=lambda name: seconds[name])
    times = {f"{name}_us": round(time * 1e6, 2) for name, time in seconds.items()}
    return {**times, "fp16_us": round(fp16 * 1e6, 2), "bound": bound, "most_speedup": round(fp16 / seconds[bound], 3)}


@dataclass(frozen=True)
class Layer:
    """What a model's shape says."""

    group: int  # query heads of a KV head
    channels: int
    bytes_per_element: dict[str, float]  # by scheme

    @classmethod
    def named(cls, name: str, schemes: Sequence[str]) -> "Layer":
        """Of one of the paper's models, whose heads must be those that the kernel is compiled for."""
        shape = ModelShape.of(named_config(name))
        heads, dim = kv_shape(shape.config)
        if dim != HEAD_DIM:
            raise UserError(f"shape {name!r} has heads of {dim} channels and instructions are counted for {HEAD_DIM}")
        per_element = 2 * heads * dim * len(shape.cached)
        stored = {s: shape.bytes_per_token(Scheme.parse(s))["cache"] / per_element for s in schemes}
        return cls(shape.config.num_attention_heads // heads, heads * dim, stored)


def roofline(shapes: Sequence[str], schemes: Sequence[str], context: int) -> list[dict[str, Any]]:
    """A row for every machine, shape and scheme."""
    layers = {name: Layer.named(name, schemes) for name in shapes}
    rows = []
    for machine_name, machine in MACHINES.items():
        for name, layer in layers.items():
            for scheme in map(Scheme.parse, schemes):
                instructions = _instructions(machine.target, scheme, layer.group)
                stored = layer.bytes_per_element[str(scheme)]
                row = {"machine": machine_name, "shape": name, "group": layer.group, "scheme": str(scheme)}
                row |= {"context": context, "bits_per_element": round(8 * stored, 3)}
                row |= {"instructions": instructions}
                elements = 2 * context * layer.channels
                rows.append({**row, **bounds(machine, elements, stored, instructions)})
    return rows


def _instructions(target: int, scheme: Scheme, group: int) -> float:
    """Of the kernel, per element."""
    if scheme.allocated or scheme.bits not in (2, 3, 4) or (scheme.key_axis, scheme.value_axis) != ("channel", "token"):
        raise UserError(f"scheme {scheme} takes another kernel; use one of 2, 3 or 4 bits, such as nuq3-1%")
    return float(compile_for(target, int(scheme.bits), group, outliers=scheme.outliers)["whole"])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.checks.roofline", __doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="of `deployment.plan`, with heads of 128 channels")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--context", type=parse_tokens, default=1 << 17, help="tokens, such as 128K (128K)")
    parser.add_argument("--results", type=results_file, help="JSONL file to append to")
    arguments = parser.parse_args(argv)
    schemes = [str(Scheme.parse(name)) for name in arguments.schemes]
    rows = roofline(arguments.shapes, schemes, arguments.context)
    print(format_table(rows))
    for row in rows:
        append_row(arguments.results, row, packages=("torch",))
    return {"rows": rows}


if __name__ == "__main__":
    run_command(main)
