"""Commands in two processes over gloo, as torchrun starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import REPOSITORY

_SCRIPT = """
import importlib, json, os, sys
from gradients.cli import UserError, end_process_group

def said(module, arguments):
    try:
        return importlib.import_module(module).main(arguments)
    except (UserError, NotImplementedError) as error:
        return str(error)

summaries = [said(*command) for command in json.loads(sys.argv[1])]
with open(f"summaries-{os.environ['RANK']}.json", "w") as file:
    json.dump(summaries, file)
end_process_group()
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launched(folder: Path, commands: list[tuple[str, list[str]]]) -> tuple[list[list[Any]], str]:
    """What each process got of the commands, modules and their arguments: summaries, or errors; and what both printed."""
    (folder / "all.py").write_text(_SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*launcher, "--master_port", str(free_port()), str(folder / "all.py"), json.dumps(commands)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads((folder / f"summaries-{rank}.json").read_text()) for rank in (0, 1)], finished.stdout
