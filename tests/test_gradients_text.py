"""Corpora and windows: where windows start, parts of files, named corpora, refusals."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradients.cli import UserError
from gradients.text import Corpus, load_corpus, load_text


def corpus_of(length: int) -> Corpus:
    return Corpus("numbers", torch.arange(length))


@given(st.integers(2, 40), st.integers(1, 9), st.integers(0, 5), st.integers(1, 60))
def test_calibration_windows_start_where_the_originals_do(seqlen: int, count: int, seed: int, spare: int) -> None:
    tokens = seqlen + spare
    windows = corpus_of(tokens).calibration_windows(seqlen, count, seed)
    random.seed(seed)
    starts = [random.randint(0, tokens - seqlen - 1) for _ in range(count)]
    assert windows.tolist() == [list(range(start, start + seqlen)) for start in starts]


def test_more_windows_begin_with_the_same() -> None:
    corpus = corpus_of(1000)
    assert torch.equal(corpus.calibration_windows(33, 9, 0)[:4], corpus.calibration_windows(33, 4, 0))
    assert not torch.equal(corpus.calibration_windows(33, 4, 1), corpus.calibration_windows(33, 4, 0))


def test_evaluation_windows_are_consecutive() -> None:
    assert corpus_of(100).evaluation_windows(33).tolist() == torch.arange(99).view(3, 33).tolist()
    assert corpus_of(100).evaluation_windows(33, 2).tolist() == torch.arange(66).view(2, 33).tolist()
    assert corpus_of(33).evaluation_windows(33).shape == (1, 33)


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"'numbers' has 33 tokens, fewer than one window needs \(34\); lower --seqlen"):
        corpus_of(33).calibration_windows(33, 1, 0)
    assert corpus_of(34).calibration_windows(33, 1, 0).tolist() == [list(range(33))]
    with pytest.raises(UserError, match=r"'numbers' has 32 tokens, fewer than one window needs \(33\)"):
        corpus_of(32).evaluation_windows(33)
    with pytest.raises(UserError, match="holds 3 windows of 33 tokens, 4 were asked for; lower --windows to 3"):
        corpus_of(131).evaluation_windows(33, 4)


def test_a_corpus_is_tokenized_as_one_string(text_file, tokenizer) -> None:
    corpus = load_corpus(str(text_file), "calibration", tokenizer)
    assert corpus.tokens.dtype == torch.int64
    assert corpus.tokens.tolist() == tokenizer(text_file.read_text(encoding="utf-8")).input_ids
    assert corpus.name == str(text_file)


def test_the_digest_is_of_the_tokens() -> None:
    tokens = torch.arange(50)
    assert Corpus("one", tokens).digest == Corpus("other", tokens.clone()).digest
    changed = tokens.clone()
    changed[49] = 0
    assert Corpus("one", tokens).digest != Corpus("one", changed).digest


def test_parts_of_a_file_tile_it(tmp_path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("0123456789é", encoding="utf-8")
    whole = load_text(str(path), "calibration")
    assert whole == "0123456789é"
    assert load_text(f"{path}:0-50", "calibration") + load_text(f"{path}:50-100", "evaluation") == whole
    assert load_text(f"{path}:0-9.1", "calibration") == "0"
    assert load_text(f"{path}:0-100", "calibration") == whole


def test_a_file_whose_name_looks_like_a_part_is_a_file(tmp_path) -> None:
    path = tmp_path / "notes:0-50"
    path.write_text("whole")
    assert load_text(str(path), "calibration") == "whole"


def test_pydoc_needs_no_network_and_its_splits_are_disjoint() -> None:
    calibration, evaluation = load_text("pydoc", "calibration"), load_text("pydoc", "evaluation")
    assert len(calibration) > 2 * len(evaluation) > 50_000
    assert evaluation[:500] not in calibration
    assert calibration == load_text("pydoc", "calibration")


@pytest.mark.parametrize("part", ["50-20", "0-101", "50-50"])
def test_a_part_outside_the_file_is_refused(part: str, text_file) -> None:
    with pytest.raises(UserError, match=f"text part {part} .* is not within 0-100"):
        load_text(f"{text_file}:{part}", "calibration")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path) -> None:
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_text("the key and the value", encoding="utf-8")
    marked.write_text("the key and the value", encoding="utf-8-sig")
    assert marked.read_bytes()[:3] == b"\xef\xbb\xbf"
    assert load_text(str(marked), "evaluation") == load_text(str(plain), "evaluation") == "the key and the value"
