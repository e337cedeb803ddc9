"""Attention over a packed cache, through transformers' public extension points.

Within `packed_attention(model)` (entered.py) the model hands over queries and keys without their rotary embedding:
- the attention function rotates both at their true positions and attends over packed past and current chunk;
- a mask function keeps padding known without ever building a mask of chunk x context.
Layers without a packed cache (sliding windows, or no cache at all) are rotated and handed to stock SDPA. What is asked for
beyond that is refused.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from deployment.layer import OUTSIDE, PackedLayer
from deployment.rope import Rope
from deployment.step.asked import Step
from deployment.step.compiled import attend
from deployment.step.entered import CONTEXT, NAME, Context, packed_attention
from deployment.step.same_attention import refuse_unknown
from gradients.rope import rotate

__all__ = ["NAME", "attention", "packed_attention", "padding_mask"]


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

    Causality needs no mask: the attention function knows it. Nobody looks into the mask here (checked.py does).
    Any other pattern gets its full mask from transformers.
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
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    packed_layer: PackedLayer | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function given to transformers.

    Args:
        query: `[B, H, S, D]`, pre-RoPE.
        key, value: what `Cache.update` returned, pre-RoPE: the chunk `[B, G, S, D]`, or past and chunk if native.
        attention_mask: as `padding_mask` made it.
        sliding_window: how far back native layers look, which their mask says too.
        packed_layer: that of the cache the forward was given (entered.py); None without one.

    Returns `[B, S, H, D]` in the query's dtype, and no weights. Raises NotImplementedError for what is not done here.
    """
    context: Context | None = getattr(module, CONTEXT, None)
    if context is None:
        raise RuntimeError(
            f"{OUTSIDE}, and the block to last as long as the model runs; a model that shares its config object with one "
            "in such a block needs a copy of it"
        )
    refuse_unknown(kwargs)
    if is_causal is False:
        refuse_unknown({"is_causal=False": True})
    rope = context.rope
    if packed_layer is None:
        return _native(module, rope, query, key, value, attention_mask, scaling, dropout, position_ids)
    if sliding_window is not None or dropout:
        refuse_unknown({"sliding_window": sliding_window, "dropout": dropout or None})
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    asked = Step(packed_layer, rope, query, key, value, scaling, attention_mask, position_ids, context.backend)
    return attend(asked), None


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
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)


def _causal_and_padding(mask: Tensor | None, new: int, total: int, device: torch.device) -> Tensor | None:
    """The full mask `[B, 1, S, T + S]` that SDPA needs; None where its own causality will do."""
    if new == 1:  # a decode step does not wait for the device
        return mask
    if mask is not None and mask.shape[2] == 1 and mask.all():  # no padding, as transformers itself would have found
        mask = None
    if (mask is not None and mask.shape[2] != 1) or (mask is None and new == total):
        return mask
    causal = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
    return causal[None, None] if mask is None else causal & mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)
