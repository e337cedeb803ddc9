"""Sites of every architecture: what they read, what they write; loading; refusals of what has no site."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig

from deployment.measure.shapes import load_config
from gradients.cli import UserError
from gradients.fingerprint import Fingerprint
from gradients.loading import load_model
from gradients.models import SITES, kv_shape, kv_sites


def rms_normalised(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gain


def keys_and_values_by_hand(attention: nn.Module, hidden: Tensor, config: Any) -> dict[str, Tensor]:
    """Pre-RoPE keys and values `[B, S, C]` of one layer, from its weights and its input alone."""
    heads, head_dim = kv_shape(config)
    channels = heads * head_dim
    if config.model_type == "phi3":
        queries = config.num_attention_heads * head_dim
        weight = attention.qkv_proj.weight
        return {
            "key": hidden @ weight[queries : queries + channels].T,
            "value": hidden @ weight[queries + channels :].T,
        }
    keys, values = hidden @ attention.k_proj.weight.T, hidden @ attention.v_proj.weight.T
    if config.model_type == "qwen2":
        keys, values = keys + attention.k_proj.bias, values + attention.v_proj.bias
    if config.model_type in ("qwen3", "gemma3_text"):
        gain = attention.k_norm.weight + (1 if config.model_type == "gemma3_text" else 0)
        keys = rms_normalised(keys.unflatten(-1, (heads, head_dim)), gain, config.rms_norm_eps).flatten(2)
    return {"key": keys, "value": values}


def test_every_supported_architecture_has_a_tiny_model(make_model) -> None:
    from conftest import CONFIGS

    assert {make_model(name).config.model_type for name in CONFIGS} == set(SITES)


def test_sites_are_pre_rope_keys_and_values(model, captured_sites, make_tokens) -> None:
    inputs: dict[int, Tensor] = {}
    layers = model.get_decoder().layers
    handles = [
        layers[site.layer].self_attn.register_forward_pre_hook(
            lambda _m, args, kwargs, i=site.layer: inputs.update({i: kwargs["hidden_states"] if not args else args[0]}),
            with_kwargs=True,
        )
        for site in kv_sites(model)
    ]
    with captured_sites(model) as seen:
        model(input_ids=make_tokens(2, 33), use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(seen) == 2 * len(inputs)
    for (layer, kind), x in seen.items():
        expected = keys_and_values_by_hand(layers[layer].self_attn, inputs[layer], model.config)[kind]
        assert x.shape == (2, 33, expected.shape[-1])
        assert torch.allclose(x, expected, rtol=1e-4, atol=1e-5), (layer, kind)


def test_sites_cover_the_fully_cached_layers_in_order(make_model) -> None:
    found = [(site.layer, site.kind) for site in kv_sites(make_model("gemma3"))]
    assert found == [(1, "key"), (1, "value"), (3, "key"), (3, "value")]
    found = [(site.layer, site.kind) for site in kv_sites(make_model("llama"))]
    assert found == [(0, "key"), (0, "value"), (1, "key"), (1, "value")]


def test_write_is_the_inverse_of_read(model, make_tokens, subtests: pytest.Subtests) -> None:
    for site in kv_sites(model):
        outputs: list[Tensor] = []
        handle = site.module.register_forward_hook(lambda _m, _i, output, kept=outputs: kept.append(output))
        model(input_ids=make_tokens(2, 5), use_cache=False)
        handle.remove()
        with subtests.test(layer=site.layer, kind=site.kind):
            (output,) = outputs
            original = output.clone()
            x = site.read(output)
            assert x.shape == (2, 5, site.channels)
            replacement = torch.arange(x.numel(), dtype=torch.float32).view(x.shape)
            written = site.write(output, replacement)
            assert torch.equal(site.read(written), replacement)
            assert torch.equal(site.write(written, x), original)
            assert torch.equal(output, original)


def test_rewriting_reaches_the_model_and_ends_with_the_block(model, make_tokens, hook_count) -> None:
    tokens, hooks = make_tokens(1, 31), hook_count(model)

    def logits() -> Tensor:
        return model(input_ids=tokens, use_cache=False).logits

    plain = logits()
    for site in kv_sites(model):
        with site.rewriting(lambda x: x.clone()):
            assert torch.equal(logits(), plain)
        with site.rewriting(lambda x: x.roll(1, -1)):
            assert not torch.allclose(logits(), plain, atol=1e-3), (site.layer, site.kind)
    assert torch.equal(logits(), plain)
    with pytest.raises(ZeroDivisionError), kv_sites(model)[0].rewriting(lambda x: x / (1 // 0)):
        logits()
    assert hook_count(model) == hooks


def test_a_model_of_sliding_windows_only_is_refused(make_model, save_model, tmp_path) -> None:
    model = make_model("mistral")
    assert isinstance(model.config, MistralConfig)
    model.config.sliding_window = 32
    with pytest.raises(UserError, match="sliding window of 32 tokens.*--full-attention"):
        kv_sites(model)
    folder = save_model(model, tmp_path / "sliding")
    with pytest.raises(UserError, match="sliding window of 32 tokens.*--full-attention"):
        load_model(str(folder), device="cpu")
    loaded = load_model(str(folder), device="cpu", full_attention=True)
    assert [site.layer for site in kv_sites(loaded.model)] == [0, 0, 1, 1]


def test_full_attention_opens_every_layer_of_a_mixed_model(make_model, save_model, tmp_path) -> None:
    model = make_model("qwen3")
    model.config.use_sliding_window, model.config.sliding_window = True, 16
    model.config.layer_types = ["sliding_attention", "full_attention"]
    folder, tokens = save_model(model, tmp_path / "mixed"), torch.arange(3, 43)[None]
    sliding = load_model(str(folder), device="cpu").model
    assert Fingerprint.of(sliding.config).cached_layers == (1,)
    opened = load_model(str(folder), device="cpu", full_attention=True).model
    assert Fingerprint.of(opened.config).cached_layers == (0, 1)
    expected = make_model("qwen3")(tokens).logits  # which never slid
    assert torch.equal(opened(tokens).logits, expected)
    assert not torch.allclose(sliding(tokens).logits, expected, atol=0.1)


def test_full_attention_is_refused_where_sliding_layers_rotate_otherwise(make_model, save_model, tmp_path) -> None:
    folder = save_model(make_model("gemma3"), tmp_path / "gemma3")
    with pytest.raises(UserError, match="--full-attention: the model has a rotary embedding for each type of layer"):
        load_model(str(folder), device="cpu", full_attention=True)
    with pytest.raises(UserError, match="--full-attention: the model has a rotary embedding"):
        load_config(str(folder), full_attention=True)
    loaded = load_model(str(folder), device="cpu").model
    assert loaded(torch.arange(3, 43)[None]).logits.isfinite().all()


def test_an_adapter_is_no_model(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "./base", "peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"an adapter of \./base: merge it first"):
        load_model(str(tmp_path), device="cpu")
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(UserError, match="an adapter of another model: merge it first"):
        load_model(str(tmp_path), device="cpu")


def test_a_loaded_model_is_the_saved_one_frozen(llama, llama_folder, make_tokens) -> None:
    loaded = load_model(str(llama_folder), device="cpu")
    assert loaded.name == str(llama_folder)
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    tokens = make_tokens(1, 33)
    assert torch.equal(loaded.model(tokens).logits, llama(tokens).logits)
    assert loaded.tokenizer.decode(loaded.tokenizer("naïve caché").input_ids) == "naïve caché"
    assert Fingerprint.of(loaded.model.config) == Fingerprint.of(llama.config)


def test_a_model_that_sees_later_tokens_is_refused(make_model) -> None:
    """An encoder of a supported architecture (EmbeddingGemma) would have any perplexity at all."""
    model = make_model("gemma3")
    model.config.use_bidirectional_attention = True
    with pytest.raises(UserError, match="use_bidirectional_attention.*give a causal model"):
        kv_sites(model)
