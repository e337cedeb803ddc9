"""`scripts/bench/gpu.sh` and `multi_gpu.sh` with an interpreter that only writes down what it is asked to run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from quant.results import read_rows


def run(folder: Path, script: str, code: int = 0, **variables: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """(the finished script, what its interpreter was asked for)."""
    stub, log = folder / "python", folder / "log"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit {code}\n')
    stub.chmod(0o755)
    command = ["bash", str(REPOSITORY / "scripts" / "bench" / script), str(folder / "out")]
    environment = {**os.environ, "PYTHON": str(stub), "GPUS": "8", **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done, log.read_text().splitlines() if log.exists() else []


def test_tests_come_first_then_every_shape_and_scheme(tmp_path) -> None:
    done, asked = run(tmp_path, "gpu.sh")
    assert done.returncode == 0 and done.stdout.count("done ") == 1 + 3 * 2 * 3
    assert asked[0].startswith("-m pytest") and "tests/test_kernels_graph.py" in asked[0]
    assert "--device cuda --shape llama-7b --scheme nuq4-1% --batch 1 --ops decode,append,prefill" in asked[1]
    assert sum("--contexts 512K 1M --results" in line for line in asked) == 6
    assert sum("--batch 8" in line and "--contexts 2K 16K 128K" in line for line in asked) == 6


def test_other_parts_are_asked_for(tmp_path) -> None:
    parts = {"PARTS": "sanitize smollm2 generate", "MODEL": "smol", "QUANTIZERS": "q4.st q3.st", "TEXT": "notes.txt"}
    done, asked = run(
        tmp_path, "gpu.sh", **parts, SANITIZER=str(tmp_path / "python"), CONTEXTS="32K", CACHES="fp16 nuq2"
    )
    assert done.returncode == 0 and len(asked) == 3 + 2 + 2
    assert asked.pop(0) == "-m scripts.checks.small_steps --device cuda"  # compiles the kernels
    assert asked[0].startswith("--tool memcheck --error-exitcode 9") and "--tool racecheck" in asked[1]
    assert "scripts.checks.device smol q3.st --device cuda --text notes.txt --results" in asked[3]
    assert "--shape llama-3-8b --caches fp16 nuq2 --contexts 32K --seconds" in asked[5]


def test_several_gpus_are_asked_for_every_part(tmp_path) -> None:
    done, asked = run(tmp_path, "multi_gpu.sh")
    assert done.returncode == 0, done.stderr
    sharded = [line for line in asked if "--part sharded" in line]
    longest = [line for line in asked if "--part longest" in line]
    assert all("--devices cuda:0 cuda:1 --against-one" in line for line in sharded)
    assert any("--filled prefill" in line for line in sharded) and any("128K longest" in line for line in sharded)
    assert all("cuda:7" in line for line in longest) and any("--contexts 10000000 longest" in line for line in longest)
    assert any("--device-memory" in line for line in longest) and {"nuq2", "nuq3-1%"} <= set(" ".join(longest).split())
    together = [line for line in asked if "--part parallel" in line]
    assert ["--nproc-per-node 2" in line for line in together] == [False, True, False] and len(together) == 3
    assert "--nproc-per-node 8" in together[2] and "--contexts 128K 10000000 longest" in together[2]
    assert "--devices cuda:0" in together[0] and all("--graph" in line for line in together)
    assert any("scripts.bench.random_model" in line for line in asked)
    assert any("scripts.bench.processes" in line and "--processes 2" in line for line in asked)


@pytest.mark.parametrize(("script", "code", "variables", "exit_code", "said"), [
    ("gpu.sh", 3, {"PARTS": "tests"}, 1, "failed     tests"),
    ("gpu.sh", 0, {"BUDGET": "0", "PARTS": "tests"}, 0, "left out   tests: no time left"),
    ("gpu.sh", 0, {"PARTS": "sanitize", "SANITIZER": "none"}, 0, "sanitize: no compute-sanitizer"),
    ("gpu.sh", 0, {"PARTS": "smollm2", "MODEL": "smol"}, 0, "smollm2: no MODEL, or no QUANTIZERS"),
    ("multi_gpu.sh", 0, {"GPUS": "1"}, 2, "error: GPUS 1: several are needed; DRY=1 goes without"),
    ("multi_gpu.sh", 0, {"PARTS": "shraded"}, 2, "error: PARTS shraded: there are sharded, parallel, longest and processes"),
])  # fmt: skip
def test_what_is_left_out_fails_or_is_refused_is_said(
    script: str, code: int, variables: dict[str, str], exit_code: int, said: str, tmp_path
) -> None:
    done, asked = run(tmp_path, script, code, **variables)
    assert done.returncode == exit_code and said in done.stdout + done.stderr
    assert len(asked) == (exit_code == 1)


@pytest.mark.slow
def test_several_gpus_dry(tmp_path) -> None:
    """Everything that is done on several GPUs, tiny and on a CPU, in two gloo processes where there are several."""
    environment = {**os.environ, "PYTHON": sys.executable, "DRY": "1", "BUDGET": "1500", "SCHEMES": "nuq3-1%"}
    command = ["bash", str(REPOSITORY / "scripts" / "bench" / "multi_gpu.sh"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    sharded, processes, longest = (
        read_rows(tmp_path / f"gpu-multi-{part}.jsonl") for part in ("sharded", "processes", "longest")
    )
    assert all(row["tokens_equal_one_device"] for row in sharded if row["world_size"] > 1 and row["asked"] != "longest")
    together = read_rows(tmp_path / "gpu-tensor-parallel.jsonl")
    assert [row["processes"] for row in together] == [1, 2] and all(row["fits"] for row in together)
    assert all(row["identical"] for row in processes) and {row["processes"] for row in processes} == {1, 2}
    assert all(row["fits"] and row["filled"] == "synthetic" for row in longest)
