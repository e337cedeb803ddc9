"""What every command shares: the JSON line, exit codes, one line for bad input."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

import gradients.__main__
import quant.evaluate
import quant.fit
from gradients.cli import UserError, format_table, run_command

Main = Callable[[Sequence[str] | None], Mapping[str, Any] | None]


def run(main: Main, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command on process arguments as `python -m` would; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    try:
        run_command(main)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_three_commands_in_a_row_each_end_in_one_json_line(
    record_arguments, llama_folder, text_file, tmp_path, monkeypatch, capsys
) -> None:
    records, quantizers = str(tmp_path / "records"), str(tmp_path / "q.safetensors")
    evaluated = ["--model", str(llama_folder), "--text", f"{text_file}:50-100", "--seqlen", "65", "--windows", "2"]
    commands: list[tuple[Main, list[str], dict[str, Any]]] = [
        (
            gradients.__main__.main,
            [*record_arguments, "--output", records],
            {"records": records, "windows": 4, "seqlen": 65, "recorded_now": 4},
        ),
        (
            quant.fit.main,
            ["--records", records, "--scheme", "nuq4-1%", "--sink-tokens", "3", "--q-norm", "--output", quantizers],
            {"quantizers": quantizers, "scheme": "nuq4-1% sink_tokens=3 q_norm=True", "layers": 2},
        ),
        (
            quant.evaluate.main,
            [*evaluated, "--device", "cpu", "--quantizers", quantizers],
            {"scheme": "nuq4-1% sink_tokens=3 q_norm=True", "tokens": 128},
        ),
    ]
    for main, arguments, expected in commands:
        assert run(main, arguments, monkeypatch) == 0
        printed = capsys.readouterr()
        *summary, last = printed.out.splitlines()
        assert json.loads(last).items() >= expected.items()
        assert summary, "a person gets a summary too"
        assert not any(line.startswith("{") for line in summary)
        assert "error" not in printed.err


@pytest.mark.parametrize("error", [UserError, NotImplementedError])
def test_bad_input_is_one_line_and_exit_code_2(error: type[Exception], monkeypatch, capsys) -> None:
    def main(_argv: object) -> None:
        raise error("text 'x' has\n  3 tokens;\nlower --seqlen")

    assert run(main, [], monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: text 'x' has 3 tokens; lower --seqlen\n"
    assert printed.out == ""


def test_our_own_bugs_keep_their_traceback(monkeypatch) -> None:
    def main(_argv: object) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run(main, [], monkeypatch)


def test_other_processes_stay_silent(monkeypatch, capsys) -> None:
    assert run(lambda _argv: None, [], monkeypatch) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("main", [gradients.__main__.main, quant.fit.main, quant.evaluate.main])
def test_help_shows_the_examples(main: Main, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "\n    python -m " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nGPU 0 has"),
            "Tried to allocate 9 GiB. GPU 0",
        ),
        (MemoryError(), "out of memory"),
        (None, "tried to allocate"),
    ],
    ids=["GPU", "Python", "host"],
)
def test_too_little_memory_is_one_line(error: Exception | None, said: str, monkeypatch, capsys) -> None:
    def greedy(_argv: object) -> None:
        if error is not None:
            raise error
        torch.empty(2**60, dtype=torch.uint8)

    assert run(greedy, [], monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory") and said in line and "--prefill-chunk" in line


def test_other_errors_keep_their_traceback(monkeypatch) -> None:
    def broken(_argv: object) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(broken, [], monkeypatch)


def test_a_reader_that_has_gone_ends_a_command_in_silence(tmp_path) -> None:
    """`| head` has read enough: no traceback, and not the exit code of success."""
    code = "from gradients.cli import run_command; run_command(lambda _: print('x' * 10**6) or {})"
    reader, writer = os.pipe()
    os.close(reader)
    with open(tmp_path / "errors", "w") as errors:
        ended = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=errors, cwd=REPOSITORY, check=False)
    os.close(writer)
    assert (ended.returncode, (tmp_path / "errors").read_text()) == (141, "")


def test_gguf_weights_point_at_the_conversion(llama_folder, text_file, tmp_path, monkeypatch, capsys) -> None:
    def stop(*_: object, **__: object) -> None:
        raise UserError("loaded enough")

    monkeypatch.setattr("gradients.loading._load_or_explain", stop)
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    for folder in (llama_folder, tmp_path):
        with pytest.raises(UserError, match="loaded enough"):
            quant.evaluate.main(["--model", str(folder), "--text", str(text_file), "--device", "cpu"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ") and line.endswith(
        f"`python -m scripts.convert_gguf {tmp_path} FOLDER` does it once"
    )


ENCODINGS = [
    pytest.param({"PYTHONIOENCODING": "ascii"}, id="ascii output", marks=pytest.mark.slow),
    pytest.param({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, id="C locale"),
]


@pytest.mark.parametrize("environment", ENCODINGS)
def test_text_that_a_stream_cannot_take(llama_folder, quantizers_file, environment: dict[str, str]) -> None:
    """An answer goes on with other characters; a prompt whose bytes were misread ends in a line."""
    prompt = "na\u00efve \u4f60\u597d cach\u00e9"
    command = [sys.executable, "-m", "deployment.generate", "--model", str(llama_folder), "--device", "cpu"]
    command += ["--quantizers", str(quantizers_file), "--max-new-tokens", "40", "--sample", "--seed", "3"]
    finished = subprocess.run(
        [*command, "--prompt", prompt],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        timeout=120,
        check=False,
    )
    error = finished.stderr.decode().splitlines()[-1] if finished.stderr else ""
    if "LC_ALL" in environment:
        assert finished.returncode == 2
        assert (
            error.startswith("error: --prompt is no text in the encoding of this process") and "PYTHONUTF8=1" in error
        )
        return
    assert finished.returncode == 0, error
    *shown, last = finished.stdout.decode("ascii").splitlines()
    text = json.loads(last)["text"]
    assert not text.isascii() and "?" in "".join(shown)  # tokens are bytes: some of these are no characters


def test_tables_align() -> None:
    rows = [{"scheme": "nuq3-1%", "perplexity": 12.34567}, {"scheme": "int4", "perplexity": 9.0}]
    assert format_table(rows).splitlines() == [
        " scheme  perplexity",
        "-------  ----------",
        "nuq3-1%       12.35",
        "   int4           9",
    ]
