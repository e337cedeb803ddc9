"""Whose a result is: rows, records and quantizers of two models of one name and config, and of two texts of one name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quant.results
from gradients.__main__ import main as record_main
from gradients.cli import UserError
from quant.evaluate import main as evaluate_main
from quant.fit import main as fit_main
from quant.results import is_of, read_rows
from scripts.reproduce_tables import main as tables_main
from scripts.retrieval.passkey import main as passkey_main
from scripts.sweep_schemes import main as sweep_main


@pytest.fixture
def checkpoints(make_model, save_model, tmp_path) -> list[Path]:
    """Two checkpoints of one config in folders of one name; the first is the tiny Llama that was recorded."""
    later = make_model("llama")
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.mul_(1.02)
    models = {"run1": make_model("llama"), "run2": later}
    return [save_model(model, tmp_path / run / "checkpoint-500") for run, model in models.items()]


@pytest.mark.parametrize("command", ["sweep", "tables", "retrieval"])
def test_rows_of_another_checkpoint_of_the_same_name_are_its_own(
    command: str, checkpoints, records, text_file, tmp_path
) -> None:
    results = ["--records", str(records.folder), "--results", str(tmp_path / "rows.jsonl")]
    text = ["--text", str(text_file), "--seqlen", "33", "--windows", "2"]
    run: Callable[[Path], Any] = {
        "sweep": lambda model: sweep_main(["--model", str(model), *text, *results, "--schemes", "int4"]),
        "tables": lambda model: tables_main(["--model", str(model), *text, *results, "--tables", "ranges"]),
        "retrieval": lambda model: passkey_main(
            ["--model", str(model), *results, "--schemes", "int4", "--lengths", "330", "--samples", "1"]
        ),
    }[command]
    added = [run(model)["rows_added"] for model in (checkpoints[0], checkpoints[1], checkpoints[0])]
    assert added[0] == added[1] > 0 and added[2] == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {row["model"] for row in rows} == {"checkpoint-500"} and len({row["weights"] for row in rows}) == 2
    assert "nan" not in str(rows) and rows[0]["weights"] == records.manifest.weights


def test_rows_of_another_text_of_the_same_name_are_its_own(llama_folder, records, text_file, tmp_path) -> None:
    other = tmp_path / text_file.name
    other.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    arguments = ["--model", str(llama_folder), "--records", str(records.folder), "--seqlen", "33", "--windows", "2"]
    arguments += ["--results", str(tmp_path / "rows.jsonl"), "--schemes", "int4", "--text"]
    assert [sweep_main([*arguments, str(text)])["rows_added"] for text in (text_file, other, text_file)] == [1, 1, 0]


@pytest.mark.parametrize("command", ["sweep", "tables", "retrieval"])
def test_rows_of_another_dtype_are_their_own(command: str, llama_folder, records, text_file, tmp_path) -> None:
    where = ["--model", str(llama_folder), "--records", str(records.folder), "--results", str(tmp_path / "rows.jsonl")]
    text = ["--text", str(text_file), "--seqlen", "33", "--windows", "2"]
    run: Callable[[str], Any] = {
        "sweep": lambda dtype: sweep_main([*where, *text, "--schemes", "int4", "--dtype", dtype]),
        "tables": lambda dtype: tables_main([*where, *text, "--tables", "ranges", "--dtype", dtype]),
        "retrieval": lambda dtype: passkey_main(
            [*where, "--schemes", "int4", "--lengths", "330", "--samples", "1", "--dtype", dtype]
        ),
    }[command]
    added = [run(dtype)["rows_added"] for dtype in ("float32", "bfloat16", "float32")]
    assert added[0] == added[1] > 0 and added[2] == 0


def test_rows_of_more_text_are_their_own(llama_folder, records, text_file, tmp_path) -> None:
    """A first try on one window must not be taken for the whole."""
    arguments = ["--model", str(llama_folder), "--records", str(records.folder), "--text", str(text_file)]
    arguments += ["--seqlen", "33", "--results", str(tmp_path / "rows.jsonl"), "--schemes", "int4", "--windows"]
    assert [sweep_main([*arguments, windows])["rows_added"] for windows in ("1", "2", "1")] == [1, 1, 0]


def test_rows_of_other_fits_to_the_same_records_are_their_own(llama_folder, record_arguments, tmp_path) -> None:
    """Of fewer windows, of quantizers from a file, and of records whose moments have grown."""
    folder = str(tmp_path / "records")
    record_main([*record_arguments, "--windows", "2", "--output", folder])
    where = ["--model", str(llama_folder), "--results", str(tmp_path / "rows.jsonl"), "--lengths", "330"]
    files = {windows: str(tmp_path / f"{windows}.safetensors") for windows in ("1", "2")}
    for windows, file in files.items():
        fit_main(["--records", folder, "--scheme", "int4+fb", "--windows", windows, "--output", file])

    def added(*options: str) -> int:
        return passkey_main([*where, "--samples", "1", *options])["rows_added"]

    assert added("--quantizers", files["1"]) == 2, "the model as it is, and quantized"
    fit_again = ("--records", folder, "--schemes", "int4+fb")
    assert [added("--quantizers", files["2"]), added(*fit_again)] == [1, 1]
    record_main([*record_arguments, "--windows", "2", "--moment-windows", "3", "--output", folder])
    assert added(*fit_again) == 1
    assert [added("--quantizers", file) for file in files.values()] == [added(*fit_again), 0] == [0, 0]


def test_rows_without_digests_count_with_a_note(monkeypatch, capsys) -> None:
    quant.results._note_old_rows.cache_clear()
    identity = {"model": "m", "weights": "ab", "text_digest": "cd", "bos": False}
    assert is_of(identity | {"nll": 1.0}, identity)
    assert not is_of(identity | {"weights": "other"}, identity)
    assert capsys.readouterr().err == ""
    assert is_of({"model": "m", "nll": 1.0}, identity)
    assert "rows of an older version" in capsys.readouterr().err
    assert not is_of({"model": "m", "nll": 1.0}, identity | {"bos": True})
    assert not is_of({"model": "n", "nll": 1.0}, identity)
    assert is_of({"records": "r"}, {"records": "r", "quantizers": "q"})
    assert not is_of({"records": "r", "calibration_windows": 2}, {"records": "r", "quantizers": "q"})


def test_recording_does_not_go_on_with_other_weights(checkpoints, text_file, tmp_path) -> None:
    arguments = ["--text", str(text_file), "--windows", "2", "--seqlen", "33", "--output", str(tmp_path / "records")]
    record_main(["--model", str(checkpoints[0]), *arguments])
    (tmp_path / "records" / "window-00001.safetensors").unlink()
    with pytest.raises(UserError, match="belongs to another run .other weights: digest"):
        record_main(["--model", str(checkpoints[1]), *arguments])
    assert record_main(["--model", str(checkpoints[0]), *arguments])["recorded_now"] == 1


def test_quantizers_of_other_weights_are_evaluated_with_a_warning(
    checkpoints, quantizers_file, text_file, capsys
) -> None:
    arguments = ["--quantizers", str(quantizers_file), "--text", str(text_file), "--seqlen", "33", "--windows", "1"]
    for model, warned in zip(checkpoints, (False, True), strict=True):
        evaluate_main(["--model", str(model), *arguments])
        assert ("nuq3-1% was fitted to other weights" in capsys.readouterr().err) == warned
