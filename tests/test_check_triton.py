"""`scripts/checks/triton_versions.py`, as far as it goes without installing anything."""

import sys
from pathlib import Path

import pytest

from gradients.cli import UserError
from scripts.checks import triton_versions


@pytest.mark.parametrize("version", ["3.6", "latest", "3.6.0; rm"])
def test_versions_are_versions(version: str) -> None:
    with pytest.raises(UserError, match="is not of the form 3.6.0"):
        triton_versions.main([version])


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


def test_a_version_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_versions.sys, "executable", str(tmp_path / "pip"))
    (tmp_path / "pip").write_text("#!/bin/sh\necho 'no such version' >&2\nexit 1\n")
    (tmp_path / "pip").chmod(0o755)
    monkeypatch.setattr(triton_versions.venv, "create", lambda _folder: None)
    with pytest.raises(UserError, match="triton 9.9.9 cannot be installed: no such version"):
        triton_versions.make_environment(tmp_path, "9.9.9")
