"""Evaluation: perplexity against a plain loop, divergence against its definition, and the command's report."""

import json
import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradients.cli import UserError
from quant.evaluate import compare_logits, evaluate, main
from quant.scheme import Scheme
from quant.simulate import simulated


def nll_by_hand(model: PreTrainedModel, windows: Tensor) -> tuple[float, int]:
    """(sum of negative log likelihoods in nats, predicted tokens), one prediction at a time."""
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=window[None], use_cache=False).logits[0].double()
        for place in range(len(window) - 1):
            total -= float(logits[place, window[place + 1]] - logits[place].logsumexp(0))
            count += 1
    return total, count


def random_logits(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 31, generator=torch.Generator().manual_seed(seed)) * 3


def test_unquantized_perplexity_is_a_plain_loops(model, make_tokens) -> None:
    windows = make_tokens(3, 33)
    result = evaluate(model, windows, None)
    total, count = nll_by_hand(model, windows)
    assert result["tokens"] == count == 3 * 32
    assert result["nll"] == result["baseline_nll"] == pytest.approx(total / count, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert (result["kl"], result["top1_agreement"]) == (0, 1)
    assert (result["scheme"], result["bits_per_element"]) == ("unquantized", 32)


def test_quantized_perplexity_is_the_simulations(model, fit_model, make_tokens) -> None:
    windows, quantizers = make_tokens(2, 33), fit_model(model, Scheme.parse("nuq2-1%"))
    result = evaluate(model, windows, quantizers)
    with simulated(model, quantizers) as usage:
        total, count = nll_by_hand(model, windows)
    assert result["nll"] == pytest.approx(total / count, rel=1e-6)
    baseline, _ = nll_by_hand(model, windows)
    assert result["baseline_nll"] == pytest.approx(baseline / count, rel=1e-6)
    assert result["nll"] != pytest.approx(result["baseline_nll"], rel=1e-4)
    assert result["kl"] > 0
    assert 0 < result["top1_agreement"] < 1
    assert result["scheme"] == "nuq2-1%"
    assert result["bits_per_element"] == usage.size.bits_per_element


@pytest.mark.parametrize("rows", [1, 31, 33, 257, 600])
def test_divergence_is_its_definition(rows: int) -> None:
    logits, baseline = random_logits(rows, 0), random_logits(rows, 1)
    logits[::2] = baseline[::2] + 0.01  # a shift of all logits is no difference
    targets = torch.arange(rows) % 31
    totals = compare_logits(logits, baseline, targets)
    log_p, log_q = logits.double().log_softmax(-1), baseline.double().log_softmax(-1)
    assert totals.tokens == rows
    assert totals.nll == pytest.approx(-float(log_p[torch.arange(rows), targets].sum()), rel=1e-5)
    assert totals.baseline_nll == pytest.approx(-float(log_q[torch.arange(rows), targets].sum()), rel=1e-5)
    divergence = torch.nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
    assert totals.kl == pytest.approx(float(divergence), rel=1e-5, abs=1e-6)
    assert totals.agreements == int((logits.argmax(-1) == baseline.argmax(-1)).sum())


@pytest.mark.parametrize("side", ["logits", "baseline"])
def test_logits_that_are_nan_are_refused(side: str) -> None:
    tensors = {"logits": random_logits(300, 0), "baseline": random_logits(300, 1)}
    tensors[side][299, 30] = float("nan")
    with pytest.raises(UserError, match="logits are NaN"):
        compare_logits(**tensors, targets=torch.zeros(300, dtype=torch.long))


def test_the_command_reports_and_appends(
    llama, llama_folder, text_file, quantizers_file, tokenizer, tmp_path, capsys
) -> None:
    rows = tmp_path / "new" / "rows.jsonl"
    arguments = ["--model", str(llama_folder), "--text", f"{text_file}:50-100", "--seqlen", "33", "--windows", "4"]
    arguments += ["--device", "cpu", "--results", str(rows)]
    plain = main(arguments)
    quantized = main([*arguments, "--quantizers", str(quantizers_file)])
    text = text_file.read_text()
    tokens = torch.tensor(tokenizer(text[round(len(text) / 2) :]).input_ids)
    total, count = nll_by_hand(llama, tokens[: 4 * 33].view(4, 33))
    assert plain["nll"] == quantized["baseline_nll"] == pytest.approx(total / count, rel=1e-6)
    assert quantized["scheme"] == "nuq3-1%"
    assert 3 < quantized["bits_per_element"] < 16
    for result in (plain, quantized):
        assert {"perplexity", "nll", "tokens", "kl", "top1_agreement", "bits_per_element", "scheme"} <= set(result)
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["scheme"] for row in written] == ["unquantized", "nuq3-1%"]
    assert written[1].items() >= quantized.items()
    assert {"model", "text", "seqlen", "dtype", "device", "versions", "commit"} <= set(written[1])
    assert "nuq3-1%" in capsys.readouterr().out


def test_without_a_number_of_windows_all_are_evaluated(llama_folder, text_file) -> None:
    result = main(["--model", str(llama_folder), "--text", str(text_file), "--seqlen", "450", "--device", "cpu"])
    assert result["tokens"] == (6000 // 450) * 449


def test_float64_is_asked_of_the_cpu_only(monkeypatch) -> None:
    """Apple's GPUs have none."""
    moved: list[Tensor] = []
    double = Tensor.double

    def doubled(x: Tensor) -> Tensor:
        assert any(x is one for one in moved)
        return double(x)

    monkeypatch.setattr(Tensor, "cpu", lambda x: moved.append(x) or x)
    monkeypatch.setattr(Tensor, "double", doubled)
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert compare_logits(logits, logits, torch.arange(5)).tokens == 5
    assert len(moved) == 3
