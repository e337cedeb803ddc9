"""Progress bars: where they are shown, and that nothing else decides."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY

from gradients.__main__ import main as record_main
from gradients.progress import progress
from quant.evaluate import main as evaluate_main


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("disabled", [None, "", "0", "1"])
def test_a_bar_is_shown_on_a_terminal_unless_disabled(
    terminal: bool, disabled: str | None, monkeypatch, capsys
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if disabled is not None:
        monkeypatch.setenv("TQDM_DISABLE", disabled)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(progress(range(3), desc="counting")) == [0, 1, 2]
    out, err = capsys.readouterr()
    assert out == "" and ("counting" in err) == (terminal and disabled != "1")
    list(progress(range(3), desc="counting", disable=True))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_commands_and_the_loading_of_models_keep_to_it(
    terminal: bool, record_arguments, llama_folder, text_file, quantizers_file, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    record_main([*record_arguments, "--output", str(tmp_path / "records"), "--windows", "1"])
    text = ["--text", str(text_file), "--seqlen", "33", "--windows", "1"]
    evaluate_main(["--model", str(llama_folder), "--quantizers", str(quantizers_file), *text])
    err = capsys.readouterr().err
    for bar in ("recording", "evaluating", "Loading weights"):
        assert (bar in err) == terminal, bar
    if not terminal:
        assert err == ""


def test_nothing_makes_a_bar_of_its_own() -> None:
    folders = ("gradients", "quant", "deployment", "scripts")
    having: Callable[[Path], bool] = lambda path: "import tqdm" in path.read_text(encoding="utf-8")  # noqa: E731
    paths = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    assert [path.name for path in paths if having(path)] == ["progress.py"]
