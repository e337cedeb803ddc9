"""Quantize what attention receives: keys after the rotary embedding, and a window of recent tokens kept exact.

The keys of a transformers model meet its rotary embedding on their way to the attention function, so that is where
the field's other methods are simulated. A residual window (KIVI) makes quantization depend on who asks: query i sees
its last `residual_tokens` keys and values exactly, so scores and sums are formed with both versions. Keys that are
quantized before the rotary embedding then go on exactly, and what would have become of the others follows separately.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from gradients.attention import PREFIX, attending_through
from gradients.models import Kind, KVSite, decoder
from gradients.precision import widened
from gradients.rope import rotate
from quant.scheme import Scheme

NAME = f"{PREFIX}_simulated"
_INTERCEPTED = "kvquant_intercepted"


@dataclass(frozen=True)
class Intercepted:
    """How one layer's keys and values `[B, S, C]` change on their way into attention."""

    scheme: Scheme
    changes: dict[Kind, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def change(self, kind: Kind, x: Tensor) -> Tensor:
        """`x` `[B, G, S, D]` changed, where there is something to change."""
        if kind not in self.changes:
            return x
        changed = self.changes[kind](x.transpose(1, 2).flatten(2))
        return changed.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)


@contextmanager
def intercepting_attention(model: PreTrainedModel, layers: dict[int, Intercepted]) -> Iterator[None]:
    """Within the block, `model` attends over the changed keys and values of these layers.

    Raises `UserError` if it attends through another function of ours already.
    """
    modules = {layer: decoder(model).layers[layer].self_attn for layer in layers}
    with attending_through(model, NAME):
        try:
            for layer, module in modules.items():
                setattr(module, _INTERCEPTED, layers[layer])
            yield
        finally:
            for module in modules.values():
                if hasattr(module, _INTERCEPTED):
                    delattr(module, _INTERCEPTED)


@contextmanager
def changing_before_rope(
    model: PreTrainedModel, site: KVSite, change: Callable[[Tensor], Tensor]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the block the model goes on with its keys, and what was yielded tells how they would be if `change` came first.

    It takes a layer's rotated keys `[B, S, C]`, once in every forward, and returns those of `change`, rotated. `change`
    maps the keys `[B, S, C]` of `site` before the rotary embedding.
    """
    held: dict[str, Any] = {}

    def note_tables(_module: torch.nn.Module, _inputs: object, options: dict[str, Any]) -> None:
        held["tables"] = options["position_embeddings"]

    def note_keys(_module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        held["key"] = change(site.read(output))

    def rotated(_key: Tensor) -> Tensor:
        by_head = held.pop("key").unflatten(2, (site.heads, site.head_dim)).transpose(1, 2)
        return rotate(by_head, *held.pop("tables")).transpose(1, 2).flatten(2)

    with ExitStack() as undo:
        attends = decoder(model).layers[site.layer].self_attn
        undo.callback(attends.register_forward_pre_hook(note_tables, with_kwargs=True).remove)
        undo.callback(site.module.register_forward_hook(note_keys).remove)
        yield rotated


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function given to transformers: SDPA, or our own where there is a residual window."""
    layer: Intercepted | None = getattr(module, _INTERCEPTED, None)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    stored_key, stored_value = layer.change("key", key), layer.change("value", value)
    if layer.scheme.residual_tokens and attention_mask is not None:
        raise ValueError("a residual window is simulated for causal attention without padding; drop attention_mask")
    if not layer.scheme.residual_tokens:
        return sdpa_attention_forward(module, query, stored_key, stored_value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    output = attend_with_residual(query, (key, value), (stored_key, stored_value), layer.scheme, scaling)
    return output.transpose(1, 2).to(query.dtype).contiguous(), None


def attend_with_residual(
    query: Tensor, exact: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor], scheme: Scheme, scaling: float
) -> Tensor:
    """Causal attention of `query` `[B, H, S, D]` in float32, as if the tokens came one by one.

    `exact` and `stored` are (key, value) `[B, G, S, D]` before and after quantization. Returns `[B, H, S, D]`.
    """
    # KV heads one after the other: scores of all tokens with all are large
    sides = zip(*(x.split(1, dim=1) for x in (*exact, *stored)), strict=True)
    queries = query.chunk(exact[0].shape[1], dim=1)
    return torch.cat(
        [_attend_head(own, side[:2], side[2:], scheme, scaling) for own, side in zip(queries, sides, strict=True)],
        dim=1,
    )


def _attend_head(
    query: Tensor, exact: Sequence[Tensor], stored: Sequence[Tensor], scheme: Scheme, scaling: float
) -> Tensor:
    """`attend_with_residual` of one KV head, `[B, 1, S, D]`, and its queries."""
    batch, heads, tokens, dim = query.shape
    grouped = widened(query).reshape(batch, 1, -1, dim) * scaling
    token = torch.arange(tokens, device=query.device)
    key_step, value_step = scheme.residual_step(scheme.key_axis), scheme.residual_step(scheme.value_axis)

    def pick(step: int, recent: Tensor, old: Tensor) -> Tensor:
        mask = (token >= first_exact(token[:, None], scheme, step)).repeat(heads, 1)
        return torch.where(mask, recent, old)

    recent, old = (grouped @ key.to(grouped.dtype).transpose(-1, -2) for key in (exact[0], stored[0]))
    causal = (token <= token[:, None]).repeat(heads, 1)
    weights = pick(key_step, recent, old).masked_fill(~causal, -torch.inf).softmax(-1)
    zero = grouped.new_zeros(())
    output = pick(value_step, weights, zero) @ exact[1].to(grouped.dtype)
    output = output + pick(value_step, zero, weights) @ stored[1].to(grouped.dtype)
    return output.view(batch, heads, tokens, dim)


def first_exact(token: Tensor, scheme: Scheme, step: int) -> Tensor:
    """For the query at each position: the first token that is exact although it is no sink."""
    past = token + 1 - scheme.sink_tokens - scheme.residual_tokens
    return scheme.sink_tokens + past.clamp(min=0) // step * step


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
