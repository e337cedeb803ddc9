"""`scripts/bench/gpu.sh` with an interpreter that only writes down what it is asked to run."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY


def run(folder: Path, code: int = 0, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    stub, log = folder / "python", folder / "log"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexit {code}\n')
    stub.chmod(0o755)
    command = ["bash", str(REPOSITORY / "scripts" / "bench" / "gpu.sh"), str(folder / "out")]
    environment = {**os.environ, "PYTHON": str(stub), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done, log.read_text().splitlines() if log.exists() else []


def test_tests_come_first_then_every_shape_and_scheme(tmp_path: Path) -> None:
    done, asked = run(tmp_path)
    assert done.returncode == 0 and done.stdout.count("done ") == 1 + 3 * 2 * 3
    assert asked[0].startswith("-m pytest") and "tests/test_kernels_graph.py" in asked[0]
    assert "--device cuda --shape llama-7b --scheme nuq4-1% --batch 1 --ops decode,append,prefill" in asked[1]
    assert sum("--contexts 512K 1M --results" in line for line in asked) == 6
    assert sum("--batch 8" in line and "--contexts 2K 16K 128K" in line for line in asked) == 6


@pytest.mark.parametrize(("code", "variables", "exit_code", "said"), [
    (3, {"PARTS": "tests"}, 1, "failed     tests"),
    (0, {"BUDGET": "0", "PARTS": "tests"}, 0, "left out   tests: no time left"),
])  # fmt: skip
def test_failures_and_lack_of_time_are_told(
    tmp_path: Path, code: int, variables: dict[str, str], exit_code: int, said: str
) -> None:
    done, asked = run(tmp_path, code, **variables)
    assert done.returncode == exit_code and said in done.stdout
    assert len(asked) == (0 if "BUDGET" in variables else 1)


def test_other_parts_are_asked_for(tmp_path: Path) -> None:
    parts = {"PARTS": "sanitize smollm2 generate", "MODEL": "smol", "QUANTIZERS": "q4.st q3.st", "TEXT": "notes.txt"}
    done, asked = run(tmp_path, **parts, SANITIZER=str(tmp_path / "python"), CONTEXTS="32K", CACHES="fp16 nuq2")
    assert done.returncode == 0 and len(asked) == 3 + 2 + 2
    assert asked.pop(0) == "-m scripts.checks.small_steps --device cuda"  # compiles the kernels
    assert asked[0].startswith("--tool memcheck --error-exitcode 9") and "--tool racecheck" in asked[1]
    assert asked[1].endswith("-m scripts.checks.small_steps --device cuda")
    assert "scripts.checks.device smol q3.st --device cuda --text notes.txt --results" in asked[3]
    assert "--shape llama-3-8b --caches fp16 nuq2 --contexts 32K --seconds" in asked[5]
    assert int(asked[5].split("--seconds ")[1].split()[0]) < 270


def test_parts_without_what_they_need_are_left_out(tmp_path: Path) -> None:
    done, asked = run(tmp_path, PARTS="sanitize smollm2", SANITIZER=str(tmp_path / "none"), MODEL="smol")
    assert done.returncode == 0 and not asked
    assert "sanitize: no compute-sanitizer" in done.stdout and "smollm2: no MODEL, or no QUANTIZERS" in done.stdout


def test_without_a_folder_it_says_what_it_takes() -> None:
    command = ["bash", str(REPOSITORY / "scripts" / "bench" / "gpu.sh")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "SCHEMES   nuq4-1% nuq3-1% nuq2-1%" in done.stderr
