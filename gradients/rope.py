"""RoPE outside the model: its cos and sin tables, and how they rotate keys and gradients.

Keys are recorded before it (KVQuant, section 3.2). What would have been recorded after it follows from the tables.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradients.models import cached_layers, decoder
from gradients.placement import input_device


def rope_tables(model: PreTrainedModel, tokens: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) `[S, R]` float32 of positions 0 to S - 1 in the layers whose whole past is cached.

    R, the rotary dimension, may be less than D; attention scaling (yarn, longrope) is included.
    """
    rotary = decoder(model).rotary_emb
    kind: dict[str, Any] = {}
    if isinstance(rotary.rope_type, dict):
        kind["layer_type"] = decoder(model).layers[cached_layers(model.config)[0]].self_attn.layer_type
    device = input_device(model)
    positions = torch.arange(tokens, device=device)[None]
    with torch.no_grad():
        cos, sin = rotary(torch.empty(0, device=device), positions, **kind)
    return cos[0].float().cpu(), sin[0].float().cpu()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (d, d + R/2) of `x` `[B, heads, S, D]`; tables are `[B, S, R]`, channels from R on stay."""
    return _mix(x, cos, sin, -1.0)


def rotate_squares(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What rotating keys does to squared gradients `x` `[B, heads, S, D]` if the two of a pair are uncorrelated.

    Where attention scaling multiplies the keys, it divides their gradients.
    """
    scaling = cos.square() + sin.square()  # squared
    return _mix(x, cos.square() / scaling.square(), sin.square() / scaling.square(), 1.0)


def _mix(x: Tensor, own: Tensor, other: Tensor, sign: float) -> Tensor:
    rotary = own.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    mixed = turned * own[:, None] + torch.cat([sign * second, first], dim=-1) * other[:, None]
    return mixed if rotary == x.shape[-1] else torch.cat([mixed, rest], dim=-1)
