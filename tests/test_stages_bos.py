"""--bos and --no-bos: what windows and prompts begin with, in every command, and that a mismatch is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deployment.evaluate import main as deploy_main
from gradients.__main__ import main as record_main
from gradients.cli import UserError
from gradients.records import Records
from gradients.text import adds_bos, bos_token, load_corpus
from quant.artefact import load_quantizers
from quant.evaluate import main as evaluate_main
from quant.fit import main as fit_main
from quant.prompts import Prompter
from quant.results import read_rows
from scripts.retrieval.passkey import main as passkey_main

BOS = 0


@pytest.fixture
def adding(llama_folder) -> PreTrainedTokenizerFast:
    """The byte tokenizer, which begins a text with <bos>."""
    tokenizer: Any = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


@pytest.fixture
def folder(llama, adding, tmp_path) -> Path:
    """The tiny Llama with that tokenizer."""
    llama.save_pretrained(tmp_path / "llama")
    adding.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_default_is_what_the_tokenizer_does(tokenizer, adding) -> None:
    assert (adds_bos(tokenizer), adds_bos(adding)) == (False, True)
    assert [bos_token(tokenizer, wanted) for wanted in (None, False, True)] == [None, None, BOS]
    assert [bos_token(adding, wanted) for wanted in (None, False, True)] == [BOS, None, BOS]
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    assert bos_token(without, None) is None
    with pytest.raises(UserError, match="has no such token; use --no-bos"):
        bos_token(without, True)


def test_every_window_begins_with_it_and_holds_one_token_less_of_text(adding, tokenizer, text_file) -> None:
    plain = load_corpus(str(text_file), "evaluation", tokenizer)
    corpus = load_corpus(str(text_file), "evaluation", adding, None)
    assert torch.equal(corpus.tokens, plain.tokens) and corpus.bos == BOS
    windows = corpus.evaluation_windows(64)
    assert windows.shape == (6000 // 63, 64) and windows[:, 0].tolist() == [BOS] * len(windows)
    assert torch.equal(windows[:, 1:].flatten(), plain.tokens[: len(windows) * 63])
    drawn = corpus.calibration_windows(64, 5, 0)
    assert drawn.shape == (5, 64) and drawn[:, 0].tolist() == [BOS] * 5 and (drawn[:, 1:] != BOS).all()
    # without, one piece with what the tokenizer adds at its beginning
    whole = load_corpus(str(text_file), "evaluation", adding, False).evaluation_windows(64)
    assert whole[:, 0].tolist().count(BOS) == 1 and whole[0, 0] == BOS


def test_prompts_begin_with_it_if_asked(adding, tokenizer) -> None:
    for own, by_itself in ((adding, True), (tokenizer, False)):
        text = own("abc", add_special_tokens=False).input_ids
        for bos, begins in ((None, by_itself), (True, True), (False, False)):
            prompter = Prompter(own, bos=bos)
            assert prompter.tokens("abc") == [BOS] * begins + text and prompter.begins_with_bos == begins


def test_is_recorded_and_a_mismatch_is_said(folder, text_file, tmp_path, capsys) -> None:
    model = ["--model", str(folder), "--text", str(text_file), "--seqlen", "33", "--windows", "2"]
    record_main([*model, "--output", str(tmp_path / "records")])
    assert Records.open(tmp_path / "records").manifest.bos
    with pytest.raises(UserError, match="bos True there, False asked for|token_digest"):
        record_main([*model, "--no-bos", "--output", str(tmp_path / "records")])
    fitted, results = tmp_path / "q.safetensors", tmp_path / "rows.jsonl"
    fit_main(["--records", str(tmp_path / "records"), "--scheme", "int4", "--output", str(fitted)])
    assert load_quantizers(fitted).bos is True
    common = [*model, "--quantizers", str(fitted), "--results", str(results)]
    for main in (evaluate_main, deploy_main):
        capsys.readouterr()
        main(common)
        assert "<bos>" not in capsys.readouterr().err
        main([*common, "--no-bos"])
        assert "calibrated on windows with <bos>, and is evaluated without it; give --bos" in capsys.readouterr().err
    assert [row["bos"] for row in read_rows(results)] == [True, False, True, False]
    assert len({row["nll"] for row in read_rows(results)}) > 1


@pytest.mark.parametrize("option", [[], ["--bos"], ["--no-bos"]])
def test_retrieval_rows_say_whether_they_began_with_it(option: list[str], folder, tmp_path) -> None:
    arguments = ["--model", str(folder), "--lengths", "330", "--samples", "1", "--results", str(tmp_path / "rows")]
    assert passkey_main([*arguments, *option])["rows_added"] == 1
    assert read_rows(tmp_path / "rows")[0]["bos"] == (option != ["--no-bos"])


def test_reproducing_the_papers_tables_is_without(folder, records, text_file, tmp_path, make_model) -> None:
    from scripts.reproduce_tables import main

    arguments = ["--model", str(folder), "--records", str(records.folder), "--text", str(text_file), "--seqlen", "33"]
    main([*arguments, "--windows", "1", "--tables", "ranges", "--results", str(tmp_path / "rows.jsonl")])
    assert {row["bos"] for row in read_rows(tmp_path / "rows.jsonl")} == {False}
