"""`python -m scripts.checks.device`, on the CPU against itself."""

import json

import pytest
import torch
from torch import Tensor

from gradients.cli import UserError, run_command
from quant.results import read_rows
from scripts.checks import device
from scripts.checks.device import distances, greedy, main, rounded_otherwise


@pytest.fixture
def arguments(llama_folder, quantizers_file, text_file, tmp_path) -> list[str]:
    sizes = ["--seqlen", "60", "--windows", "3", "--prompts", "2", "--prompt-tokens", "20", "--new-tokens", "6"]
    rows = ["--results", str(tmp_path / "rows.jsonl"), "--text", str(text_file)]
    command = [str(llama_folder), str(quantizers_file), "--device", "cpu", "--dtypes", "float32", *sizes, *rows]
    return [*command, "--prefill-chunk", "20", "--limit", "0.01"]  # few tokens: a flipped code shows in the mean


def test_the_cpu_agrees_with_itself(arguments, tmp_path) -> None:
    (row,) = main(arguments)["rows"]
    assert row["passed"] and row["path"] == "torch" and row["tokens"] == 12
    assert row["equal_tokens"] == 12 and row["equal_texts"] == 2 and row["largest_distance"] < 1e-3
    assert 0 <= row["nll_difference"] < 0.01 and 0 < row["nll_rounded_difference"] < 0.01 and row["nll_simulated"] > 1
    assert read_rows(tmp_path / "rows.jsonl")[0]["scheme"] == row["scheme"] == "nuq3-1%"


def test_other_tokens_are_far_from_the_top(llama, quantizers, make_tokens) -> None:
    prompt = make_tokens(1, 20)[0]
    tokens, path = greedy(llama, quantizers, prompt, 6)
    assert path == "torch" and tokens.shape == (6,)
    below, own = distances(llama, quantizers, prompt, tokens)
    assert torch.equal(below, torch.zeros(6)) and own.shape == (6,)
    wrong: Tensor = (tokens + 1) % 259
    assert distances(llama, quantizers, prompt, wrong)[0].max() > 1


def test_what_is_outside_the_limits_fails(arguments, capsys, monkeypatch) -> None:
    monkeypatch.setattr(device, "evaluate_packed", lambda *_, **__: {"nll": 3.0})
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _argv: main(arguments))
    assert ended.value.code == 1
    assert not json.loads(capsys.readouterr().out.splitlines()[-1])["passed"]
    with pytest.raises(UserError, match="--prompt-tokens 99 exceeds --seqlen 60"):
        main([*arguments, "--prompt-tokens", "99"])


def test_embeddings_are_off_by_their_precision_and_then_as_before(llama, make_tokens) -> None:
    embed, tokens = llama.get_input_embeddings(), make_tokens(1, 50)
    exact = embed(tokens)
    with rounded_otherwise(llama):
        off = embed(tokens) / exact - 1
    assert 1e-8 < float(off.abs().mean()) < 5e-7
    assert torch.equal(embed(tokens), exact)
