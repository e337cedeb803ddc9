"""What a mask, positions or arguments ask for beyond what a packed cache does is refused; everything exact equals stock."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import build_model, dynamic_llama
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.step.graphed import graphed
from gradients.cli import UserError
from quant.artefact import Quantizers
from quant.scheme import Scheme

EXACT = 0.02  # fp16 of the sink tokens, on logits of size 10
TOKENS = 40


@pytest.fixture
def exact(llama, fit_model) -> Quantizers:
    """The control: all tokens are sinks, so nothing is quantized."""
    return fit_model(llama, Scheme.parse("int4", sink_tokens=150))


def stepped(model: PreTrainedModel, cache: Any, ids: Tensor, last: int = 1, **options: Any) -> Tensor:
    """Logits of the last tokens, read in a step of their own with some options."""
    model(ids[:, :-last], past_key_values=cache)
    return model(ids[:, -last:], past_key_values=cache, **options).logits


def hole(kind: str) -> Tensor:
    visible = torch.ones(1, TOKENS, dtype=torch.bool)
    visible[:, slice(5, 25) if kind != "right padding" else -1] = False
    if kind in ("2d", "right padding"):
        return visible.long()
    return visible[:, None, None] if kind == "bool" else torch.zeros(1, 1, 1, TOKENS).masked_fill(~visible, -1e30)


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("kind", ["2d", "right padding", "bool", "float"])
def test_masks_with_holes_are_refused_at_every_step(llama, exact, make_tokens, kind: str, last: int) -> None:
    ids = make_tokens(1, TOKENS)
    mask = hole(kind)
    if mask.ndim == 4:
        mask = mask.expand(1, 1, last, TOKENS)
    stepped(llama, DynamicCache(config=llama.config), ids, last, attention_mask=mask)  # transformers can
    cache = PackedCache(exact, llama.config)
    with packed_attention(llama), pytest.raises(ValueError, match=r"left padding|causal attention"):
        stepped(llama, cache, ids, last, attention_mask=mask)
    assert cache.get_seq_length() == TOKENS - last


@pytest.mark.parametrize("last", [1, 3])
def test_the_mask_that_says_nothing_is_not_refused(llama, exact, make_tokens, last: int) -> None:
    ids, mask = make_tokens(1, TOKENS), torch.ones(1, TOKENS, dtype=torch.int64)
    expected = stepped(llama, DynamicCache(config=llama.config), ids, last, attention_mask=mask)
    with packed_attention(llama):
        logits = stepped(llama, PackedCache(exact, llama.config), ids, last, attention_mask=mask)
    assert (logits - expected).abs().max() < EXACT


@pytest.mark.parametrize("mask", [torch.ones(1, 3), torch.ones(3, TOKENS)], ids=["of new tokens only", "of other rows"])
def test_masks_of_another_size_are_refused(llama, exact, make_tokens, mask: Tensor) -> None:
    with packed_attention(llama), pytest.raises(ValueError, match="attention_mask is of"):
        stepped(llama, PackedCache(exact, llama.config), make_tokens(1, TOKENS), 3, attention_mask=mask.long())


def padded(make_tokens: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, positions) of a row with padding beside one without."""
    ids = make_tokens(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def test_padding_must_be_hidden_again_at_every_step(llama, exact, make_tokens) -> None:
    ids, mask, _ = padded(make_tokens)
    cache = PackedCache(exact, llama.config)
    with packed_attention(llama):
        llama(ids[:, :-2], attention_mask=mask[:, :-2], past_key_values=cache)
        for wrong in (None, torch.ones_like(mask[:, :-1])):
            with pytest.raises(ValueError, match=r"pass attention_mask|hides other tokens"):
                llama(ids[:, -2:-1], attention_mask=wrong, past_key_values=cache)
        llama(ids[:, -2:-1], attention_mask=mask[:, :-1], past_key_values=cache)


def positions(kind: str) -> Tensor:
    counted = torch.arange(TOKENS)
    wanted = {
        "shifted": counted + 100,
        "gap": counted + 100 * (counted >= 20),
        "gap before the last": counted + 100 * (counted == TOKENS - 1),
        "grouped": counted // 4,
        "backwards": counted.flip(0),
    }
    return wanted[kind][None]


@pytest.mark.parametrize("chunk", [1, 13, TOKENS])
@pytest.mark.parametrize("kind", ["shifted", "gap", "gap before the last", "grouped", "backwards"])
def test_positions_count_tokens_or_are_refused(llama, exact, make_tokens, kind: str, chunk: int) -> None:
    ids, given = make_tokens(1, TOKENS), positions(kind)
    expected = llama(ids, position_ids=given, attention_mask=torch.ones_like(ids), use_cache=False).logits
    cache, parts = PackedCache(exact, llama.config), []

    def read() -> None:
        for part, place in zip(ids.split(chunk, dim=1), given.split(chunk, dim=1), strict=True):
            parts.append(llama(part, position_ids=place, past_key_values=cache).logits)

    with packed_attention(llama):
        if kind == "shifted":
            read()
            assert (torch.cat(parts, dim=1) - expected).abs().max() < EXACT
        else:
            with pytest.raises(ValueError, match="position_ids do not count"):
                read()


def test_positions_go_on_as_they_began_for_every_row(llama, exact, make_tokens) -> None:
    """From the padding on, or from the first token: but not one way now and the other later. Rows may change places."""
    ids, mask, counted = padded(make_tokens)
    for own in (counted, torch.arange(TOKENS)[None].expand(2, -1)):
        expected = llama(ids, attention_mask=mask, position_ids=own, use_cache=False).logits[:, -1]
        cache = PackedCache(exact, llama.config)
        with packed_attention(llama):
            for begin, end in ((0, 4), (4, TOKENS - 1)):  # the first chunk is padding throughout for one row
                part = {"attention_mask": mask[:, :end], "position_ids": own[:, begin:end]}
                llama(ids[:, begin:end], **part, past_key_values=cache)
            other = counted if own is not counted else torch.full_like(counted, TOKENS - 1)
            with pytest.raises(ValueError, match="position_ids do not count"):
                llama(ids[:, -1:], attention_mask=mask, position_ids=other[:, -1:], past_key_values=cache)
            cache.batch_select_indices(torch.tensor([1, 0]))
            swapped = {"attention_mask": mask.flip(0), "position_ids": own[:, -1:].flip(0)}
            logits = llama(ids[:, -1:].flip(0), **swapped, past_key_values=cache).logits[:, 0]
        assert (logits.flip(0) - expected).abs().max() < EXACT


def test_absolute_positions_are_held_to_where_frequencies_go_by_them(fit_model, make_tokens) -> None:
    model = build_model(dynamic_llama())
    cache = PackedCache(fit_model(model, Scheme.parse("int4", sink_tokens=150)), model.config)
    with packed_attention(model), pytest.raises(ValueError, match="position_ids do not count"):
        model(make_tokens(1, TOKENS), position_ids=positions("shifted"), past_key_values=cache)


def test_a_device_that_is_not_waited_for_is_asked_at_the_end(llama, exact, make_tokens, monkeypatch) -> None:
    """What a GPU does, with tensors that only say that they are on one."""
    from deployment import checked

    cache, ids = PackedCache(exact, llama.config), make_tokens(1, TOKENS)

    def later(self: checked.Checked, right: Tensor, otherwise: str) -> None:
        self._right = right if self._right is None else self._right & right
        checked._unsettled.add(self)

    monkeypatch.setattr(checked.Checked, "_note", later)
    with pytest.raises(ValueError, match="a step over a packed cache was wrong"), packed_attention(llama):
        stepped(llama, cache, ids, attention_mask=hole("2d"))
    with pytest.raises(ValueError, match="an earlier step over this cache was wrong"), packed_attention(llama):
        llama(ids[:, :1], past_key_values=cache)
    cache.reset()
    with packed_attention(llama):
        llama(ids, past_key_values=cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="what waits for a GPU")
@pytest.mark.parametrize("pads", [0, 7])
def test_on_a_gpu_a_step_never_waits_and_what_was_wrong_is_said(make_model, quantizers, make_tokens, pads: int) -> None:
    model, ids = make_model("llama").cuda(), make_tokens(2, TOKENS).cuda()
    cache, mask = PackedCache(quantizers, model.config, capacity=200), torch.ones(2, 200, dtype=torch.int64).cuda()
    mask[0, :pads] = 0
    counted = (mask.cumsum(-1) - 1).clamp(min=0)

    def step(end: int, **other: Any) -> None:
        given = {"attention_mask": mask[:, :end], "position_ids": counted[:, end - 1 : end]} | other
        model(ids[:, :1], past_key_values=cache, **given)

    with pytest.raises(ValueError, match="a step over a packed cache was wrong"):  # noqa: SIM117
        with torch.no_grad(), packed_attention(model):
            model(ids, attention_mask=mask[:, :TOKENS], position_ids=counted[:, :TOKENS], past_key_values=cache)
            for end in range(TOKENS + 1, TOKENS + 4):
                step(end)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step(TOKENS + 4)
                step(TOKENS + 5, position_ids=counted[:, :1])
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_recorded_steps_are_checked_too(llama, exact, make_tokens, monkeypatch) -> None:
    """Masks and positions are no part of what is replayed."""
    monkeypatch.setattr("deployment.step.steps.obstacle", lambda *_: None)
    monkeypatch.setattr("deployment.step.steps.reserve", lambda *_: None)
    ids, cache = make_tokens(1, TOKENS), PackedCache(exact, llama.config)

    def recorder(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        return (lambda: [layer.stored.add_(1) for layer in cache.layers]), torch.zeros(1, 1, 259)

    with packed_attention(llama), graphed(llama, cache, recorder=recorder) as steps:
        llama(ids, past_key_values=cache)
        for _ in range(3):
            llama(ids[:, :1], past_key_values=cache)
        assert steps.replays == 2
        mask = torch.ones(1, TOKENS + 4, dtype=torch.int64)
        mask[:, 9] = 0
        with pytest.raises(ValueError, match="hides other tokens"):
            llama(ids[:, :1], past_key_values=cache, attention_mask=mask)
        with pytest.raises(ValueError, match="position_ids"):
            llama(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[7]]))
        assert {layer.slots for layer in cache.layers} == {TOKENS + 3}  # as they were before these
        assert all(layer.lengths == layer.stored.tolist() == [TOKENS + 3] for layer in cache.layers)
        with pytest.raises(UserError, match="recorded already"), graphed(llama, cache):
            pass


@pytest.mark.parametrize("argument", [{"softcap": 2.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}])
def test_unknown_arguments_of_an_attention_call_are_refused(
    llama, exact, make_tokens, argument: dict[str, Any]
) -> None:
    for cache in (None, PackedCache(exact, llama.config)):
        with packed_attention(llama), pytest.raises(NotImplementedError, match=next(iter(argument))):
            llama(make_tokens(1, 9), past_key_values=cache, **argument)


def test_a_cache_of_another_kind_is_refused(llama, exact, make_tokens) -> None:
    """It would be filled with keys that stock attention takes for rotated ones, and the other way round."""
    with packed_attention(llama):
        with pytest.raises(UserError, match="not a DynamicCache"):
            llama(make_tokens(1, 9), past_key_values=DynamicCache(config=llama.config))
        output = llama(make_tokens(1, 9))
        assert output.past_key_values.is_native and output.logits.shape[1] == 9
        native = PackedCache(None, llama.config)
        llama(make_tokens(1, 9), past_key_values=native)
    with pytest.raises(RuntimeError, match="within `with packed_attention"):
        llama(make_tokens(1, 1), past_key_values=native)


@pytest.mark.parametrize(("held", "rows", "remedy"), [(1, 3, r"batch_repeat_interleave\(3\)"), (3, 1, "batch_select")])
@pytest.mark.parametrize("new", [1, 5])
def test_a_batch_of_another_size_is_told_what_to_call(
    llama, exact, make_tokens, held: int, rows: int, remedy: str, new: int
) -> None:
    cache = PackedCache(exact, llama.config)
    with packed_attention(llama):
        llama(make_tokens(held, 9), past_key_values=cache)
        with pytest.raises(UserError, match=remedy):
            llama(make_tokens(rows, new), past_key_values=cache)


def test_what_a_packed_layer_does_not_have_it_says(llama, exact) -> None:
    cache = PackedCache(exact, llama.config)
    layer = cache.layers[0]
    for ask in (
        lambda: layer.keys,
        lambda: layer.values,
        lambda: cache.max_batch_size,
        layer.offload,
        lambda: cache.offload(0, only_non_sliding=False),
    ):
        with pytest.raises(NotImplementedError, match="packed"):
            ask()


def test_a_compiled_model_is_checked_too(llama, exact, make_tokens) -> None:
    """A compiler sees neither hooks on forwards nor into the step; the step itself looks."""
    ids, forward = make_tokens(1, TOKENS), torch.compile(llama, backend="eager", fullgraph=True)
    cache = PackedCache(exact, llama.config)
    with torch.inference_mode(), packed_attention(llama):
        forward(ids[:, :-1], past_key_values=cache)
        with pytest.raises(ValueError, match="hides other tokens"):
            forward(ids[:, -1:], past_key_values=cache, attention_mask=hole("2d"))
        with pytest.raises(ValueError, match="position_ids do not count"):
            forward(ids[:, -1:], past_key_values=cache, position_ids=torch.tensor([[7]]))
