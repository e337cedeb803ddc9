"""Compile the kernels ahead of time, for GPUs that need not be there, and count what the compiler made of them.

    python -m scripts.compile_kernels                                  # attention at D = 128 for sm_80 and sm_90
    python -m scripts.compile_kernels --targets 80 --bits 3 --groups 4

A row per kernel: registers, bytes of stack, shared memory, and machine instructions per dequantized element of the
loops over keys and over values (instructions of a warp's lane, one block of 64 tokens per iteration). Environments in which
Triton interprets kernels cannot compile them.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deployment.kernels.packed import _REGISTERS, _WIDTH
from deployment.kernels.split import split_kernel
from deployment.order import Fragment
from gradients.cli import command_parser, format_table, positive_int, run_command

HEAD_DIM = 128
_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);", re.MULTILINE)
_TYPES = {
    "*i64": "positions origins limits",
    "*i16": "key_index value_index",
    "*fp16": "query key_scales value_scales key_value value_value key_dense value_dense rotated weights scaled",
    "*fp32": (
        "turn key_levels key_scale key_zero key_floor value_levels value_scale value_zero value_floor scores extra "
        "rescale outputs maxima sums"
    ),
    "*i32": (
        "high low key_words value_words key_starts key_ends value_starts value_ends key_width key_offset "
        "key_first_level value_width value_offset value_first_level"
    ),
    "fp32": "scaling",
}


def attention_constants(bits: int, group: int) -> dict[str, Any]:
    """The decode kernel for keys with ranges per channel and values with ranges per token."""
    geometry = {f"{role.upper()}_GEOMETRY": Fragment.of(bits, HEAD_DIM, role).constants() for role in ("key", "value")}  # type: ignore[arg-type]
    both = {"SOURCE": 1, "BITS": bits, "OUTLIERS": True}
    sides = {f"{side}_{name}": value for side in ("KEY", "VALUE") for name, value in both.items()}
    heads = {"H": 8 * group, "G": 8, "D": HEAD_DIM, "ROWS": triton.next_power_of_2(group), "CHUNK": 512}
    sizes = {"PAIRS": HEAD_DIM // 2, "CHANNELS": HEAD_DIM, "ROTARY_HALF": HEAD_DIM // 2, "ENTRIES": 256}
    flags: dict[str, Any] = {"KEY_DYNAMIC": False, "VALUE_DYNAMIC": True, "LIMITED": True, "PRECISE": False}
    flags |= {"KEY_FAST": True, "VALUE_FAST": True, "WIDTH": _WIDTH}
    return {**heads, **sizes, **sides, **geometry, **flags}


def compile_for(target: int, bits: int, group: int) -> dict[str, Any]:
    """Compile the decode kernel for a GPU of compute capability `target` / 10 and count."""
    constants = attention_constants(bits, group)
    types = {name: kind for kind, names in _TYPES.items() for name in names.split()}
    names = split_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("block_words")
    }
    source = ASTSource(split_kernel, signature, {n: constants[n] for n in names if n in constants}, aligned)
    options = {"num_warps": 4, "num_stages": 1, "maxnreg": _REGISTERS}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    keys, values = _loops(_disassemble(compiled.asm["cubin"], "-sass"))
    usage = _disassemble(compiled.asm["cubin"], "-res-usage")
    per_lane = 64 * HEAD_DIM / (4 * 32)
    return {
        "target": f"sm_{target}",
        "bits": bits,
        "group": group,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "keys": round(keys / per_lane, 2),
        "values": round(values / per_lane, 2),
        "mean": round((keys + values) / 2 / per_lane, 2),
    }


def _disassemble(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        environment = {**os.environ, "PATH": f"{_TOOL.parent}:{os.environ['PATH']}"}
        run = subprocess.run([_TOOL, option, file.name], capture_output=True, text=True, env=environment, check=True)
    return run.stdout + run.stderr


def _loops(listing: str) -> tuple[int, int]:
    """Instructions of the innermost loops that hold tensor core instructions, in the order of the code."""
    code = [(int(address, 16), name, rest) for address, name, rest in _INSTRUCTION.findall(listing)]
    loops = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            body = [n for a, n, _ in code if int(target[1], 16) <= a <= address]
            if any(n.startswith(("HMMA", "HGMMA")) for n in body):
                loops.append((int(target[1], 16), address, len(body)))
    inner = [
        size
        for first, last, size in sorted(loops)
        if not any(first <= begin and end <= last and (begin, end) != (first, last) for begin, end, _ in loops)
    ]
    if len(inner) != 2:
        raise RuntimeError(f"expected a loop over keys and one over values, found {len(inner)}")
    return inner[0], inner[1]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.compile_kernels", __doc__)
    parser.add_argument("--targets", type=positive_int, nargs="+", default=[80, 90])
    parser.add_argument("--bits", type=positive_int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--groups", type=positive_int, nargs="+", default=[1, 4, 8])
    arguments = parser.parse_args(argv)
    rows = [
        compile_for(target, bits, group)
        for target in arguments.targets
        for bits in arguments.bits
        for group in arguments.groups
    ]
    print(format_table(rows))
    return {"triton": triton.__version__, "kernels": rows}


if __name__ == "__main__":
    run_command(main)
