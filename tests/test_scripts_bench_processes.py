"""`scripts/bench/processes.py`: how commands are launched, and what is compared of one process and of several."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from deployment.measure.filled import synthetic_artefact
from gradients.cli import UserError
from quant.scheme import Scheme
from scripts.bench import processes
from scripts.bench.processes import command_line, compare_figures, compare_files


def test_several_processes_are_started_by_a_launcher() -> None:
    alone = command_line("gradients", ["--seqlen", "9"], 1, "cuda")
    assert alone[1:] == ["-m", "gradients", "--seqlen", "9", "--device", "cuda:0"]
    launched = command_line("gradients", ["--seqlen", "9"], 2, "cuda")
    assert launched[2] == "accelerate.commands.launch" and launched[-4:] == ["-m", "gradients", "--seqlen", "9"]
    assert launched[launched.index("--num_processes") + 1] == "2"
    on_cpu = command_line("gradients", ["--seqlen", "9"], 3, "cpu")
    assert on_cpu[2:5] == ["torch.distributed.run", "--nproc_per_node", "3"] and on_cpu[-2:] == ["--device", "cpu"]


def test_files_are_compared_byte_by_byte_and_by_norm(tmp_path) -> None:
    for folder, scale in (("one", 1.0), ("same", 1.0), ("near", 1.25)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manifest.json").write_text("{}")
        save_file({"a": torch.ones(8), "b": torch.full((2,), scale)}, tmp_path / folder / "window.safetensors")
    assert compare_files(tmp_path / "one", tmp_path / "same") == (True, 0.0)
    assert compare_files(tmp_path / "one", tmp_path / "near") == (False, 0.25)
    file = "window.safetensors"
    assert compare_files(tmp_path / "one" / file, tmp_path / "near" / file) == (False, 0.25)
    (tmp_path / "near" / "manifest.json").write_text("[]")
    with pytest.raises(RuntimeError, match=r"manifest.json of .* differ"):
        compare_files(tmp_path / "one", tmp_path / "near")
    (tmp_path / "near" / "more").touch()
    with pytest.raises(RuntimeError, match="different files"):
        compare_files(tmp_path / "one", tmp_path / "near")


def test_figures_are_compared_without_speeds() -> None:
    figures = {"nll": 4.0, "tokens": 3, "scheme": "nuq2", "tokens_per_second": 9.0, "seconds": 1.0}
    assert compare_figures(figures, figures | {"tokens_per_second": 5.0, "seconds": 2.0}) == (True, 0.0)
    assert compare_figures(figures, figures | {"nll": 5.0}) == (False, 0.25)
    assert compare_figures(figures, figures | {"tokens": 4}) == (False, 0.0)


def test_a_commands_own_words_are_passed_on() -> None:
    with pytest.raises(UserError, match="^that was bad$"):
        processes.run([sys.executable, "-c", "import sys; print('error: that was bad', file=sys.stderr); sys.exit(2)"])
    with pytest.raises(RuntimeError, match="ended with 3"):
        processes.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_given_quantizers_are_evaluated_and_nothing_is_fitted(monkeypatch, tmp_path) -> None:
    asked: list[list[str]] = []

    def run(command):
        asked.append(command)
        return {"nll": 4.0, "tokens_per_second": 9.0 * len(asked), "seconds": float(len(asked))}

    monkeypatch.setattr(processes, "run", run)
    file = str(tmp_path / "nuq2+fb.safetensors")
    synthetic_artefact(Scheme.parse("nuq2+fb"), LlamaConfig(num_hidden_layers=1)).save(file)
    rows = processes.main(["--model", "tiny", "--quantizers", file, "--device", "cpu"])["rows"]
    assert [row["command"] for row in rows] == ["quant.evaluate", "deployment.evaluate"]
    assert all(row["identical"] for row in rows) and len(asked) == 4
    assert all(command[command.index("--quantizers") + 1] == file for command in asked)
    assert {row["scheme"] for row in rows} == {"nuq2+fb"}
