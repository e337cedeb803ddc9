"""Attention over the packed cache against stock attention and against the simulation."""

import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deployment.attention import NAME, packed_attention, padding_mask
from deployment.cache import PackedCache
from deployment.format.stretches import Stretch
from deployment.layer import PackedLayer
from deployment.step.reference import Segment, attend_torch
from gradients.models import kv_sites
from quant.scheme import Scheme
from quant.simulate import simulated

ROUNDING = 2e-4  # absolute, on logits of size 1 to 10 in float32


def left_padded(tokens: Tensor, pads: int) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[0, :pads] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
def test_quantization_off_equals_stock_attention_exactly(model, make_tokens, padded: bool) -> None:
    tokens = make_tokens(2, 33)
    mask = left_padded(tokens, 7 if padded else 0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    with packed_attention(model):
        logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("chunk", [1, 7, 70])
def test_a_cache_of_sinks_only_equals_stock_attention(model, make_tokens, fit_model, chunk: int, padded: bool) -> None:
    """Everything exact: what is left to err is the online softmax, rotation, padding and bookkeeping."""
    quantizers = fit_model(model, Scheme.parse("int4", sink_tokens=100))
    tokens = make_tokens(2, 70)
    mask = left_padded(tokens, 11 if padded else 0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    cache, parts = PackedCache(quantizers, model.config), []
    with packed_attention(model):
        for start in range(0, 70, chunk):
            part = slice(start, start + chunk)
            parts.append(
                model(
                    input_ids=tokens[:, part],
                    attention_mask=mask[:, : start + chunk],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                ).logits
            )
    error = (torch.cat(parts, dim=1) - expected)[mask.bool()]
    # sinks are fp16, hence not exactly equal
    assert error.square().mean().sqrt() < 3e-3 * expected[mask.bool()].square().mean().sqrt()
    assert cache.get_seq_length() == 70


@pytest.mark.parametrize("window", [0, 11])
def test_deployed_equals_simulated_on_every_architecture(model, make_tokens, fit_model, window: int) -> None:
    """Sliding-window layers beside it, partial and scaled rotary embeddings, norms of keys."""
    quantizers = fit_model(model, Scheme.parse("nuq3-5%", sink_tokens=2, residual_tokens=window))
    tokens = make_tokens(2, 90)
    with simulated(model, quantizers):
        expected = model(input_ids=tokens, use_cache=False).logits
    cache = PackedCache(quantizers, model.config, exact_chunk=False)
    with packed_attention(model):
        parts = [model(input_ids=part, past_key_values=cache).logits for part in tokens.split([60, 1, 1, 28], dim=1)]
    # a sum in another order may move a number across a boundary; such a token differs, nearly all must not
    error = (torch.cat(parts, dim=1) - expected).abs().amax(-1)
    assert error.median() < ROUNDING and (error < 100 * ROUNDING).float().mean() > 0.9


def test_packed_codes_are_the_simulated_codes(make_model, make_tokens, fit_model, captured_sites) -> None:
    """Token by token: the first layer's sites see the same input whatever the chunks, so its codes must agree exactly."""
    model, tokens = make_model("qwen3"), make_tokens(1, 100)
    quantizers = fit_model(model, Scheme.parse("nuq2-5%"))
    with captured_sites(model) as seen:
        model(input_ids=tokens, use_cache=False)
    cache = PackedCache(quantizers, model.config)
    with packed_attention(model):
        for part in tokens.split(17, dim=1):
            model(input_ids=part, past_key_values=cache)
    layer = cache.layers[0]
    assert isinstance(layer, PackedLayer)
    for kind in ("key", "value"):
        quantizer = quantizers.layers[0][kind]
        expected = quantizer.decode(quantizer.encode(seen[0, kind][:, 1:]))
        stored = torch.cat([getattr(s, kind) for s in layer.stretches() if s.start], dim=2)
        same = (stored.transpose(1, 2).flatten(2)[:, :99] == expected).float().mean()
        assert same > 0.999  # a projection of 17 rows may round differently from one of 100


def test_exact_chunk_attends_the_chunk_unquantized(make_model, make_tokens, fit_model) -> None:
    model, tokens = make_model("llama"), make_tokens(1, 50)
    quantizers = fit_model(model, Scheme.parse("int2"))
    expected = model(input_ids=tokens).logits
    logits = {}
    for exact in (True, False):
        with packed_attention(model):
            cache = PackedCache(quantizers, model.config, exact_chunk=exact)
            logits[exact] = model(input_ids=tokens, past_key_values=cache).logits
    assert (logits[True] - expected).abs().max() < ROUNDING
    assert (logits[False] - expected).abs().max() > 100 * ROUNDING


@pytest.mark.parametrize("exact_chunk", [True, False])
def test_the_past_is_dequantized_a_page_at_a_time(
    make_model, make_tokens, fit_model, monkeypatch, exact_chunk: bool
) -> None:
    """However many pages there are, at most the one in use and the one before it exist in full precision."""
    monkeypatch.setattr("deployment.format.stretches.STRETCH_BLOCKS", 1)
    original, made, most = PackedLayer.stretches, [], 0

    def watched(layer: PackedLayer) -> Iterator[Stretch]:
        nonlocal most
        for stretch in original(layer):
            made.append(weakref.ref(stretch.value))
            most = max(most, sum(value() is not None for value in made))
            yield stretch

    model, tokens = make_model("llama"), make_tokens(1, 401)
    cache = PackedCache(fit_model(model, Scheme.parse("nuq3-5%")), model.config, exact_chunk=exact_chunk)
    with packed_attention(model), torch.inference_mode():
        model(input_ids=tokens[:, :400], past_key_values=cache)
        monkeypatch.setattr(PackedLayer, "stretches", watched)
        model(input_ids=tokens[:, 400:], past_key_values=cache)
    assert len(made) == 2 * 8  # layers; a sink and seven blocks
    assert most <= 2


def test_a_decode_step_does_not_wait_for_the_device(make_model, make_tokens, fit_model) -> None:
    """A tensor on the meta device has no contents: to look at them raises, as to wait for a GPU would."""
    model, tokens = make_model("llama"), make_tokens(2, 9)
    cache = PackedCache(fit_model(model, Scheme.parse("int4")), model.config)
    with packed_attention(model):
        model(input_ids=tokens, attention_mask=left_padded(tokens, 4), past_key_values=cache)
    layer = cache.layers[0]
    assert isinstance(layer, PackedLayer)
    nothing = torch.ones(2, 10, dtype=torch.bool, device="meta")
    mask = padding_mask(2, 1, 10, q_offset=9, attention_mask=nothing)
    assert mask.shape == (2, 1, 1, 10) and layer.checked.padding(layer, mask, None, 1) == [0, 0]
    with pytest.raises(RuntimeError, match="meta"):  # but the end of the block does
        layer.checked.settle()
    layer.lengths = [0, 9]  # the first row's next token may be padding, which only the mask can tell
    with pytest.raises(NotImplementedError, match="meta"):
        layer.checked.padding(layer, mask, None, 1)


def test_model_is_as_it_was_afterwards(make_model, make_tokens, hook_count) -> None:
    model, tokens = make_model("gemma3"), make_tokens(1, 20)
    expected, hooks = model(input_ids=tokens).logits, hook_count(model)
    before = model.config._attn_implementation
    keys = set(model.state_dict())
    with pytest.raises(RuntimeError, match="on purpose"), packed_attention(model):
        assert model.config._attn_implementation == NAME
        assert set(model.state_dict()) == keys
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == before
    assert hook_count(model) == hooks
    assert not any(hasattr(module, "kvquant_context") for module in model.modules())
    assert torch.equal(model(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("heads_per_kv_head", [1, 3])
@pytest.mark.parametrize("pieces", [[1], [5, 1, 27], [33]])
def test_online_softmax_equals_softmax(heads_per_kv_head: int, pieces: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    total, kv_heads, dim = sum(pieces), 2, 8
    query = torch.randn(2, kv_heads * heads_per_kv_head, 4, dim, generator=generator) * 5
    key, value = (torch.randn(2, kv_heads, total, dim, generator=generator) * 5 for _ in range(2))
    visible = torch.rand(2, 4, total, generator=generator) < 0.7
    visible[..., -1] = True
    parts = zip(*(x.split(pieces, dim=d) for x, d in ((key, 2), (value, 2), (visible, 2))), strict=True)
    output = attend_torch(query, [Segment(k, v, m) for k, v, m in parts], 0.3)
    expanded = [x.repeat_interleave(heads_per_kv_head, dim=1) for x in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *expanded, attn_mask=visible[:, None], scale=0.3)
    assert torch.allclose(output, expected, atol=1e-5)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    key = torch.ones(1, 1, 3, 4)
    nothing = torch.zeros(1, 2, 3, dtype=torch.bool)
    assert (attend_torch(torch.ones(1, 1, 2, 4), [Segment(key, key, nothing)], 1.0) == 0).all()


def test_sites_and_packed_layers_are_the_same_layers(model, fit_model) -> None:
    cache = PackedCache(fit_model(model, Scheme.parse("int4")), model.config)
    packed = [i for i, layer in enumerate(cache.layers) if isinstance(layer, PackedLayer)]
    assert packed == sorted({site.layer for site in kv_sites(model)})
