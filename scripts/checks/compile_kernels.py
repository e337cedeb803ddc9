"""Compile the decode kernel ahead of time, for GPUs that need not be there, and count what the compiler made of it.

    python -m scripts.checks.compile_kernels                                  # D = 128, for sm_80 and sm_90
    python -m scripts.checks.compile_kernels --targets 80 --bits 3 --queries 4 --outliers 0
    python -m scripts.checks.compile_kernels --results scripts/results/instructions.jsonl

A row per kernel: teams, registers and bytes of stack of a lane, bytes of shared memory, and machine instructions of a lane per dequantized
element: those of the loop over chunks but for what happens rarely (columns rotated anew, a higher maximum, lists that do not fit into their
place), `outliers` apart, and of both together the `whole`. `spills` are loads from and stores to local memory in the loops, once more without what is rare.

--outliers of all elements are assumed, Poisson-distributed, in loops that take one per lane of a team at a time. --bits 0 is groups of 2, 3
and 4 bits. What a team does once, before and after its chunks, is left out. Needs the packages of `pip install -e .[cuda]`, and Triton's disassembler.
"""

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import triton

from deployment.kernels.decode import compile as decode
from deployment.kernels.decode.host import Shape, fitting
from deployment.kernels.schedule import CHUNK
from gradients.cli import UserError, command_parser, format_table, run_command
from quant.results import append_row, results_file

HEAD_DIM = 128
OUTLIERS = 0.01
MIXED = 0  # instead of a number of bits
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_RARE = (
    "anchor_again(chunk);",
    "rescale(score);",
    "add(Outlier{side.index[i], side.value[i]});",
    "ends = ends_from(side, chunk + 1);",
)
_ROUNDS = ("add(Outlier{copied[0], copied[ROUNDS * 8 * PIECES]});",)


def shape_of(target: int, bits: int, queries: int, outliers: bool, head_dim: int = HEAD_DIM) -> Shape:
    """What host.py would choose for keys and values of `bits` bits."""
    widths = 0b11100 if bits == MIXED else 1 << bits
    rest = widths, widths, int(bits != MIXED), int(outliers), int(outliers), 0, SHARED_LIMIT[target]
    while (shape := fitting(head_dim, queries, *rest)) is None:  # not even one team fits
        queries //= 2
    return shape


def compile_for(target: int, bits: int, queries: int, outliers: float = OUTLIERS) -> dict[str, Any]:
    """Compile for a GPU of compute capability `target` / 10, and count."""
    shape = shape_of(target, bits, queries, outliers > 0)
    cubin = decode.compiled(shape, f"sm_{target}", lines=True)
    usage = re.search(
        r"Function attend:\s+REG:(\d+) STACK:(\d+)", disassembled(cubin, "cuobjdump", "-res-usage").replace("\n", " ")
    )
    assert usage is not None
    lines = (decode.FOLDER / "decode.cu").read_text().splitlines()
    rare, rounds = (
        {number for number, line in enumerate(lines, 1) if line.strip().endswith(what)} for what in (_RARE, _ROUNDS)
    )
    body = chunk_loop(disassembled(cubin, "nvdisasm", "-gi", "-c"))
    usual = [(text, places) for text, places in body if not places & rare]
    per_round = sum(bool(places & rounds) for _, places in usual) / 2  # there is a loop for each side
    elements = 2 * CHUNK * HEAD_DIM / HEAD_DIM  # of a lane and chunk, of both sides
    some = 2 * per_round * expected_rounds(outliers * CHUNK * HEAD_DIM, HEAD_DIM) / elements
    dense = sum(not places & rounds for _, places in usual) / elements
    return {
        "target": f"sm_{target}",
        "bits": bits,
        "queries": queries,
        "teams": shape.teams,
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "shared": shape.shared_bytes,
        "loop": round(dense, 2),
        "outliers": round(some, 2),
        "whole": round(dense + some, 2),
        "spills": sum(_is_spill(text) for text, _ in body),
        "usual_spills": sum(_is_spill(text) for text, _ in usual),
    }


def _is_spill(text: str) -> bool:
    return re.search(r"\b(LDL|STL)\b", text) is not None


def chunk_loop(listing: str) -> list[tuple[str, set[int]]]:
    """Instructions of the loop over chunks of `attend`, and on which lines of decode.cu each of them is, calls included.

    It is the largest loop within the loop over items. Raises ValueError if there is none.
    """
    code = listing.split(".text.attend:")[1].split(".section")[0]
    body: list[tuple[str, set[int]]] = []
    labels: dict[str, int] = {}
    places: set[int] = set()
    fresh = True
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(body)
        elif "//##" in line:
            places = (set() if fresh else places) | {int(number) for number in re.findall(r'\.cu", line (\d+)', line)}
            fresh = False
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            body.append((instruction[1], places))
            fresh = True
    loops = []
    for end, (text, _) in enumerate(body):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if target and labels.get(target[1], end + 1) <= end:
            loops.append((labels[target[1]], end + 1))
    loops.sort(key=lambda loop: loop[0] - loop[1])
    inner = [loop for loop in loops[1:] if loops[0][0] <= loop[0] and loop[1] <= loops[0][1]]
    if not inner:
        raise ValueError("attend has no loop within a loop")
    return body[slice(*inner[0])]


def expected_rounds(mean: float, at_a_time: int) -> float:
    """How often a loop runs that takes `at_a_time` of a Poisson-distributed number: the mean of the ceiling."""
    probability, below, rounds = math.exp(-mean), 0.0, 0.0
    for count in range(int(mean + 12 * math.sqrt(mean)) + at_a_time):
        below += probability
        if count % at_a_time == 0:  # one round more whenever there are more than `count` entries
            rounds += max(0.0, 1 - below)
        probability *= mean / (count + 1)
    return rounds


def disassembled(cubin: bytes, tool: str, *options: str) -> str:
    """What one of NVIDIA's tools says of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        environment = {**os.environ, "PATH": f"{_TOOLS}:{os.environ['PATH']}"}
        command = [_TOOLS / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.checks.compile_kernels", __doc__)
    parser.add_argument("--targets", type=int, choices=SHARED_LIMIT, nargs="+", default=list(SHARED_LIMIT))
    parser.add_argument("--bits", type=int, choices=range(5), nargs="+", default=[4, 3, 2, MIXED])
    parser.add_argument("--queries", type=int, choices=(1, 2, 4, 8), nargs="+", default=[1, 4, 8])
    parser.add_argument("--outliers", type=float, default=OUTLIERS, help=f"share of all elements; 0: none ({OUTLIERS})")
    parser.add_argument("--results", type=results_file, help="JSONL file to append to")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.outliers < 1:
        raise UserError(f"--outliers {arguments.outliers:g} is not a share within 0 and 1; 0 for none")
    if find_spec("cuda") is None:
        raise UserError("cuda-core, which compiles, is not installed; install it with `pip install -e .[cuda]`")
    kernels = [
        compile_for(target, bits, queries, arguments.outliers)
        for target in arguments.targets
        for bits in arguments.bits
        for queries in arguments.queries
    ]
    print(format_table(kernels))
    for counts in kernels:
        append_row(arguments.results, {**counts, "share_of_outliers": arguments.outliers}, packages=("torch",))
    return {"kernels": kernels}


if __name__ == "__main__":
    run_command(main)
