"""The simulation: `decode(encode(x))` at every site and nowhere else, sinks apart, its bytes counted by hand."""

from contextlib import ExitStack, nullcontext

import pytest
import torch
from conftest import logits_of
from torch import Tensor
from transformers import PreTrainedModel

from gradients.cli import UserError
from gradients.models import KINDS, kv_sites
from quant.artefact import Quantizers
from quant.quantizer import normalise
from quant.scheme import Scheme
from quant.simulate import RoundTrip, Usage, simulated
from quant.storage import StoredSize, exact_size, packed_size


@pytest.mark.parametrize("tokens", [1, 31, 33, 257])
def test_all_sinks_change_nothing_but_to_fp16(tokens: int, llama, quantizers, make_tokens) -> None:
    exact = Quantizers(**vars(quantizers) | {"scheme": quantizers.scheme.with_changes(sink_tokens=257)})
    ids = make_tokens(1, tokens)
    with simulated(llama, exact) as usage:
        got = logits_of(llama, ids)
    assert usage.size.bits_per_element == 16
    with ExitStack() as stack:
        for site in kv_sites(llama):
            stack.enter_context(site.rewriting(lambda x: x.half().float()))
        assert torch.equal(got, logits_of(llama, ids))


@pytest.mark.parametrize("tokens", [1, 31, 33, 257])
def test_every_site_hands_on_its_own_round_trip(tokens: int, model, fit_model, captured_sites, make_tokens) -> None:
    """Layers and sides differ in scheme, so that a quantizer at the wrong site shows."""
    fitted = [fit_model(model, Scheme.parse(name, sink_tokens=3)) for name in ("nuq4-1%", "int3", "nuq2-2%", "nf3-1%")]
    quantizers = Quantizers(
        **vars(fitted[0])
        | {
            "layers": {
                layer: {
                    kind: fitted[(2 * order + side) % 4].layers[layer][kind]
                    for side, kind in enumerate(("key", "value"))
                }
                for order, layer in enumerate(fitted[0].layers)
            }
        }
    )
    with captured_sites(model) as before, simulated(model, quantizers), captured_sites(model) as after:
        logits_of(model, make_tokens(2, tokens, seed=5))
    assert before.keys() == after.keys() == {(site.layer, site.kind) for site in kv_sites(model)}
    for (layer, kind), x in before.items():
        quantizer = quantizers.layers[layer][kind]
        expected = torch.cat([x[:, :3].half().float(), quantizer.decode(quantizer.encode(x[:, 3:]))], dim=1)
        assert torch.equal(after[layer, kind], expected), (layer, kind)
        assert tokens <= 3 or not torch.equal(expected, x)


def test_sliding_layers_are_left_alone(model, fit_model, hook_count) -> None:
    hooks = hook_count(model)
    with simulated(model, fit_model(model, Scheme.parse("nuq3"))):
        hooked = [
            layer
            for layer, module in enumerate(model.get_decoder().layers)
            if any(part._forward_hooks for part in module.modules())
        ]
    assert hooked == sorted({site.layer for site in kv_sites(model)})
    assert hook_count(model) == hooks


def test_more_bits_stay_closer_to_the_model(model, fit_model, make_tokens) -> None:
    ids = make_tokens(1, 193, seed=17)  # the calibration tokens
    plain = logits_of(model, ids).log_softmax(-1)
    distances = []
    for bits in (2, 3, 4):
        with simulated(model, fit_model(model, Scheme.parse(f"nuq{bits}-1%"))):
            quantized = logits_of(model, ids).log_softmax(-1)
        distances.append(float((plain.exp() * (plain - quantized)).sum(-1).mean()))
    assert distances == sorted(distances, reverse=True)
    assert 0 < distances[-1] < 0.5 * distances[0]


def test_another_models_quantizers_are_refused(quantizers, make_model, hook_count) -> None:
    model = make_model("qwen2")
    with pytest.raises(UserError, match="another model"), simulated(model, quantizers):
        pytest.fail("the block was entered")
    assert hook_count(model) == 0


def test_pieces_and_padding_are_refused(model, fit_model, make_tokens, hook_count) -> None:
    """The first token of each would be kept exactly as a sink: whole answers of `generate` would be."""
    ids, quantizers, hooks = make_tokens(2, 20), fit_model(model, Scheme.parse("nuq3")), hook_count(model)
    mask = torch.ones_like(ids)
    with torch.no_grad(), simulated(model, quantizers):
        whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        cached = model(input_ids=ids)  # which is still one piece
        assert torch.equal(cached.logits, whole)
        with pytest.raises(UserError, match="in one piece, and the cache holds 20 tokens already"):
            model(input_ids=ids[:, :1], past_key_values=cached.past_key_values)
        with pytest.raises(UserError, match="in one piece, and the cache holds 20 tokens already"):
            model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=2)
        for padding in (slice(0, 3), slice(17, 20)):
            padded = mask.clone()
            padded[1, padding] = 0
            with pytest.raises(UserError, match="texts without padding"):
                model(input_ids=ids, attention_mask=padded, use_cache=False)
        two_texts = torch.arange(10).repeat(2)[None]
        with pytest.raises(UserError, match="one text in each row"):
            model(input_ids=ids[:1], position_ids=two_texts, use_cache=False)
    assert hook_count(model) == hooks


def test_bits_per_element_by_hand(llama, quantizers, captured_sites, make_tokens) -> None:
    """Two rows of 70 tokens: 1 sink and 69 packed ones in 2 blocks of 64 slots; C = 24, G = 2, nuq3-1%."""
    ids = make_tokens(2, 70, seed=3)
    with captured_sites(llama) as before, simulated(llama, quantizers) as usage:
        logits_of(llama, ids)
    key_outliers = 0
    for layer in (0, 1):
        quantizer = quantizers.layers[layer]["key"]
        key_outliers += int((normalise(before[layer, "key"][:, 1:], quantizer.scale, quantizer.zero).abs() > 1).sum())
    assert key_outliers > 0

    sides = 2 * 2 * 2  # rows, layers, keys and values
    sinks = sides * 24 * 16
    codes = sides * 2 * 64 * 24 * 3
    token_scales = (sides // 2) * 2 * 64 * (16 + 16)
    value_outliers = (sides // 2) * 69 * 2  # ceil(24 * 1% / 2) = 1 at each end
    outliers = (key_outliers + value_outliers) * (16 + 16)
    lists = sides * 2 * 2 * 32  # blocks, heads
    bits, elements = sinks + codes + token_scales + outliers + lists, sides * 70 * 24
    assert usage.size == StoredSize(bits, elements)
    assert usage.size.bits_per_element == bits / elements


def bits_of(model: PreTrainedModel, quantizers: Quantizers, ids: Tensor) -> StoredSize:
    with simulated(model, quantizers) as usage:
        logits_of(model, ids)
    return usage.size


def test_bits_of_kivi_by_hand(llama, fit_model, make_tokens) -> None:
    """Two rows of 200 tokens: 1 sink, 71 beyond the window of 128; C = 24, groups of 8 tokens or channels.

    Keys leave the window in groups: 64 tokens are packed, in 1 block, and 136 exact. Of values 71, in 2 blocks, and 129.
    """
    quantizers = fit_model(llama, Scheme.parse("kivi2", group=8))
    keys = 136 * 24 * 16 + 64 * 24 * 2 + (64 // 8) * 24 * (16 + 16)
    values = 129 * 24 * 16 + 2 * 64 * 24 * 2 + 71 * (24 // 8) * (16 + 16)
    rows, layers = 2, 2
    assert bits_of(llama, quantizers, make_tokens(2, 200)) == StoredSize(
        rows * layers * (keys + values), rows * layers * 2 * 200 * 24
    )


SINK, SLOTS = 24 * 16, 2 * 64 * 24  # of a side: 1 sink, and 69 tokens in 2 blocks of 64 slots; C = 24, G = 2
LISTS = 2 * 2 * 32  # blocks, heads
BY_HAND = {
    "a token in one group": ("atom4", {"group": 128}, 2 * (SINK + SLOTS * 4 + 69 * (16 + 16))),
    "three groups": ("atom3", {"group": 8}, 2 * (SINK + SLOTS * 3 + 69 * 3 * (16 + 16))),
    "a ragged group": ("flexgen4", {"group": 10}, 2 * (SINK + SLOTS * 4 + 69 * 3 * (16 + 16))),
    "a norm per token and head, no zeros": ("turbo3", {}, 2 * (SINK + SLOTS * 3 + 69 * 2 * 16)),
    # 2 % of outliers: ceil(69 * 1 %) = 1 at each end of a channel, ceil(24 * 1 %) = 1 at each end of a token
    "keys and values with outliers": (
        "datafree4",
        {},
        2 * (SINK + SLOTS * 4 + LISTS) + 2 * (24 + 69) * (16 + 16) + (24 + 2 * 64) * (16 + 16),
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_bits_of_online_ranges_by_hand(case: str, llama, fit_model, make_tokens) -> None:
    """Two rows of 70 tokens in two layers."""
    name, fields, bits = BY_HAND[case]
    quantizers = fit_model(llama, Scheme.parse(name, **fields))
    assert bits_of(llama, quantizers, make_tokens(2, 70)) == StoredSize(2 * 2 * bits, 2 * 2 * 2 * 70 * 24)


def test_bits_of_matrix_thresholds_by_hand(llama, fit_model, captured_sites, make_tokens) -> None:
    """Tokens differ in how many outliers they have, so they are counted."""
    quantizers, ids = fit_model(llama, Scheme.parse("nuq3-5%", thresholds="matrix")), make_tokens(1, 70, seed=3)
    with captured_sites(llama) as before, simulated(llama, quantizers) as usage:
        logits_of(llama, ids)
    outliers = 0
    for layer in (0, 1):
        key, value = (quantizers.layers[layer][kind] for kind in KINDS)
        x = before[layer, "value"][:, 1:]
        per_token = ((x < value.thresholds[0]) | (x > value.thresholds[1])).sum(-1)
        assert per_token.min() < per_token.max()
        outliers += int(per_token.sum())
        outliers += int((normalise(before[layer, "key"][:, 1:], key.scale, key.zero).abs() > 1).sum())
    sides = 4 * (24 * 16 + 2 * 64 * 24 * 3 + 2 * 2 * 32)
    assert usage.size == StoredSize(sides + 2 * 2 * 64 * 32 + outliers * 32, 4 * 70 * 24)


@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 9, 33])
def test_a_round_trip_keeps_sinks_and_window(tokens: int, llama, fit_model, make_tokens) -> None:
    quantizers = fit_model(llama, Scheme.parse("kivi2", group=4, residual_tokens=5, sink_tokens=3))
    x = torch.randn(2, tokens, 24, generator=torch.Generator().manual_seed(0))
    for site, step in zip(kv_sites(llama), (4, 1), strict=False):
        usage = Usage()
        quantizer = quantizers.layers[site.layer][site.kind]
        got = RoundTrip(site, quantizer, quantizers.scheme, usage)(x)
        end = 3 + max(0, tokens - 3 - 5) // step * step
        assert torch.equal(got[:, :3], x[:, :3].half().float())
        assert torch.equal(got[:, 3:end], quantizer.decode(quantizer.encode(x[:, 3:end])))
        assert torch.equal(got[:, end:], x[:, end:])
        assert usage.size.elements == 2 * tokens * 24
        assert end <= 3 or not torch.equal(got, x)


def test_usage_adds_up_over_forwards(llama, quantizers, make_tokens) -> None:
    sizes = []
    for ids in (make_tokens(1, 33), make_tokens(1, 65, seed=1)):
        with simulated(llama, quantizers) as usage:
            logits_of(llama, ids)
        sizes.append(usage.size)
    with simulated(llama, quantizers) as usage:
        logits_of(llama, make_tokens(1, 33))
        logits_of(llama, make_tokens(1, 65, seed=1))
    assert usage.size == sizes[0] + sizes[1]


@pytest.mark.parametrize(
    ("tokens", "outliers", "has_outliers", "token_scales", "bits"),
    [
        pytest.param(0, 0, True, True, 0, id="nothing"),
        pytest.param(1, 0, False, False, 64 * 24 * 3, id="one token takes a block"),
        pytest.param(64, 0, False, True, 64 * 24 * 3 + 64 * 32, id="a full block"),
        pytest.param(65, 5, True, False, 128 * 24 * 3 + 5 * 32 + 2 * 2 * 32, id="one token more, with outliers"),
    ],
)
def test_packed_size_counts_every_bit(
    tokens: int, outliers: int, has_outliers: bool, token_scales: bool, bits: int
) -> None:
    size = packed_size(tokens, 2, 24, 24 * 3, outliers=outliers, has_outliers=has_outliers, token_scales=token_scales)
    assert size == StoredSize(bits, tokens * 24)
    assert exact_size(tokens, 24) == StoredSize(tokens * 24 * 16, tokens * 24)


def test_nothing_is_quantized_twice(llama, quantizers, fit_model, make_tokens) -> None:
    ids = make_tokens(1, 20)
    with simulated(llama, quantizers):
        once = logits_of(llama, ids)
        with (
            pytest.raises(UserError, match="in simulation already"),
            simulated(llama, fit_model(llama, Scheme.parse("nuq2"))),
        ):
            pytest.fail("the block was entered")
        assert torch.equal(logits_of(llama, ids), once)
    with simulated(llama, quantizers):
        assert torch.equal(logits_of(llama, ids), once)


def test_a_model_that_was_compiled_is_simulated_too(llama, quantizers, fit_model, make_tokens) -> None:
    """Compiled code looks at no hooks: it went on as it was, without quantizers or with others."""
    others, ids = fit_model(llama, Scheme.parse("nuq2")), make_tokens(1, 20)
    torch.compiler.reset()
    compiled = torch.compile(llama, backend="eager")
    for used in (None, quantizers, others, quantizers, None):
        with nullcontext() if used is None else simulated(llama, used):
            assert torch.equal(logits_of(compiled, ids), logits_of(llama, ids))
