"""torch's own attention with log-sum-exp, so that what is attended to may come in parts (merge.py): cuDNN, flash, memory-efficient, or the CPU's.

None of torch's public functions gives the log-sum-exp of all of these; the operators behind `scaled_dot_product_attention` do, and
torch.compile and exported programs rely on their signatures.
"""

from functools import cache

import torch
from torch import Tensor

from deployment.kernels.scratch import PLANNED

_QUERIES = 256  # whose multiples cuDNN is asked for
_MOST_DIM = 128

Part = tuple[Tensor, Tensor]  # outputs `[B, H, S, D]`, log-sum-exp `[B, H, S]` float32


def attend_all(query: Tensor, key: Tensor, value: Tensor) -> Part:
    """Attention without a mask.

    Args:
        query: `[B, H, S, D]` fp16 or fp32, rotated and scaled; D a multiple of 8.
        key: `[B, G, n, D]`, n > 0, in the same dtype, as is `value`.
    """
    if is_planned(query) and key.shape[2] % PLANNED == 0:
        return _cudnn(query, key, value)
    return _others(query, key, value)


def is_planned(query: Tensor) -> bool:
    """Whether cuDNN is to attend, to as many tokens as it plans for (scratch.py)."""
    suits = query.shape[2] % _QUERIES == 0 and query.shape[3] <= _MOST_DIM and query.dtype == torch.float16
    return suits and query.is_cuda and torch.backends.cuda.cudnn_sdp_enabled() and _is_wide(query.device)


@cache
def _is_wide(device: torch.device) -> bool:
    """Whether a GPU is one for which cuDNN is the faster: from Hopper on, but not those of consumers."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _cudnn(query: Tensor, key: Tensor, value: Tensor) -> Part:
    output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=1.0)
    return output, lse.view(query.shape[:3])


def _others(query: Tensor, key: Tensor, value: Tensor) -> Part:
    if query.is_cuda and query.dtype == torch.float16:
        return _flash(query, key, value, causal=False)
    # the H / G queries of a KV head are so many more queries of one head
    folded = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    if query.is_cuda:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(folded, key, value, None, True, scale=1.0)
    else:
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(folded, key, value, 0.0, False, scale=1.0)
    return found[0].reshape(query.shape), found[1][:, :, : folded.shape[2]].reshape(query.shape[:3])


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Part:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=1.0)[:2]


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> list[Part]:
    """Attention of the last S of n tokens to themselves and those before them, in one part or two: `key` and `value` `[B, G, n, D]`."""
    if query.is_cuda and query.dtype == torch.float16:
        return [_flash(query, key, value, causal=True)]  # torch's operator means the last, as `causal_lower_right` does
    before, group = key.shape[2] - query.shape[2], query.shape[1] // key.shape[1]
    parts = [_others(query, key[:, :, :before], value[:, :, :before])] if before else []
    key, value = (x[:, :, before:].repeat_interleave(group, 1) for x in (key, value))
    if not query.is_cuda:
        own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=1.0)
        return [*parts, own]
    output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, True, scale=1.0
    )
    return [*parts, (output, lse[:, :, : query.shape[2]])]
