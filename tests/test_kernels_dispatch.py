"""Models that run through the kernels say what they say through torch."""

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import all_pairs
from test_kernels_attention import make_quantizer
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.evaluate import evaluate_packed
from deployment.step import dispatch
from deployment.step.dispatch import VARIABLE, runs_kernels
from gradients.cli import UserError
from quant.scheme import Scheme

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def logits_in_chunks(
    model: PreTrainedModel,
    cache: PackedCache,
    tokens: Tensor,
    chunks: list[int],
    backend: str,
    mask: Tensor | None = None,
) -> Tensor:
    parts, end = [], 0
    with packed_attention(model, backend), torch.inference_mode():
        for part in tokens.split(chunks, dim=1):
            end += part.shape[1]
            seen = None if mask is None else mask[:, :end]
            parts.append(model(input_ids=part, attention_mask=seen, past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def wide_llama() -> PreTrainedModel:
    """Heads of 64 channels, which the fragments need."""
    from conftest import build_model

    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "initializer_range": 0.2}
    return build_model(LlamaConfig(**sizes, **heads, max_position_embeddings=512)).to(DEVICE)


@pytest.mark.parametrize(
    ("exact_chunk", "scheme"),
    all_pairs([True, False], ["nuq3-5%", "rdnuq2.4"], lambda exact, scheme: exact == (scheme == "nuq3-5%")),
)
def test_logits_equal_the_torch_path(wide_llama, make_tokens, fit_model, scheme: str, exact_chunk: bool) -> None:
    quantizers = fit_model(wide_llama.cpu(), Scheme.parse("nuq3-5%"))
    if scheme == "rdnuq2.4":  # as an allocation might look like
        mixed = {kind: make_quantizer(64, "mixed", 1, 0.0).to("cpu") for kind in ("key", "value")}
        quantizers = replace(quantizers, scheme=mixed["key"].scheme, layers={0: mixed, 1: mixed})
    wide_llama.to(DEVICE)
    tokens, chunks = make_tokens(1, 14).to(DEVICE), [10, 1, 3]
    logits, held = {}, {}
    for backend in ("torch", "triton"):
        cache = PackedCache(quantizers, wide_llama.config, exact_chunk=exact_chunk)
        logits[backend] = logits_in_chunks(wide_llama, cache, tokens, chunks, backend)
        held[backend] = cache
    error = (logits["torch"] - logits["triton"]).abs().amax(-1)
    assert error.median() < 2e-4 and (error < 2e-2).float().mean() > 0.9
    for first, second in zip(held["torch"].layers, held["triton"].layers, strict=True):
        assert first.lengths == second.lengths == second.stored.tolist()
        pages = [layer.packed["key"].pages[0] for layer in (first, second)]
        same = (pages[0].words == pages[1].words).float().mean()
        assert same > 0.98  # a rounding error before a boundary may flip a code


def test_perplexity_equals_the_torch_path(wide_llama, make_tokens, fit_model, monkeypatch) -> None:
    """What `deployment.evaluate` reports, with chunks of many queries."""
    quantizers = fit_model(wide_llama.cpu(), Scheme.parse("nuq3-5%"))
    wide_llama.to(DEVICE)
    windows = make_tokens(1, 34).to(DEVICE)
    nll = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv(VARIABLE, backend)
        nll.append(evaluate_packed(wide_llama, windows, quantizers, chunk=17, exact_chunk=True)["nll"])
    assert nll[1] == pytest.approx(nll[0], rel=1e-4)


def test_left_padding_cropping_and_growing(wide_llama, make_tokens, fit_model) -> None:
    quantizers = fit_model(wide_llama.cpu(), Scheme.parse("int8-5%"))
    wide_llama.to(DEVICE)
    tokens = make_tokens(2, 12).to(DEVICE)
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    logits = {}
    for backend in ("torch", "triton"):
        cache = PackedCache(quantizers, wide_llama.config)
        logits_in_chunks(wide_llama, cache, tokens, [3, 9], backend, mask)
        cache.crop(-3)
        longer = torch.nn.functional.pad(mask[:, :-3], (0, 2), value=1)
        with packed_attention(wide_llama, backend), torch.inference_mode():
            logits[backend] = wide_llama(input_ids=tokens[:, :2], attention_mask=longer, past_key_values=cache).logits
        assert cache.layers[0].lengths == cache.layers[0].stored.tolist() == [6, 11]
    error = logits["torch"] - logits["triton"]
    # a code may flip, as above, and moves all logits of its sequence a little; a wrong token would move them by their own size
    assert error.square().mean().sqrt() < 5e-3 * logits["torch"].square().mean().sqrt()
    if DEVICE.type == "cpu":  # where none does
        assert error.abs().max() < 1e-3


def test_variable_argument_and_fallback(llama, exact_layer, monkeypatch) -> None:
    layer, cpu = exact_layer.layers[0], torch.device("cpu")
    assert not runs_kernels(None, layer, cpu)
    monkeypatch.setenv(VARIABLE, "triton")
    if DEVICE.type == "cpu":
        assert runs_kernels(None, layer, cpu) and not runs_kernels("torch", layer, cpu)
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(UserError, match="'cuda' is unknown"):
        runs_kernels(None, layer, cpu)


def caught_warnings(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in caught if "falls back" in str(warning.message)]


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_gpus_before_ampere_take_the_torch_path_with_one_warning(
    exact_layer, monkeypatch, capability: tuple[int, int], runs: bool
) -> None:
    gpu = torch.device("cuda", capability[0])  # no such one is asked anything but this
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "_no_triton", lambda _: "")
    dispatch._too_old.cache_clear()
    dispatch._warn_once.cache_clear()
    said = caught_warnings(lambda: [runs_kernels(None, exact_layer.layers[0], gpu) for _ in range(3)])
    assert runs_kernels(None, exact_layer.layers[0], gpu) == runs
    assert len(said) == (0 if runs else 1)
    assert runs or ("compute capability 7.5 is below 8.0" in said[0] and "much slower on a GPU" in said[0])
    dispatch._too_old.cache_clear()


def test_heads_too_wide_for_the_kernels_are_said(monkeypatch, exact_layer) -> None:
    monkeypatch.setattr(dispatch, "_no_triton", lambda _: "")
    monkeypatch.setattr(exact_layer.layers[0].packed["key"], "head_dim", 320)
    dispatch._warn_once.cache_clear()
    (said,) = caught_warnings(lambda: runs_kernels("triton", exact_layer.layers[0], torch.device("cpu")))
    assert "heads of 320 channels (the kernels take even numbers up to 256)" in said and "much slower" in said


@pytest.fixture
def exact_layer(llama, make_tokens, fit_model) -> PackedCache:
    cache = PackedCache(fit_model(llama, Scheme.parse("int4")), llama.config)
    logits_in_chunks(llama, cache, make_tokens(1, 4), [4], "torch")
    return cache


def test_what_kernels_cannot_do_falls_back_with_one_warning(llama, make_tokens, fit_model) -> None:
    if DEVICE.type != "cpu":
        pytest.skip("the tiny model stays on the CPU, where Triton runs interpreted")
    quantizers = fit_model(llama, Scheme.parse("int4-5%", outlier_cap=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = PackedCache(quantizers, llama.config)
        logits_in_chunks(llama, cache, make_tokens(1, 6), [4, 1, 1], "triton")
    mine = [str(warning.message) for warning in caught if "falls back" in str(warning.message)]
    assert len(mine) == 1 and "outlier_cap=2" in mine[0]
