"""Attention over a packed cache, through transformers' public extension points.

Within `packed_attention(model)`
- the rotary module's output is replaced by cos = 1, sin = 0, so that the model hands pre-RoPE keys to the cache
  and pre-RoPE queries to the attention function;
- the attention function rotates both at their true positions and attends over packed past and current chunk;
- a mask function keeps padding known without ever building a mask of chunk x context.
Layers without a packed cache (sliding windows, or no cache at all) are rotated and handed to stock SDPA. On exit
the model is as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from deployment.cache import PackedLayer
from deployment.kernels.dispatch import Backend
from deployment.registered import step
from deployment.rope import Rope
from gradients.models import decoder, kv_sites
from gradients.rope import rotate

NAME = "kvquant"
_CONTEXT = "kvquant_context"


@dataclass(frozen=True)
class _Context:
    """What the attention function must know of its module; a plain object, so that it is no submodule."""

    rope: Rope
    backend: Backend | None


@contextmanager
def packed_attention(model: PreTrainedModel, backend: Backend | None = None) -> Iterator[None]:
    """Within the block, `model` attends through the packed layers of any `PackedCache` it is given.

    `backend` overrides the environment's choice between kernels and torch (kernels/dispatch.py).

    Raises `NotImplementedError` for an unsupported architecture.
    """
    kv_sites(model)  # refuses an architecture whose attention nobody has looked at
    rotary = decoder(model).rotary_emb
    modules = [layer.self_attn for layer in decoder(model).layers]
    ropes: dict[str | None, Rope] = {}
    before = model.config._attn_implementation
    handle = rotary.register_forward_hook(_no_rotation)
    try:
        for module in modules:
            layer_type = module.layer_type if isinstance(rotary.rope_type, dict) else None
            rope = ropes.setdefault(layer_type, Rope(rotary, layer_type))
            setattr(module, _CONTEXT, _Context(rope, backend))
        model.set_attn_implementation(NAME)
        yield
    finally:
        handle.remove()
        for module in modules:
            if hasattr(module, _CONTEXT):
                delattr(module, _CONTEXT)
        model.set_attn_implementation(before)


def _no_rotation(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = output
    return torch.ones_like(cos), torch.zeros_like(sin)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """For plain causal attention: which tokens are not padding, `[B, 1, 1, T + S]` bool, or None if nobody said.

    Causality needs no mask: the attention function knows it. Nobody looks into the mask here, since that would wait for the
    device in every step. Any other pattern gets its full mask from transformers.
    """
    if mask_function is not causal_mask_function:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if attention_mask is None:
        return None
    return attention_mask[:, None, None, kv_offset : kv_offset + kv_length]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function given to transformers.

    Args:
        query: `[B, H, S, D]`, pre-RoPE.
        key, value: what `Cache.update` returned, pre-RoPE: the chunk `[B, G, S, D]`, or past and chunk if native.
        attention_mask: as `padding_mask` made it.

    Returns `[B, S, H, D]` in the query's dtype, and no weights.
    """
    context: _Context = getattr(module, _CONTEXT)
    rope = context.rope
    layer: PackedLayer | None = getattr(key, "packed_layer", None)
    if layer is None:
        return _native(module, rope, query, key, value, attention_mask, scaling, dropout, position_ids, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return step(layer, rope, context.backend, query, key, value, attention_mask, scaling), None


def _native(
    module: nn.Module,
    rope: Rope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    position_ids: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Rotate all the way a stock model would have, and let stock SDPA attend."""
    new, total = query.shape[2], key.shape[2]
    if position_ids is None:
        position_ids = torch.arange(total - new, total, device=query.device)[None]
    length = int(position_ids.max()) + 1 if rope.length_dependent else 1
    query = rotate(query, *rope.tables(position_ids, length, query.dtype))
    key_positions = position_ids
    if total > new:
        back = torch.arange(total - 1, -1, -1, device=query.device)
        key_positions = (position_ids[:, -1:] - back).clamp(min=0)
    key = rotate(key, *rope.tables(key_positions, length, query.dtype))
    mask = _causal_and_padding(mask, new, total, query.device)
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)


def _causal_and_padding(mask: Tensor | None, new: int, total: int, device: torch.device) -> Tensor | None:
    """The full mask `[B, 1, S, T + S]` that SDPA needs; None where its own causality will do."""
    if mask is not None and mask.shape[2] == 1 and mask.all():  # no padding, as transformers itself would have found
        mask = None
    if new == 1 or (mask is not None and mask.shape[2] != 1) or (mask is None and new == total):
        return mask
    causal = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
    return causal[None, None] if mask is None else causal & mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)
