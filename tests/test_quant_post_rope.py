"""Keys after the rotary embedding: against the model's own rotation, and residual windows against a streaming cache."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from conftest import CONFIGS, build_model, logits_of
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gradients.models import Kind, cached_layers, decoder, kv_sites
from quant.artefact import Quantizers, axis_of
from quant.post_rope import Intercepted, first_exact, intercepting_attention
from quant.quantizer import Quantizer
from quant.scheme import Axis, Scheme
from quant.simulate import packed_tokens, simulated

ROUNDING = 2e-4  # absolute, on logits of size 1 to 10 in float32


def with_sinks(x: Tensor, quantizer: Quantizer, sinks: int) -> Tensor:
    """`[B, S, C]` with its sinks as fp16 and all else quantized."""
    return torch.cat([x[:, :sinks].half().float(), quantizer.decode(quantizer.encode(x[:, sinks:]))], dim=1)


class StreamingCache:
    """One row's keys or values `[C]` as tokens come one by one: sinks, then packed steps, then recent ones.

    A step leaves the window once `residual` tokens have come after it; what is packed is never touched again.
    """

    def __init__(self, quantizer: Quantizer, scheme: Scheme, step: int) -> None:
        self.quantizer, self.scheme, self.step = quantizer, scheme, step
        self.sinks: list[Tensor] = []
        self.packed: list[Tensor] = []
        self.recent: list[Tensor] = []

    def append(self, x: Tensor) -> None:
        if len(self.sinks) < self.scheme.sink_tokens:
            self.sinks.append(x.half().float())
            return
        self.recent.append(x)
        if len(self.recent) - self.step >= self.scheme.residual_tokens:
            block = torch.stack(self.recent[: self.step])
            self.packed += list(self.quantizer.decode(self.quantizer.encode(block)))
            self.recent = self.recent[self.step :]

    def read(self) -> Tensor:
        return torch.stack([*self.sinks, *self.packed, *self.recent])


def attend_streaming(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    caches: Callable[[], tuple[StreamingCache, StreamingCache]],
    scaling: float,
) -> Tensor:
    """Attention `[B, H, S, D]` in float64 of tokens that come one by one, each reading the caches as they are."""
    batch, heads, tokens, dim = query.shape
    groups = key.shape[1]
    output = torch.empty(batch, heads, tokens, dim, dtype=torch.float64)
    for row in range(batch):
        both = caches()
        for token in range(tokens):
            for cache, x in zip(both, (key, value), strict=True):
                cache.append(x[row, :, token].flatten())
            keys, values = (cache.read().view(token + 1, groups, dim).double() for cache in both)
            for head in range(heads):
                group = head * groups // heads
                weights = (keys[:, group] @ query[row, head, token].double() * scaling).softmax(0)
                output[row, head, token] = weights @ values[:, group]
    return output


def step_of(scheme: Scheme, axis: Axis) -> int:
    return scheme.group if axis == "channel" and scheme.group else 1


def streaming_caches(
    quantizers: tuple[Quantizer, Quantizer], scheme: Scheme
) -> Callable[[], tuple[StreamingCache, StreamingCache]]:
    def empty() -> tuple[StreamingCache, StreamingCache]:
        key, value = (
            StreamingCache(quantizer, scheme, step_of(scheme, axis))
            for quantizer, axis in zip(quantizers, (scheme.key_axis, scheme.value_axis), strict=True)
        )
        return key, value

    return empty


KIVI_VALUES_TOO = {"value_axis": "channel"}
WINDOWS = {
    "kivi": Scheme.parse("kivi2", group=4, residual_tokens=8),
    "turbo": Scheme.parse("turbo2", residual_tokens=5, sink_tokens=2),
    "nuq, static": Scheme.parse("nuq2-1%", key_rope="post", residual_tokens=5),
    "kivi, window no multiple of the group": Scheme.parse("kivi3", group=4, residual_tokens=7),
    "kivi, window smaller than the group": Scheme.parse("kivi2", group=8, residual_tokens=3),
    "kivi, no sinks": Scheme.parse("kivi2", group=4, residual_tokens=4, sink_tokens=0),
    "kivi, many sinks": Scheme.parse("kivi2", group=4, residual_tokens=4, sink_tokens=6),
    "kivi, values in groups of tokens too": Scheme.parse("kivi2", group=4, residual_tokens=5, **KIVI_VALUES_TOO),
    "per token": Scheme.parse("int2", key_axis="token", key_rope="post", residual_tokens=5),
    "per token in groups": Scheme.parse("atom2", group=4, residual_tokens=5),
    "static channels": Scheme.parse("int2", key_rope="post", residual_tokens=6, sink_tokens=2),
    "a window of one token": Scheme.parse("int2", key_rope="post", residual_tokens=1),
}


@pytest.mark.parametrize("step", [1, 2, 5, 32])
@pytest.mark.parametrize("residual", [1, 4, 7, 128])
@pytest.mark.parametrize("sinks", [0, 1, 5])
def test_the_last_query_sees_what_is_packed(sinks: int, residual: int, step: int) -> None:
    """The two formulas of one window: whom attention lets see what exactly, and what the round trip quantizes."""
    scheme = Scheme.parse("int2", key_rope="post", sink_tokens=sinks, residual_tokens=residual)
    for tokens in (1, 2, 5, 6, 33, 200):
        last = int(first_exact(torch.tensor(tokens - 1), scheme, step))
        packed = packed_tokens(max(0, tokens - sinks), residual, step)
        assert last == sinks + packed, tokens


POST = {
    "atom": Scheme.parse("atom2", group=10, sink_tokens=3),
    "kivi without its window": Scheme.parse("kivi2", group=8, residual_tokens=0),
    "turbo": Scheme.parse("turbo2"),
    "nuq, static": Scheme.parse("nuq2-1%", key_rope="post"),
    "nuq, online": Scheme.parse("nuq2-5%", key_rope="post", channel_range="online"),
    "allocated": Scheme.parse("rdnuq2.4", key_rope="post"),
}


@pytest.mark.parametrize("name", POST)
def test_keys_are_quantized_after_their_rotation(
    name: str, model, fit_model, make_tokens, rewriting_rotated_keys
) -> None:
    """By hand: rewrite what the model's own `apply_rotary_pos_emb` returns, in the layers whose past is cached."""
    scheme, ids = POST[name], make_tokens(2, 33, seed=5)
    quantizers, layers = fit_model(model, scheme), cached_layers(model.config)

    def change(layer: int, key: Tensor) -> Tensor:
        if layer not in layers:
            return key
        flat = with_sinks(key.transpose(1, 2).flatten(2), quantizers.layers[layer]["key"], scheme.sink_tokens)
        return flat.unflatten(2, (key.shape[1], key.shape[3])).transpose(1, 2)

    plain = logits_of(model, ids)
    with ExitStack() as stack:
        stack.enter_context(rewriting_rotated_keys(model, change))
        only_keys = logits_of(model, ids)
        for site in kv_sites(model):
            if site.kind == "value":
                quantizer = quantizers.layers[site.layer]["value"]
                stack.enter_context(site.rewriting(lambda x, q=quantizer: with_sinks(x, q, scheme.sink_tokens)))
        expected = logits_of(model, ids)
    with simulated(model, quantizers):
        got = logits_of(model, ids)
    assert torch.allclose(got, expected, atol=ROUNDING)
    assert not torch.allclose(expected, only_keys, atol=1e-2)
    assert not torch.allclose(only_keys, plain, atol=1e-2)


@contextmanager
def streaming_attention(model: PreTrainedModel, quantizers: Quantizers) -> Iterator[None]:
    """Every cached layer attends over streaming caches, one token, row and head at a time."""
    layers, before = quantizers.layers, model.config._attn_implementation

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if module.layer_idx not in layers:
            return AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)
        sides = layers[module.layer_idx]
        caches = streaming_caches((sides["key"], sides["value"]), quantizers.scheme)
        return attend_streaming(query, key, value, caches, kwargs["scaling"]).transpose(1, 2).to(query.dtype), None

    AttentionInterface.register("streaming", attention)
    AttentionMaskInterface.register("streaming", sdpa_mask)
    model.set_attn_implementation("streaming")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [*product(CONFIGS, ("kivi", "turbo", "nuq, static")), *(("llama", name) for name in list(WINDOWS)[3:])],
)
def test_a_model_with_a_window_is_a_model_that_streams(
    architecture: str, name: str, make_model, fit_model, make_tokens
) -> None:
    model = make_model(architecture)
    quantizers, ids = fit_model(model, WINDOWS[name]), make_tokens(1, 31, seed=6)
    model.double()  # in which sums in another order flip no code
    plain = logits_of(model, ids)
    with streaming_attention(model, quantizers):
        expected = logits_of(model, ids)
    with simulated(model, quantizers):
        got = logits_of(model, ids)
    assert torch.allclose(got, expected, atol=ROUNDING)
    assert not torch.allclose(expected, plain, atol=1e-2)


@pytest.mark.parametrize("residual", [33, 1000])
def test_a_window_longer_than_the_sequence_changes_nothing(residual: int, model, fit_model, make_tokens) -> None:
    quantizers, ids = fit_model(model, Scheme.parse("kivi2", sink_tokens=0)), make_tokens(2, 33)
    longer = Quantizers(**vars(quantizers) | {"scheme": quantizers.scheme.with_changes(residual_tokens=residual)})
    with simulated(model, longer) as usage:
        got = logits_of(model, ids)
    assert torch.allclose(got, logits_of(model, ids), atol=ROUNDING)
    assert usage.size.bits_per_element == 16
    with simulated(model, Quantizers(**vars(longer) | {"scheme": longer.scheme.with_changes(residual_tokens=0)})):
        assert not torch.allclose(logits_of(model, ids), got, atol=1e-2)


@pytest.mark.parametrize("name", ["kivi2", "atom2", "turbo2"])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_one_to_three_tokens_stay_finite_and_exact(tokens: int, name: str, llama, fit_model, make_tokens) -> None:
    """One token is a sink, and two are a sink and an empty or very small group."""
    with simulated(llama, fit_model(llama, Scheme.parse(name))) as usage:
        got = logits_of(llama, make_tokens(2, tokens))
    assert got.shape[:2] == (2, tokens) and got.isfinite().all()
    if tokens == 1 or name == "kivi2":
        assert usage.size.bits_per_element == 16


def test_a_window_never_looks_ahead(model, fit_model, make_tokens) -> None:
    """What comes later changes no earlier prediction: groups that a later token completes are not read before."""
    quantizers, ids = fit_model(model, WINDOWS["kivi"]), make_tokens(1, 33)
    changed = ids.clone()
    changed[0, 22:] = make_tokens(11, seed=9)
    with simulated(model, quantizers):
        one, other = logits_of(model, ids), logits_of(model, changed)
    assert torch.allclose(one[:, :22], other[:, :22], atol=1e-5)
    assert not torch.allclose(one[:, 22:], other[:, 22:], atol=1e-2)


def marks_left(model: PreTrainedModel) -> list[str]:
    return [name for layer in decoder(model).layers for name in vars(layer.self_attn) if "kvquant" in name]


@pytest.mark.parametrize("scheme", [WINDOWS["kivi, no sinks"], WINDOWS["per token"], Scheme.parse("nuq2")], ids=str)
def test_the_model_is_itself_again_afterwards(scheme: Scheme, model, fit_model, make_tokens, hook_count) -> None:
    quantizers, ids, hooks = fit_model(model, scheme), make_tokens(1, 33), hook_count(model)
    plain, implementation = logits_of(model, ids), model.config._attn_implementation

    def assert_itself() -> None:
        assert model.config._attn_implementation == implementation
        assert hook_count(model) == hooks and not marks_left(model)
        assert torch.equal(logits_of(model, ids), plain)

    with simulated(model, quantizers):
        assert not torch.allclose(logits_of(model, ids), plain, atol=1e-2)
        assert len(marks_left(model)) == (len(cached_layers(model.config)) if scheme.key_rope == "post" else 0)
    assert_itself()
    with pytest.raises(RuntimeError, match="stop"), simulated(model, quantizers):
        raise RuntimeError("stop")
    assert_itself()
    with pytest.raises(IndexError), simulated(model, quantizers):
        logits_of(model, torch.tensor([[10**6]]))
    assert_itself()


def test_another_attention_implementation_comes_back(make_model, fit_model, make_tokens) -> None:
    model, ids = make_model("qwen2"), make_tokens(1, 33)
    quantizers = fit_model(model, WINDOWS["kivi"])
    with simulated(model, quantizers):
        expected = logits_of(model, ids)
    model.set_attn_implementation("eager")
    with simulated(model, quantizers):
        assert torch.allclose(logits_of(model, ids), expected, atol=ROUNDING)
    assert model.config._attn_implementation == "eager"


def test_the_models_own_scaling_is_used(make_model, fit_model, make_tokens) -> None:
    """Gemma scales by another number than the head dimension, once its config says so."""
    model, ids = make_model("gemma3"), make_tokens(1, 33)
    before = logits_of(model, ids)
    for layer in decoder(model).layers:
        layer.self_attn.scaling *= 1.7
    plain = logits_of(model, ids)
    with simulated(model, fit_model(model, Scheme.parse("kivi2", sink_tokens=0))):
        assert torch.allclose(logits_of(model, ids), plain, atol=ROUNDING)
    assert not torch.allclose(before, plain, atol=1e-2)


@pytest.mark.parametrize("scheme", [POST["atom"], WINDOWS["kivi"]], ids=Scheme.describe)
def test_layers_that_are_not_given_are_left_alone(scheme: Scheme, make_model, make_tokens) -> None:
    model, ids = make_model("llama"), make_tokens(1, 33)
    seen: list[tuple[Kind, tuple[int, ...]]] = []

    def noted(kind: Kind) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            seen.append((kind, tuple(x.shape)))
            return x

        return change

    plain = logits_of(model, ids)
    with intercepting_attention(model, {}):
        assert torch.equal(logits_of(model, ids), plain)
    with intercepting_attention(model, {1: Intercepted(scheme, {"value": noted("value")})}):
        assert torch.allclose(logits_of(model, ids), plain, atol=ROUNDING)
    assert seen == [("value", (1, 33, 24))]


def test_a_model_of_half_precision_stays_one(make_model, fit_model, make_tokens) -> None:
    model, ids = make_model("llama"), make_tokens(1, 33)
    for scheme in (WINDOWS["kivi"], POST["atom"]):
        quantizers = fit_model(model, scheme)
        with simulated(model, quantizers):
            expected = logits_of(model, ids)
        half = make_model("llama").bfloat16()
        with simulated(half, quantizers):
            got = logits_of(half, ids)
        assert got.dtype == torch.bfloat16
        assert float((got.float() - expected).abs().mean()) < 0.5 * float(expected.abs().mean())


def test_a_residual_window_takes_no_mask(make_model, make_tokens, fit_model) -> None:
    model, tokens = make_model("llama"), make_tokens(1, 40)
    mask = torch.ones_like(tokens)
    with simulated(model, fit_model(model, Scheme.parse("kivi2"))):
        expected = model(tokens, use_cache=False).logits
        assert torch.equal(model(tokens, attention_mask=mask, use_cache=False).logits, expected)
        mask[:, :7] = 0
        with pytest.raises(ValueError, match="without padding"):
            model(tokens, attention_mask=mask, use_cache=False)


BEFORE_ROPE = {
    "nuq, static": Scheme.parse("nuq2-1%", residual_tokens=5),
    "many sinks": Scheme.parse("nuq2", residual_tokens=4, sink_tokens=7),
    "error feedback": Scheme.parse("rdnuq2.4+fb", residual_tokens=6, sink_tokens=2),
    "kivi before RoPE": Scheme.parse("kivi2", group=4, residual_tokens=8, key_rope="pre"),
}


@pytest.mark.parametrize("name", BEFORE_ROPE)
@pytest.mark.parametrize("architecture", ["llama", "llama-yarn-mha", "qwen3", "phi3-partial", "gemma3"])
def test_a_window_over_keys_before_rope(architecture: str, name: str, fit_model, make_tokens) -> None:
    """In a single layer the last token sees what its site would hand on with all but the window rewritten."""
    config, scheme = CONFIGS[architecture](), BEFORE_ROPE[name]
    config.num_hidden_layers = 1
    if architecture == "gemma3":
        config.layer_types = ["full_attention"]
    model, ids = build_model(config), make_tokens(2, 21, seed=6)
    quantizers = fit_model(model, scheme)
    sinks, window = scheme.sink_tokens, scheme.residual_tokens
    with simulated(model, quantizers):
        got = logits_of(model, ids)
    for tokens in (3, 9, 20, 21):
        with ExitStack() as stack:
            for site in kv_sites(model):
                quantizer, step = quantizers.layers[0][site.kind], step_of(scheme, axis_of(scheme, site.kind))
                end = sinks + max(0, tokens - sinks - window) // step * step

                def change(x: Tensor, q: Quantizer = quantizer, end: int = end) -> Tensor:
                    return torch.cat([with_sinks(x[:, :end], q, sinks), x[:, end:]], dim=1)

                stack.enter_context(site.rewriting(change))
            expected = logits_of(model, ids[:, :tokens])[:, -1]
        assert torch.allclose(got[:, tokens - 1], expected, atol=ROUNDING)
    assert not torch.allclose(got, logits_of(model, ids), atol=1e-2)
