"""Several processes share the windows: together they write the files, and report the figures, of one."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY

from gradients.records import Records
from quant.evaluate import main as evaluate_main

SCRIPT = """
import json, os, sys
from gradients.__main__ import main as record
from quant.evaluate import main as evaluate

summaries = [main(arguments) for main, arguments in zip((record, evaluate), json.loads(sys.argv[1]))]
with open(f"summaries-{os.environ['RANK']}.json", "w") as file:
    json.dump(summaries, file)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_processes_do_the_work_of_one(
    record_arguments: list[str],
    records: Records,
    llama_folder: Path,
    text_file: Path,
    quantizers_file: Path,
    tmp_path: Path,
    snapshot: Callable[[Path], dict[str, bytes]],
) -> None:
    """Two processes over gloo; `accelerate launch` starts several only where there are several accelerators."""
    (tmp_path / "both.py").write_text(SCRIPT)
    evaluation = ["--model", str(llama_folder), "--text", f"{text_file}:50-100", "--seqlen", "65", "--windows", "3"]
    evaluation += ["--device", "cpu", "--quantizers", str(quantizers_file)]
    arguments = [[*record_arguments, "--output", str(tmp_path / "records")], evaluation]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    finished = subprocess.run(
        [*launch, str(tmp_path / "both.py"), json.dumps(arguments)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert snapshot(tmp_path / "records") == snapshot(records.folder)

    silent = json.loads((tmp_path / "summaries-1.json").read_text())
    assert silent == [None, None], "only the main process reports"
    recorded, evaluated = json.loads((tmp_path / "summaries-0.json").read_text())
    assert (recorded["windows"], recorded["recorded_now"]) == (4, 2)
    alone = evaluate_main(evaluation)
    assert alone is not None
    for name in ("perplexity", "nll", "baseline_nll", "kl", "tokens", "top1_agreement", "bits_per_element"):
        assert evaluated[name] == pytest.approx(alone[name], rel=1e-12), name
