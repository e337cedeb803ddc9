"""Scripts in two processes over gloo, as torchrun starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import REPOSITORY


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launched(folder: Path, script: str, argument: Any) -> tuple[list[list[Any]], str]:
    """What each process of a script wrote to `summaries-{rank}.json`, and what both printed."""
    (folder / "all.py").write_text(script)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    finished = subprocess.run(
        [*launcher, "--master_port", str(free_port()), str(folder / "all.py"), json.dumps(argument)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads((folder / f"summaries-{rank}.json").read_text()) for rank in (0, 1)], finished.stdout
