"""`scripts/checks/triton_versions.py`, as far as it goes without installing anything."""

import sys
from pathlib import Path

from scripts.checks import triton_versions


def test_every_kernel_test_runs_once() -> None:
    listed = [path for files in triton_versions.parts().values() for path in files]
    assert len(listed) == len(set(listed)) >= 5
    assert all((triton_versions.REPOSITORY / path).exists() for path in listed)


def test_failures_and_empty_runs_do_not_pass(tmp_path: Path) -> None:
    files = {
        "good": "def test_a(): pass",
        "bad": "def test_a(): pass\ndef test_b(): assert 0",
        "none": "",
        "broken": "(",
    }
    results = {}
    for name, text in files.items():
        path = tmp_path / f"test_{name}.py"
        path.write_text(text + "\n")
        results[name] = triton_versions.run_part(Path(sys.executable), [str(path)], 1, 1)
    counts = {name: (row["passed"], row["failed"], row["works"]) for name, row in results.items()}
    assert counts == {"good": (1, 0, True), "bad": (1, 1, False), "none": (0, 0, False), "broken": (0, 1, False)}
