"""`python -m deployment.evaluate` and `python -m deployment.generate`, through their `main`."""

import json
from pathlib import Path

import pytest
import torch

from deployment.cache import PackedCache
from deployment.evaluate import evaluate_packed, packed_nll
from deployment.evaluate import main as evaluate_main
from deployment.generate import main as generate_main
from gradients.cli import UserError
from quant.evaluate import evaluate
from quant.evaluate import main as simulate_main
from quant.scheme import Scheme


@pytest.fixture(scope="module")
def arguments(llama_folder, quantizers_file) -> list[str]:
    """What both commands need first."""
    return ["--model", str(llama_folder), "--quantizers", str(quantizers_file), "--device", "cpu"]


def window_arguments(text_file: Path) -> list[str]:
    return ["--text", str(text_file), "--seqlen", "150", "--windows", "3"]


@pytest.mark.parametrize("options", [["--prefill-chunk", "1"], ["--prefill-chunk", "64", "--batch", "2"]])
def test_packed_and_simulated_evaluation_agree(arguments, text_file, options: list[str]) -> None:
    simulated = simulate_main([*arguments, *window_arguments(text_file)])
    packed = evaluate_main([*arguments, *window_arguments(text_file), "--no-exact-chunk", *options])
    assert simulated is not None
    assert packed["nll"] == pytest.approx(simulated["nll"], rel=1e-3)
    assert packed["tokens"] == simulated["tokens"] == 3 * 149
    # a few elements may land on the other side of an outlier threshold, nothing else can differ
    assert packed["bits_per_element"] == pytest.approx(simulated["bits_per_element"], rel=1e-4)


# all that can be packed, and what a scheme may add to it
SCHEMES = ["nuq3-1%", "nuq2", "int4-5%", "nf4-1%", "rdnuq2.4", "nuq3+fb", "nuq2-1%+fb", "int4+fb", "rdnuq2.4+fb"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_in_float64_packed_and_simulated_evaluation_are_the_same(
    make_model, fit_model, make_tokens, name: str, scheme: str
) -> None:
    """What separates them in float32 are sums in another order, and the codes that these flip."""
    model, windows = make_model(name), make_tokens(2, 150)
    quantizers = fit_model(model, Scheme.parse(scheme))
    model.double()
    simulated = evaluate(model, windows, quantizers)
    packed = evaluate_packed(model, windows, quantizers, chunk=17, exact_chunk=False)
    assert abs(packed["nll"] - simulated["nll"]) < 1e-9
    assert packed["bits_per_element"] == simulated["bits_per_element"]
    assert abs(simulated["nll"] - simulated["baseline_nll"]) > 1e-6  # it is quantized


def test_bits_of_quantized_layers_and_of_the_whole_cache_are_told_apart(
    make_model, fit_model, save_model, text_file, tmp_path
) -> None:
    """Half of this model's layers have sliding windows, which stay in float32."""
    model = make_model("gemma3")
    fit_model(model, Scheme.parse("nuq3-5%")).save(tmp_path / "q.safetensors")
    given = ["--model", str(save_model(model, tmp_path / "model")), "--quantizers", str(tmp_path / "q.safetensors")]
    given += ["--device", "cpu"]
    text = ["--text", str(text_file), "--seqlen", "150", "--windows", "1"]
    simulated = simulate_main([*given, *text])
    packed = evaluate_main([*given, *text, "--no-exact-chunk"])
    answered = generate_main([*given, "--prompt", "the key and the value of a token", "--max-new-tokens", "5"])
    assert simulated is not None and packed is not None
    assert packed["bits_per_element"] == pytest.approx(simulated["bits_per_element"], rel=1e-3)
    for result in (packed, answered):
        assert result["cache_bits_per_element"] > result["bits_per_element"]
        expected = 16 * result["cache_bytes"] / result["fp16_bytes"]
        assert result["cache_bits_per_element"] == pytest.approx(expected, abs=1e-3)


def test_exact_chunks_lose_less(arguments, text_file, capsys) -> None:
    exact = evaluate_main([*arguments, *window_arguments(text_file)])
    assert "this is the unquantized model's loss; give --no-exact-chunk" in capsys.readouterr().err
    plain = simulate_main([*arguments[:2], *arguments[4:], *window_arguments(text_file)])
    assert plain is not None
    assert exact["exact_chunk"] and exact["nll"] == pytest.approx(
        plain["nll"], rel=1e-5
    )  # one chunk: nothing is packed


def test_batch_of_windows_changes_nothing(llama, quantizers, make_tokens) -> None:
    windows = make_tokens(3, 70)
    one = evaluate_packed(llama, windows, quantizers, chunk=16, exact_chunk=True)
    three = evaluate_packed(llama, windows, quantizers, chunk=16, exact_chunk=True, batch=3)
    assert one["nll"] == pytest.approx(three["nll"], rel=1e-4)
    assert one["cache_bytes"] == pytest.approx(three["cache_bytes"], rel=1e-3)


def test_reported_bytes_are_the_tensors_bytes(llama, quantizers, make_tokens) -> None:
    windows = make_tokens(1, 400)
    result = evaluate_packed(llama, windows, quantizers, chunk=400, exact_chunk=False)
    cache = PackedCache(quantizers, llama.config, capacity=400, exact_chunk=False)
    packed_nll(llama, windows, cache, chunk=400)
    assert result["cache_bytes"] == sum(tensor.nbytes for tensor in cache.tensors())
    simulated = evaluate(llama, windows, quantizers)
    elements = 400 * 2 * 2 * 24  # layers, keys and values, C
    assert result["cache_bytes"] * 8 / elements == pytest.approx(simulated["bits_per_element"], rel=1e-4)
    assert result["fp16_bytes"] == elements * 2


def test_generate_streams_text_and_ends_with_json(arguments, capsys) -> None:
    result = generate_main([*arguments, "--prompt", "of the key of", "--max-new-tokens", "9"])
    printed = capsys.readouterr().out
    assert result["text"].strip()[:4] in printed and "cache_bytes" in printed
    assert json.loads(json.dumps(result)) == result
    assert result["tokens"] == result["prompt_tokens"] + result["new_tokens"] - 1
    assert result["ratio"] == round(result["fp16_bytes"] / result["cache_bytes"], 3)


@pytest.mark.parametrize("options", [["--beams", "2"], ["--sample", "--temperature", "0.7", "--top-p", "0.9"]])
def test_other_ways_to_generate_repeat_themselves(arguments, options: list[str]) -> None:
    first = generate_main([*arguments, "--prompt", "value", "--max-new-tokens", "5", *options])
    again = generate_main([*arguments, "--prompt", "value", "--max-new-tokens", "5", *options])
    assert first["text"] == again["text"] and first["new_tokens"] <= 5


def test_prompt_file_in_small_chunks_equals_one_chunk(arguments, tmp_path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the head of the token " * 8)
    chunked = generate_main(
        [*arguments, "--prompt-file", str(prompt), "--max-new-tokens", "3", "--prefill-chunk", "11"]
    )
    assert chunked["prompt_tokens"] == 22 * 8 and chunked["new_tokens"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "  "], "prompt '  ' is empty"),
        (["--prompt-file", "no-such-file"], "no-such-file"),
        (["--prompt", "key", "--max-new-tokens", "600"], "model's positions are 512"),
        (["--prompt", "key value", "--max-new-tokens", "20", "--capacity", "21"], "--capacity are 21"),
        (["--prompt", "key", "--sample", "--temperature", "0"], "--temperature: 0 is not a positive number"),
        (["--prompt", "key", "--sample", "--temperature", "nan"], "--temperature: nan is not a positive number"),
        (["--prompt", "key", "--sample", "--top-p", "7"], "--top-p: 7 is not a share above 0"),
        (["--prompt", "key", "--seed", str(2**63)], f"--seed: {2**63} is too large"),
    ],
    ids=["empty", "missing file", "positions", "capacity", "temperature", "no temperature", "top-p", "seed"],
)
def test_bad_requests_are_refused_by_name(arguments, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate_main([*arguments, *options])


def test_nan_weights_are_named(make_model, quantizers, make_tokens) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(UserError, match="logits are NaN"):
        evaluate_packed(model, make_tokens(1, 20), quantizers, chunk=20, exact_chunk=True)
