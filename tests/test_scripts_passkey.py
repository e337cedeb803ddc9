"""Passkey retrieval: prompts of exact length, one key at its depth, rows of the command, resumed runs."""

from typing import Any

import pytest
import torch

from gradients.cli import UserError
from quant.passkey import DESCRIPTION, INFORMATION, LEAD, QUESTION, PasskeyTask, passkey_tasks
from quant.prompts import Prompter
from quant.results import read_rows
from scripts.retrieval.passkey import main as passkey_main


@pytest.mark.parametrize("tokens", [300, 301, 377, 1000])
@pytest.mark.parametrize("depth", [0.0, 0.31, 1.0])
def test_prompt_has_exactly_the_length_and_one_key(tokens: int, depth: float, tokenizer) -> None:
    task = PasskeyTask(tokens=tokens, depth=depth, seed=3)
    sample = task.sample(Prompter(tokenizer))
    assert sample.prompt.shape == (tokens,) and sample.prompt.dtype == torch.int64
    text = tokenizer.decode(sample.prompt)
    assert text.startswith(DESCRIPTION) and text.endswith("\n" + QUESTION + LEAD)
    assert text.count(INFORMATION.format(key=task.key)) == 1
    assert text.count(str(task.key)) == 2  # the line says it twice
    assert tokenizer.decode(sample.answer) == f" {task.key}"


def test_depth_moves_the_key_and_seed_changes_it(tokenizer) -> None:
    tasks = passkey_tasks(500, 4)
    lines = [tokenizer.decode(task.sample(Prompter(tokenizer)).prompt).split("\n") for task in tasks]
    garbage = [(len(before), len(after)) for _, before, _, after, _ in lines]
    total = sum(garbage[0])
    assert [before / total for before, _ in garbage] == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8], abs=1 / total)
    assert all(before + after == total for before, after in garbage)
    assert len({task.key for task in tasks}) == 4
    assert all(len(str(PasskeyTask(tokens=500, depth=0, seed=seed).key)) == 5 for seed in range(50))


def test_a_tokenizer_of_words_is_fitted_too() -> None:
    """Characters add no token at all or, where a word falls apart, several; specials come in front."""

    class Words:
        def __call__(self, text: str, **_: Any) -> Any:
            pieces = text.replace(".", " .").split(" ")
            tokens = [0]
            for piece in pieces:
                known = piece in ("The", "grass", "is", "green", ".", "sky", "blue", "sun", "yellow")
                tokens += [1] if known else [2] * len(piece)
            return type("Encoding", (), {"input_ids": tokens})

    for tokens in range(400, 420):
        assert len(PasskeyTask(tokens=tokens, depth=0.4, seed=0).sample(Prompter(Words())).prompt) == tokens  # type: ignore[arg-type]


@pytest.fixture
def arguments(llama_folder, records, tmp_path) -> list[str]:
    """The command on the tiny Llama at one length."""
    names = ["--model", str(llama_folder), "--device", "cpu", "--records", str(records.folder)]
    return [*names, "--samples", "2", "--lengths", "280", "--results", str(tmp_path / "rows.jsonl")]


def test_every_scheme_gets_one_row(arguments, tmp_path, quantizers_file, capsys) -> None:
    summary = passkey_main([*arguments, "--schemes", "int4", "kivi2", "--quantizers", str(quantizers_file)])
    rows = read_rows(tmp_path / "rows.jsonl")
    assert summary["rows_added"] == len(rows) == 4
    assert [row["scheme"] for row in rows] == ["unquantized", "int4", "kivi2", "nuq3-1%"]
    assert rows[0]["bits_per_element"] == 32 and 4 < rows[1]["bits_per_element"] < 6
    assert all(row["model"] == "tiny-llama" and row["context"] == 280 for row in rows)
    assert [row["mode"] for row in rows] == ["unquantized", *["simulated"] * 3]
    assert all(row["retrieved"] == 0 and row["answer_nll"] > 0 and row["missed_depths"] == [0.25, 0.75] for row in rows)
    printed = capsys.readouterr().out
    assert "280" in printed and f"({rows[3]['answer_nll']:.2f})" in printed


def test_only_missing_rows_are_measured(arguments, tmp_path, capsys) -> None:
    assert passkey_main([*arguments, "--schemes", "int4"])["rows_added"] == 2
    # one length more: every row it lacks, no other
    assert passkey_main([*arguments, "--schemes", "int4", "--lengths", "280", "300"])["rows_added"] == 2
    assert [(row["scheme"], row["context"]) for row in read_rows(tmp_path / "rows.jsonl")] == [
        (scheme, length) for length in (280, 300) for scheme in ("unquantized", "int4")
    ]
    for other in (["--seed", "1"], ["--samples", "1"]):
        assert passkey_main([*arguments, *other])["rows_added"] == 1
    # the model as it is has but one way to run
    for other in (["--packed"], ["--packed", "--no-exact-chunk"]):
        assert passkey_main([*arguments, *other])["rows_added"] == 0
        assert passkey_main([*arguments, *other, "--schemes", "int4"])["rows_added"] == 1
    # what was there before is shown with the rest
    capsys.readouterr()
    passkey_main([*arguments, "--schemes", "int4", "nuq3", "--lengths", "280"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("unquantized", "int4", "nuq3"))


def test_what_has_no_packed_cache_is_refused(arguments, tmp_path) -> None:
    with pytest.raises(UserError, match="'kivi2' has no packed cache"):
        passkey_main([*arguments, "--schemes", "kivi2", "--packed"])
    assert not (tmp_path / "rows.jsonl").exists()
