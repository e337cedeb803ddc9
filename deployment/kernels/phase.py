"""Rotary angles that stay exact at any position.

An fp32 angle t * f is off by 0.5 radians at t = 10 million. Only its fraction of a turn matters, though, and that is exact in
integers: with f / 2 pi as a 64-bit fixed-point number F = high * 2^32 + low (in turns, below one),

    phase(t) = (t * high + (t * low) >> 32)  mod 2^32        angle = phase * 2 pi / 2^32, within [-pi, pi)

A key at position t = base + i is rotated by i only, with a table that is the same for every block of 64 tokens; the query
is rotated back by `base` instead: R(base + i) k . q = R(i) k . R(-base) q.

Channels are taken in D/2 pairs. Of R rotary channels the pairs are (p, p + R/2); the remaining ones form pairs, too, of
frequency 0, so that partial rotary embeddings are no special case.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant.storage import BLOCK_TOKENS

_TURN = 2.0**32


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of one kind of layer, as the kernels read it; `half` is R/2.

    Models may scale cos and sin of queries and of keys, by the same number; here queries carry both.
    """

    steps: Tensor  # [D/2, 2] int32, unsigned: turns per token, high and low
    factor: Tensor  # [D/2] float32, on queries
    turn: Tensor  # [2, D/2, 64] float32: cos and sin of the tokens of a block
    by_token: Tensor  # [2, 64, D/2]: the same
    half: int

    @classmethod
    def of(cls, frequencies: Tensor, head_dim: int, attention_scaling: float = 1.0) -> "Rotary":
        """From frequencies `[R/2]` in radians per token; `attention_scaling` is yarn's factor on cos and sin."""
        half, device = len(frequencies), frequencies.device
        radians = torch.zeros(head_dim // 2, dtype=torch.float64, device=device)
        radians[:half] = frequencies.double()
        turns = radians / (2 * math.pi) * _TURN
        high = turns.floor()
        low = ((turns - high) * _TURN).floor()
        angles = radians[:, None] * torch.arange(BLOCK_TOKENS, device=device)
        factor = torch.ones(head_dim // 2, dtype=torch.float32, device=device)
        factor[:half] = attention_scaling**2  # pairs that do not rotate have none
        turn = torch.stack([angles.cos(), angles.sin()]).float()
        steps = torch.stack([_wrapped(high), _wrapped(low)], dim=-1)
        return cls(steps, factor, turn, turn.transpose(1, 2).contiguous(), half)


def _wrapped(unsigned: Tensor) -> Tensor:
    """float64 in [0, 2^32) to the int32 of the same bits."""
    number = unsigned.long()
    return torch.where(number >= 2**31, number - 2**32, number).int()


@triton.jit
def steps_of(steps, pair, ok):
    """(high, low) int32 of pairs, see `Rotary.steps`; 0 where not `ok`."""
    return tl.load(steps + 2 * pair, mask=ok, other=0), tl.load(steps + 2 * pair + 1, mask=ok, other=0)


@triton.jit
def cos_sin(position, high, low):
    """(cos, sin) fp32 of positions (padding has negative ones), within 3e-7 of the exact values; arguments broadcast."""
    t = position.to(tl.int32).to(tl.uint32, bitcast=True)
    turns = t * high.to(tl.uint32, bitcast=True) + tl.umulhi(t, low.to(tl.uint32, bitcast=True))
    # 2^32 more than a negative position stand in t, which `low` turns into once itself
    phase = turns.to(tl.int32, bitcast=True) - tl.where(position < 0, low, 0)
    angle = phase.to(tl.float32) * 1.4629180792671596e-09
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def first_of_pair(pair, ROTARY_HALF: tl.constexpr, HALF: tl.constexpr):
    """Channel of a pair's first half."""
    # all rotate: the compiler is to see that neighbours stay neighbours
    if ROTARY_HALF == HALF:  # noqa: SIM108  (the device language evaluates both sides of a conditional expression)
        channel = pair
    else:
        channel = pair + tl.where(pair < ROTARY_HALF, 0, ROTARY_HALF)
    return channel


@triton.jit
def second_of_pair(pair, ROTARY_HALF: tl.constexpr, HALF: tl.constexpr):
    """Channel of a pair's second half."""
    if ROTARY_HALF == HALF:  # noqa: SIM108  (the device language evaluates both sides of a conditional expression)
        channel = pair + HALF
    else:
        channel = pair + tl.where(pair < ROTARY_HALF, ROTARY_HALF, HALF)
    return channel
