"""Compile the kernels ahead of time, for GPUs that need not be there, and count what the compiler made of them.

    python -m scripts.compile_kernels                                  # attention at D = 128 for sm_80 and sm_90
    python -m scripts.compile_kernels --targets 80 --bits 3 --groups 4 --all
    python -m scripts.compile_kernels --results scripts/results/instructions.jsonl

A row per kernel: registers, bytes of stack, shared memory and, of it, what inline PTX has `declared`, and machine
instructions of a warp's lane per dequantized element: `keys` and `values` those of the loop over blocks of keys, per
element of a key, and of that over values, `mean` of the two; `queries` rotated back, loaded, and times what all tiles
share, per element of a key; `outliers`, the `rest` of a chunk, and the `whole` kernel, all per element of keys and
values together: whole = mean + queries / 2 + outliers + rest. `spills` are loads from and stores to local memory in one
round of each inner loop. `--all` says what the instructions of a round are, for the loops over keys and values.

The kernel is compiled with the constants and options that `deployment/kernels/packed.py` would use. What is assumed:
whole chunks; --outliers of all elements, Poisson-distributed, in a loop that takes so many at a time as the kernel
does; loops are found and counted as `scripts/machine_code.py` says. What a program does once, before and after its
chunks, is left out. Environments in which Triton interprets kernels cannot compile them.
"""

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deployment.kernels.packed import _options, _turn, lookup_of, stages_of
from deployment.kernels.queries import rotate_back
from deployment.kernels.schedule import chunk_tokens
from deployment.kernels.scores import score_chunk
from deployment.kernels.split import split_kernel
from deployment.kernels.tiles import FRAGMENT_ORDER
from deployment.kernels.tuning import LEAST_CHUNK, tuning_for
from deployment.order import FragmentOrder, Role
from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from quant.results import append_row
from scripts.machine_code import PHASES, Chunk, Run, parse, runs_of_a_chunk
from scripts.source_lines import places_of_code, places_of_function, places_of_loop

HEAD_DIM = 128
OUTLIERS = 0.01
_MANY = 1 << 20  # tokens: there are chunks for all programs
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {
    "*i64": "positions origins limits",
    "*i16": "key_index value_index",
    "*fp16": "query key_scales value_scales key_value value_value key_dense value_dense rotated weights scaled",
    "*fp32": (
        "factor turn key_levels_at key_scale key_zero key_floor value_levels_at value_scale value_zero value_floor own scores "
        "extra parked rescale outputs maxima sums"
    ),
    "*i32": (
        "steps key_bytes value_bytes key_words value_words key_starts key_ends value_starts value_ends key_width key_offset "
        "key_first_level value_width value_offset value_first_level"
    ),
    "fp32": "scaling",
}


def attention_constants(
    target: int, bits: int, group: int, chunk: int | None = None, outliers: bool = True
) -> dict[str, Any]:
    """The decode kernel for keys with ranges per channel, values with ranges per token; `chunk`: None for its own."""
    roles: tuple[Role, ...] = ("key", "value")
    orders = {side: FragmentOrder(bits, 8, HEAD_DIM, side, torch.device("cpu")) for side in roles}
    geometry = {f"{side.upper()}_GEOMETRY": order.geometry.constants() for side, order in orders.items()}
    both = {"SOURCE": FRAGMENT_ORDER, "BITS": bits, "OUTLIERS": outliers}
    sides = {f"{side}_{name}": value for side in ("KEY", "VALUE") for name, value in both.items()}
    rows, tuning = triton.next_power_of_2(group), tuning_for(target)
    heads = {
        "H": 8 * group,
        "G": 8,
        "D": HEAD_DIM,
        "ROWS": rows,
        "CHUNK": chunk or chunk_tokens(rows, _MANY, HEAD_DIM, tuning),
    }
    sizes = {"PAIRS": HEAD_DIM // 2, "CHANNELS": HEAD_DIM, "ROTARY_HALF": HEAD_DIM // 2, "ENTRIES": tuning.entries}
    flags: dict[str, Any] = {"KEY_DYNAMIC": False, "VALUE_DYNAMIC": True, "LIMITED": True, "PRECISE": False}
    return {
        **heads,
        **sizes,
        **sides,
        **geometry,
        **flags,
        "TURN": _turn(orders["key"], rows),
        "QUICK": True,
        **{f"{side.upper()}_STAGES": stages_of(order, rows, heads["CHUNK"], tuning) for side, order in orders.items()},
        **{f"{side.upper()}_FAST": lookup_of(order) for side, order in orders.items()},
    }


def chunk_of(constants: dict[str, Any], warps: int, outliers: float) -> Chunk:
    """The work of a chunk for one warp; `score_chunk` divides it by the same rules."""
    rows, turn, tokens = (constants[name] for name in ("ROWS", "TURN", "CHUNK"))
    span = min(16 // rows, tokens // turn) * turn  # tokens for which 16 rows hold rotated queries
    products = 64 * HEAD_DIM // 64 // warps  # of n8k8: 64 tokens, D numbers each
    return Chunk(
        blocks=tokens // 64,
        products=products,
        # the loop's body holds two rounds, of which the second is left out where there is none
        rounds=expected_rounds(outliers * tokens * HEAD_DIM, constants["ENTRIES"]) / 2,
        spans=tokens // span,
        span_products=products * turn // 64 if constants["KEY_DYNAMIC"] else 0,
        query_places=places_of_function(rotate_back.fn) | places_of_loop(score_chunk.fn, "span"),
    )


def compile_for(
    target: int, bits: int, group: int, chunk: int | None = None, outliers: float = OUTLIERS
) -> tuple[dict[str, Any], list[Run]]:
    """Compile the decode kernel for a GPU of compute capability `target` / 10; (the counts, what they are made of)."""
    constants = attention_constants(target, bits, group, chunk, outliers > 0)
    options = _options(HEAD_DIM, tuning_for(target))
    warps = options["num_warps"]
    compiled = _compile(target, constants, options)
    cubin = compiled.asm["cubin"]
    usage = _disassemble(cubin, "cuobjdump", "-res-usage")
    places = places_of_code(_disassemble(cubin, "nvdisasm", "-gi", "-c"), rotate_back.fn, score_chunk.fn)
    if not places:
        raise UserError("the machine code names no lines of its source; unset TRITON_DISABLE_LINE_INFO")
    code = parse(_disassemble(cubin, "cuobjdump", "-sass"), places)
    try:
        runs, blocks = runs_of_a_chunk(code, chunk_of(constants, warps, outliers))
    except ValueError as error:
        raise RuntimeError(f"sm_{target}, {bits} bits, group {group}: {error}") from error
    counts = {
        "target": f"sm_{target}",
        "bits": bits,
        "group": group,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared + (declared := declared_memory(usage, target)),
        "declared": declared,
        **per_element(runs, blocks * 64 * HEAD_DIM / (32 * warps)),
    }
    return counts, runs


def declared_memory(usage: str, target: int) -> int:
    """Bytes of shared memory that inline PTX declares, of which Triton knows nothing."""
    reserved = 1024 if target >= 90 else 0  # for every program; the assembler counts it since compute capability 9.0
    return int(re.search(r"SHARED:(\d+)", usage)[1]) - reserved


def per_element(runs: Sequence[Run], elements: float) -> dict[str, Any]:
    """Instructions per element, of a chunk that has `elements` keys' and as many values' elements per lane."""
    total = {phase: sum(run.instructions for run in runs if run.phase == phase) / elements for phase in PHASES}
    counts = {
        "keys": total["keys"],
        "values": total["values"],
        "mean": (total["keys"] + total["values"]) / 2,
        "queries": total["queries"],
        "outliers": (total["key_outliers"] + total["value_outliers"]) / 2,
        "rest": total["rest"] / 2,
        "whole": sum(total.values()) / 2,
    }
    spills = {run.phase: run.spills for run in runs if run.inner}
    return {**{name: round(count, 2) for name, count in counts.items()}, "spills": spills}


def expected_rounds(mean: float, at_a_time: int) -> float:
    """How often a loop runs that takes `at_a_time` of a Poisson-distributed number: the mean of the ceiling."""
    probability, below, rounds = math.exp(-mean), 0.0, 0.0
    if mean > 600:  # e^-mean would vanish, and the distribution is narrow
        deviation, edge = math.sqrt(2 * mean), 0
        while (beyond := 0.5 * math.erfc((edge * at_a_time + 0.5 - mean) / deviation)) > 1e-9:
            rounds, edge = rounds + beyond, edge + 1
        return rounds
    for count in range(int(mean + 12 * math.sqrt(mean)) + at_a_time):
        below += probability
        if count % at_a_time == 0:  # one round more whenever there are more than `count` entries
            rounds += max(0.0, 1 - below)
        probability *= mean / (count + 1)
    return rounds


def _compile(target: int, constants: dict[str, Any], options: dict[str, int]) -> Any:
    types = {name: kind for kind, names in _TYPES.items() for name in names.split()}
    names = split_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("block_words")
    }
    source = ASTSource(split_kernel, signature, {n: constants[n] for n in names if n in constants}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _disassemble(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        environment = {**os.environ, "PATH": f"{_TOOLS}:{os.environ['PATH']}"}
        command = [_TOOLS / tool, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def class_rows(counts: dict[str, Any], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What a round of the loops over keys and values consists of, a row for each class and a column for each loop."""
    dense = {run.phase: run.kinds() for run in runs if run.inner and run.phase in ("keys", "queries", "values")}
    kinds = sorted(
        {kind for found in dense.values() for kind in found}, key=lambda k: -sum(f[k] for f in dense.values())
    )
    what = {name: counts[name] for name in ("target", "bits", "group")}
    return [{**what, "class": kind, **{phase: found[kind] for phase, found in dense.items()}} for kind in kinds]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.compile_kernels", __doc__)
    parser.add_argument("--targets", type=positive_int, nargs="+", default=[80, 90])
    parser.add_argument("--bits", type=positive_int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--groups", type=positive_int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--chunk", type=positive_int, help="tokens, a power of two (as the kernel runs)")
    parser.add_argument("--outliers", type=float, default=OUTLIERS, help=f"share of all elements; 0: none ({OUTLIERS})")
    parser.add_argument("--all", action="store_true", help="instructions of the loops by class, too")
    parser.add_argument("--results", help="JSONL file to append to")
    arguments = parser.parse_args(argv)
    chunk = arguments.chunk or LEAST_CHUNK
    if not 0 <= arguments.outliers < 0.5 or chunk & (chunk - 1) or chunk < LEAST_CHUNK:
        raise UserError(f"--outliers is a share below 0.5, and --chunk a power of two from {LEAST_CHUNK} on")
    kernels = [
        compile_for(target, bits, group, arguments.chunk, arguments.outliers)
        for target in arguments.targets
        for bits in arguments.bits
        for group in arguments.groups
    ]
    print(format_table([{**counts, "spills": _short(counts["spills"])} for counts, _ in kernels]))
    if arguments.all:
        for counts, runs in kernels:
            print("\n" + format_table(class_rows(counts, runs)))
    for counts, _ in kernels:
        append_row(arguments.results, {**counts, "share_of_outliers": arguments.outliers}, packages=("torch", "triton"))
    return {"triton": triton.__version__, "kernels": [counts for counts, _ in kernels]}


def _short(spills: dict[str, int]) -> str:
    return ", ".join(f"{phase} {count}" for phase, count in spills.items() if count) or "none"


if __name__ == "__main__":
    run_command(main)
