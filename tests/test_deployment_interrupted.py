"""A forward that fails in the middle leaves the cache as it was, or the next one says what has happened."""

from collections.abc import Callable

import pytest
import torch
from conftest import CONFIGS, build_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.layer import PackedLayer
from quant.scheme import Scheme

PLACES: dict[str, Callable[[PreTrainedModel], nn.Module]] = {
    "mlp of a layer": lambda model: model.model.layers[-1].mlp,
    "o_proj of a layer": lambda model: model.model.layers[-1].self_attn.o_proj,
    "k_proj of a layer": lambda model: model.model.layers[-1].self_attn.k_proj,
    "first layer": lambda model: model.model.layers[0].mlp,
    "logits": lambda model: model.lm_head,
}
TOKENS = 60


class Failing:
    """Within the block, a module fails after its work is done."""

    def __init__(self, module: nn.Module, error: type[BaseException]) -> None:
        self.module, self.error = module, error

    def __enter__(self) -> None:
        def fail(*_: object) -> None:
            raise self.error("on purpose")

        self._handle = self.module.register_forward_hook(fail)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize(
    "scheme",
    [Scheme.parse("nuq3-5%"), Scheme.parse("int4", sink_tokens=150), Scheme.parse("nuq2-5%", residual_tokens=10)],
    ids=["nuq3", "exact", "window"],
)
@pytest.mark.parametrize("held", [0, 30])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_same_call_again_gives_what_it_would_have_given(
    name: str, place: str, held: int, scheme: Scheme, fit_model, make_tokens
) -> None:
    model, ids = build_model(CONFIGS[name]()), make_tokens(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :35] = 0  # in the second chunk, too
    quantizers = fit_model(model, scheme)
    whole, cache = PackedCache(quantizers, model.config), PackedCache(quantizers, model.config)

    def read(past: PackedCache, begin: int, end: int) -> Tensor:
        return model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=past).logits

    with torch.no_grad(), packed_attention(model):
        for past in (whole, cache):
            if held:
                read(past, 0, held)
        expected = read(whole, held, TOKENS)
        with pytest.raises(torch.OutOfMemoryError), Failing(PLACES[place](model), torch.OutOfMemoryError):
            read(cache, held, TOKENS)
        assert [layer.get_seq_length() for layer in cache.layers] == [held] * len(cache.layers)
        assert torch.equal(read(cache, held, TOKENS), expected)
    assert next(layer.lengths for layer in cache.layers if isinstance(layer, PackedLayer)) == [TOKENS - 35, TOKENS]


def test_a_step_that_fails_while_it_is_stored_can_be_repeated(llama, quantizers, make_tokens, monkeypatch) -> None:
    """Keys are stored and values are not."""
    ids, encode = make_tokens(1, TOKENS), PackedLayer.encode
    whole, cache = (PackedCache(quantizers, llama.config) for _ in range(2))
    with torch.no_grad(), packed_attention(llama):
        for past in (whole, cache):
            llama(ids[:, :30], past_key_values=past)
        expected = llama(ids[:, 30:], past_key_values=whole).logits

        def fail(layer: PackedLayer, kind: str, tokens: Tensor) -> object:
            if kind == "value":
                raise torch.OutOfMemoryError("on purpose")
            return encode(layer, kind, tokens)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(PackedLayer, "encode", fail)
            with pytest.raises(torch.OutOfMemoryError):
                llama(ids[:, 30:], past_key_values=cache)
        assert torch.equal(llama(ids[:, 30:], past_key_values=cache).logits, expected)
    words = [[page.words for page in past.layers[1].packed["key"].pages] for past in (whole, cache)]
    assert all(torch.equal(*pages) for pages in zip(*words, strict=True))


def test_ctrl_c_is_undone_at_the_end_of_the_block_or_said_within(llama, quantizers, make_tokens) -> None:
    ids, cache = make_tokens(1, TOKENS), PackedCache(quantizers, llama.config)
    with pytest.raises(KeyboardInterrupt), packed_attention(llama):
        llama(ids[:, :30], past_key_values=cache)
        with Failing(llama.model.layers[0].mlp, KeyboardInterrupt):
            llama(ids[:, 30:], past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [30, 30]
    with packed_attention(llama):
        with pytest.raises(KeyboardInterrupt), Failing(llama.model.layers[0].mlp, KeyboardInterrupt):
            llama(ids[:, 30:], past_key_values=cache)
        with pytest.raises(RuntimeError, match="interrupted; it holds the 30 tokens from before again"):
            llama(ids[:, 30:], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [30, 30]
        llama(ids[:, 30:], past_key_values=cache)


def test_layers_that_hold_different_tokens_are_refused(llama, quantizers, make_tokens) -> None:
    ids, cache = make_tokens(1, TOKENS), PackedCache(quantizers, llama.config)
    with packed_attention(llama):
        llama(ids, past_key_values=cache)
        cache.layers[1].crop(-3)
        with pytest.raises(RuntimeError, match=r"hold \[60, 57\] tokens"):
            llama(ids[:, :1], past_key_values=cache)
        torch.compiler.reset()
        compiled = torch.compile(llama, backend="eager")  # in which hooks on forwards do not count
        with pytest.raises(RuntimeError, match="hold different tokens"):
            compiled(ids[:, :1], past_key_values=cache)


def test_a_layer_that_is_lost_on_the_way_is_said_by_the_same_forward(make_model, quantizers, make_tokens) -> None:
    model, ids = make_model("llama"), make_tokens(1, TOKENS)
    module, cache = model.model.layers[1].self_attn, PackedCache(quantizers, model.config)
    original = module.forward

    def forward(packed_layer: PackedLayer, **options: object) -> object:
        return original(**options)

    with torch.no_grad(), packed_attention(model):
        model(ids[:, :30], past_key_values=cache)
        module.forward = forward
        with pytest.raises(RuntimeError, match=r"layers \[1\] was not told of the packed cache"):
            model(ids[:, 30:], past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [30, 30]


def test_a_cache_that_a_model_drops_is_said(make_model, quantizers, make_tokens) -> None:
    """Gradient checkpointing takes the cache from every layer of a model in training mode, which then attends to the chunk alone."""
    model, ids = make_model("llama"), make_tokens(1, TOKENS)
    cache = PackedCache(quantizers, model.config)
    model.gradient_checkpointing_enable()
    with packed_attention(model):
        model(ids[:, :30], past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"layers \[0, 1\] were not handed the packed cache"):
            model.train()(ids[:, 30:], past_key_values=cache)
        model.eval()(ids[:, 30:], past_key_values=cache)
    assert cache.get_seq_length() == TOKENS


def test_keys_may_be_made_anew_between_cache_and_attention(make_model, quantizers, make_tokens, monkeypatch) -> None:
    model, ids = make_model("llama"), make_tokens(1, TOKENS)
    caches = [PackedCache(quantizers, model.config) for _ in range(2)]
    update = caches[1].update
    monkeypatch.setattr(caches[1], "update", lambda *given: tuple(states.clone() for states in update(*given)))
    with torch.no_grad(), packed_attention(model):
        read = [[model(part, past_key_values=cache).logits for part in ids.split(30, dim=1)] for cache in caches]
    assert all(torch.equal(*logits) for logits in zip(*read, strict=True))
