"""What the compiler makes of the kernels, without a GPU; on one, that contexts of any length run the same binary."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from scripts.machine_code import Chunk, parse, runs_of_a_chunk

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes that one program may take
# per dequantized element, keys and values averaged, of the byte permutes; the study's inline assembly got 4.0, 3.3, 3.1
MOST_INSTRUCTIONS = {4: 8.0, 3: 7.0, 2: 6.0}
MOST_IN_ALL = {4: 12.0, 3: 11.0, 2: 10.0}  # of the whole kernel, with 1 % outliers


def test_decode_compiles_for_both_architectures() -> None:
    """In a process of its own, since Triton interprets in this one."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "scripts.compile_kernels", "--groups", "1", "4"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=True)
    kernels = json.loads(run.stdout.splitlines()[-1])["kernels"]
    assert len(kernels) == 2 * 3 * 2
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_LIMIT[kernel["target"]]
        assert kernel["mean"] <= MOST_INSTRUCTIONS[kernel["bits"]], kernel
        assert kernel["mean"] < kernel["whole"] <= MOST_IN_ALL[kernel["bits"]], kernel
        assert {"keys", "values"} <= set(kernel["spills_in_loops"])


def listing(*lines: str) -> str:
    """As cuobjdump prints it; `name` may be used where a branch goes, of the line that starts with `name: `."""
    labels = {line.split(": ")[0]: f"0x{16 * i:04x}" for i, line in enumerate(lines) if ": " in line}
    code = []
    for i, line in enumerate(lines):
        words = [labels.get(word, word) for word in line.split(": ")[-1].split()]
        code.append(f"        /*{16 * i:04x}*/                   {' '.join(words)} ;      /* 0x00 */")
    return "\n".join(code)


KEYS = ["rotate: PRMT R0", "@!P1 BRA fast", "slow: STL R0", "@P0 BRA slow", "fast: FADD R1", "@P2 BRA rotate"]
KEYS += ["keys: HMMA.16816.F32 R0", "LDL R3", "@P0 BRA keys", "found: RED.E.ADD R0", "LOP3.LUT R1", "@P0 BRA found"]
VALUES = ["values: HMMA.16816.F32 R0", "HMMA.1688.F32 R0", "HMMA.1688.F32 R0", "@P0 BRA values"]
FRAME = ["work: S2R R0"], ["MUFU.EX2 R0"], ["@P0 BRA chunk", "BRA work"]


def counted(lines: list[str], blocks: int = 8) -> dict[str, float]:
    runs, _ = runs_of_a_chunk(parse(listing(*lines)), Chunk(blocks=blocks, products=2, rounds=2.5))
    totals: dict[str, float] = {}
    for run in runs:
        totals[run.phase] = totals.get(run.phase, 0) + run.instructions
    return totals


def test_every_loop_counts_as_often_as_it_runs() -> None:
    lines = [*FRAME[0], "chunk: MOV R0", *KEYS, *FRAME[1], *VALUES, *FRAME[2]]
    # of the rotation two instructions are the slow path; a body of two blocks of values runs half as often
    assert counted(lines) == {"other": 8 * 4, "keys": 8 * 3, "key_outliers": 2.5 * 3, "values": 4 * 4, "rest": 3}


def test_products_outside_a_loop_shorten_it_and_no_loop_says_how_long_a_chunk_is() -> None:
    lines = [*FRAME[0], "chunk: MOV R0", *KEYS, *FRAME[1], *VALUES, "HMMA.16816.F32 R0", *FRAME[2]]
    assert counted(lines)["values"] == 3.5 * 4 and counted(lines)["rest"] == 4
    flat = [*FRAME[0], "chunk: HMMA.16816.F32", "MUFU.EX2 R0", "HMMA.16816.F32", *FRAME[2]]
    runs, blocks = runs_of_a_chunk(parse(listing(*flat)), Chunk(8, 2, 0))
    assert blocks == 1 and [(run.phase, run.instructions) for run in runs] == [("rest", 4)]


def test_code_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="no loop of the machine code"):
        counted(["chunk: HMMA.16816.F32", "@P0 BRA chunk"])
    with pytest.raises(ValueError, match="2 products of values in a chunk and no loop"):
        counted([*FRAME[0], "chunk: MOV R0", *KEYS, *FRAME[1], "HMMA.16816.F32", *FRAME[2]])


@pytest.mark.parametrize("mean", [0.5, 3, 655.36])
def test_rounds_are_the_mean_of_the_ceiling(mean: float) -> None:
    drawn = np.random.default_rng(0).poisson(mean, 200_000)
    expected = compile_module().expected_rounds(mean, 4 if mean < 10 else 256)
    assert expected == pytest.approx(np.ceil(drawn / (4 if mean < 10 else 256)).mean(), rel=0.01)


def compile_module() -> Any:
    pytest.importorskip("triton")
    from scripts import compile_kernels

    return compile_kernels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="interpreted kernels are not compiled")
def test_a_growing_context_compiles_nothing_new() -> None:
    from test_kernels_attention import run_case

    from deployment.kernels.combine import combine_kernel
    from deployment.kernels.split import split_kernel

    def compiled() -> int:
        return sum(
            len(caches[0]) for kernel in (split_kernel, combine_kernel) for caches in kernel.device_caches.values()
        )

    run_case(lengths=(300,))
    before = compiled()
    for length in (301, 352, 400, 511, 700):
        run_case(lengths=(length,))
    assert compiled() == before
