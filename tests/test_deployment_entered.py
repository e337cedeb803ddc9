"""`packed_attention` entered twice, from several threads, and on models of several parts."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import CONFIGS, build_model, dynamic_llama
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
    TextIteratorStreamer,
)

from deployment.attention import NAME, packed_attention
from deployment.cache import PackedCache
from gradients.cli import UserError
from quant.artefact import Quantizers
from quant.scheme import Scheme
from quant.simulate import simulated

EXACT = 0.02  # fp16 of the sink tokens, on logits of size 10


def state(model: PreTrainedModel) -> tuple[Any, ...]:
    """Everything that entering changes."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    own = [name for module in model.modules() for name in vars(module) if "kvquant" in name]
    return [part.config._attn_implementation for part in parts], hooks, own, sorted(vars(model))


def generated(model: PreTrainedModel, quantizers: Quantizers, ids: Tensor, new: int = 12, **options: Any) -> Tensor:
    cache = PackedCache(quantizers, model.config)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "max_new_tokens": new} | options
    return model.generate(ids, past_key_values=cache, **options)


@pytest.mark.parametrize("order", ["first in, first out", "first in, last out"])
def test_blocks_may_overlap(llama, quantizers, make_tokens, order: str) -> None:
    ids, before = make_tokens(1, 30), state(llama)
    stock = llama(ids, use_cache=False).logits
    first, second = ExitStack(), ExitStack()
    first.enter_context(packed_attention(llama))
    alone = generated(llama, quantizers, ids)
    second.enter_context(packed_attention(llama))
    leaving = [first, second] if order == "first in, first out" else [second, first]
    assert torch.equal(generated(llama, quantizers, ids), alone)
    leaving[0].close()
    assert torch.equal(generated(llama, quantizers, ids), alone)
    assert torch.equal(llama(ids, use_cache=False).logits, stock)
    leaving[1].close()
    assert state(llama) == before
    assert torch.equal(llama(ids, use_cache=False).logits, stock)


def test_another_backend_is_refused_before_anything_is_changed(llama) -> None:
    with packed_attention(llama, "torch"):
        inside = state(llama)
        with (
            pytest.raises(UserError, match="backend torch already, triton is asked for"),
            packed_attention(llama, "triton"),
        ):
            pass
        assert state(llama) == inside


def test_simulation_after_rope_and_packed_attention_exclude_each_other(llama, fit_model) -> None:
    """Within the other, one would see keys without their rotary embedding."""
    post, before = fit_model(llama, Scheme.parse("kivi2")), state(llama)
    with packed_attention(llama), pytest.raises(UserError, match="already"), simulated(llama, post):
        pass
    with simulated(llama, post), pytest.raises(UserError, match="already"), packed_attention(llama):
        pass
    assert state(llama) == before


def test_threads_share_a_model(make_model, fit_model, make_tokens) -> None:
    model = make_model("llama")
    quantizers, before = fit_model(model, Scheme.parse("nuq4-1%")), state(model)
    texts = [make_tokens(1, 40, seed=seed) for seed in range(3)]

    def run(number: int) -> Tensor:
        with packed_attention(model):
            return generated(model, quantizers, texts[number % len(texts)])

    expected = [run(number) for number in range(len(texts))]
    with ThreadPoolExecutor(3) as pool:
        for number, answer in enumerate(pool.map(run, range(12))):
            assert torch.equal(answer, expected[number % len(texts)])
    assert state(model) == before


def test_a_streaming_thread_enters_the_block_itself(llama, quantizers, make_tokens, tokenizer) -> None:
    """The idiom of deployment/README.md: whoever reads the stream may have left any block of its own by then."""
    ids = make_tokens(1, 30)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)

    def answer() -> None:
        with packed_attention(llama):
            generated(llama, quantizers, ids, streamer=streamer)

    thread = threading.Thread(target=answer)
    with packed_attention(llama):
        expected = generated(llama, quantizers, ids)[0, 30:]
        thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected)


@pytest.mark.parametrize("negative", [None, 11], ids=["last token", "negative prompt"])
def test_guidance_without_a_condition_reads_its_own_past(negative: int | None, llama, make_tokens, fit_model) -> None:
    """`generate` gives those forwards the cache that the first of them made; without one they saw the newest token alone."""
    ids, exact = make_tokens(1, 30), fit_model(llama, Scheme.parse("int4", sink_tokens=150))
    options = {"guidance_scale": 1.7, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    if negative is not None:
        options["negative_prompt_ids"] = make_tokens(1, negative, seed=8)
    expected = llama.generate(ids, **options)
    with packed_attention(llama):
        assert torch.equal(generated(llama, exact, ids, **options), expected)


def test_a_cache_that_a_model_makes_stays_within(llama, make_tokens) -> None:
    ids = make_tokens(1, 30)
    expected = llama(ids, use_cache=False).logits
    with packed_attention(llama):
        first = llama(ids[:, :20])
        rest = llama(ids[:, 20:], past_key_values=first.past_key_values)
        assert torch.allclose(torch.cat([first.logits, rest.logits], dim=1), expected, atol=EXACT)
        assert llama(ids, use_cache=False).past_key_values is None
        assert llama.model(ids).past_key_values is None
    with pytest.raises(RuntimeError, match="needs the model to run within"):
        llama(ids, past_key_values=first.past_key_values)
    assert isinstance(llama(ids).past_key_values, DynamicCache)


def test_an_attention_call_outside_says_what_is_missing(llama, make_tokens) -> None:
    llama.set_attn_implementation(NAME)
    try:
        with pytest.raises(RuntimeError, match="the block to last as long as the model runs"):
            llama(make_tokens(1, 5), use_cache=False)
    finally:
        llama.set_attn_implementation("sdpa")


def test_a_model_that_shares_the_config_is_told_to_copy_it(llama, make_tokens) -> None:
    other = type(llama)(llama.config).eval()
    with packed_attention(llama), pytest.raises(RuntimeError, match="shares its config object .* needs a copy of it"):
        other(make_tokens(1, 5), use_cache=False)
    assert other(make_tokens(1, 5)).logits.shape[:2] == (1, 5)


@pytest.fixture(scope="module")
def seeing() -> PreTrainedModel:
    """Gemma 3 with a vision tower."""
    text = CONFIGS["gemma3"]()
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    numbers = {"mm_tokens_per_image": 4, "image_token_index": 258, "boi_token_index": 256, "eoi_token_index": 257}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, **numbers)
    return Gemma3ForConditionalGeneration(config).float().eval().requires_grad_(False)


def test_only_the_decoder_is_switched(seeing, fit_model, make_tokens) -> None:
    quantizers, ids = fit_model(seeing, Scheme.parse("int4", sink_tokens=150)), make_tokens(1, 30) % 250 + 3
    image = torch.tensor([[256, 258, 258, 258, 258, 257]])
    ids = torch.cat([ids[:, :10], image, ids[:, 10:]], dim=1)
    given = {"input_ids": ids, "token_type_ids": (ids == 258).long(), "pixel_values": torch.randn(1, 3, 28, 28)}
    expected = seeing(**given, use_cache=False).logits
    words = seeing(input_ids=ids[:, 16:], use_cache=False).logits
    with packed_attention(seeing):
        assert torch.equal(seeing(**given, use_cache=False).logits, expected)
        with pytest.raises(ValueError, match="images"):
            seeing(**given, past_key_values=PackedCache(quantizers, seeing.config))
        assert seeing(**given).logits.shape == expected.shape  # with the cache that it makes itself
        logits = seeing(input_ids=ids[:, 16:], past_key_values=PackedCache(quantizers, seeing.config)).logits
        assert (logits - words).abs().max() < EXACT


@pytest.mark.parametrize("scheme", [None, "kivi2"])
def test_every_part_of_a_model_attends_as_before_afterwards(seeing, fit_model, scheme: str | None) -> None:
    quantizers = fit_model(seeing, Scheme.parse(scheme or "int4"))
    seeing.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    before = state(seeing)
    with packed_attention(seeing) if scheme is None else simulated(seeing, quantizers):
        assert seeing.config.vision_config._attn_implementation == "eager"
        assert seeing.config.text_config._attn_implementation.startswith(NAME)
    assert state(seeing) == before


@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("prompt", [60, 100])
def test_phi3_keeps_its_cache_where_its_frequencies_change(
    fit_model, make_tokens, prompt: int, chunk: int | None
) -> None:
    """Keys are rotated when they are read, so nothing has to be read again; transformers' own cache is thrown away there."""
    config = CONFIGS["phi3"]()
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "factor": 4.0}
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config.original_max_position_embeddings = 64
    config.rope_parameters["original_max_position_embeddings"] = 64
    model = build_model(config)
    quantizers, ids = fit_model(model, Scheme.parse("int4", sink_tokens=150)), make_tokens(1, prompt)
    cache = PackedCache(quantizers, model.config)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "return_dict_in_generate": True}
    with packed_attention(model):
        output = model.generate(
            ids, past_key_values=cache, max_new_tokens=10, prefill_chunk_size=chunk, output_logits=True, **options
        )
    assert output.past_key_values is cache
    assert cache.get_seq_length() == prompt + 9
    if prompt > 64 and chunk is None:  # else early tokens were read with other frequencies
        expected = model(output.sequences, use_cache=False).logits[0, prompt - 1 : -1]
        assert (torch.cat(output.logits) - expected).abs().max() < 0.1
    assert "prepare_inputs_for_generation" not in vars(model)


def test_frequencies_are_those_of_the_length_asked_for(fit_model, make_tokens) -> None:
    """transformers' dynamic NTK remembers the longest text: a shorter one after it is read with its frequencies."""
    model, ids = build_model(dynamic_llama()), make_tokens(1, 100)
    quantizers = fit_model(model, Scheme.parse("int4", sink_tokens=150))
    fresh = build_model(dynamic_llama())
    expected = fresh(ids, use_cache=False).logits

    def read(text: Tensor) -> Tensor:
        return model(text, past_key_values=PackedCache(quantizers, model.config)).logits

    model(make_tokens(1, 300, seed=1), use_cache=False)
    before = model.model.rotary_emb.inv_freq
    with packed_attention(model):
        read(make_tokens(1, 400, seed=1))
        assert (read(ids) - expected).abs().max() < EXACT
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


@pytest.mark.parametrize("tokens", [40, 90])
def test_stored_tokens_have_the_frequencies_of_the_text(fit_model, make_tokens, tokens: int) -> None:
    """Codes are read in whole blocks, whose last positions lie beyond the text, and beyond where frequencies change."""
    quantizers, ids = fit_model(build_model(dynamic_llama()), Scheme.parse("nuq4")), make_tokens(1, tokens)
    model = build_model(dynamic_llama()).double()  # another, which remembers no longer text
    with simulated(model, quantizers):
        expected = model(ids, use_cache=False).logits
    cache = PackedCache(quantizers, model.config, exact_chunk=False)
    with packed_attention(model):
        assert (model(ids, past_key_values=cache).logits - expected).abs().max() < 1e-6
