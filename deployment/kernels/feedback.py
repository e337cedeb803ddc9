"""Error feedback of new tokens (quant/feedback.py) on the device, bit for bit: between `encode_kernel` and `store_kernel`.

A program takes some tokens of one KV head, `[D, tokens]`, a token to two threads, so that the channel that is next can be picked
out without asking many; a single token has its channels spread over the threads. Channels lie in the head's order.
The kernel must be compiled without fused multiply-adds: each product and each sum is rounded. append.cu does the same, several times faster.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployment.kernels.encode import OUTLIER, TINY, half, search
from deployment.kernels.side import Codes, Side

TOKENS = 16  # of a program, where there are several: a token of 128 channels is too much for the registers of one thread (Triton 3.7)


@triton.jit(do_not_specialize=["stride_b", "stride_g", "stride_s", "tokens"])
def feedback_kernel(
    x,  # [B, G, S, D] any float
    stride_b,
    stride_g,
    stride_s,
    codes,  # [B, S, C] int16, from `encode_kernel`; outliers stay, all others are found anew
    ranges,  # [B, S, 2] fp16: scale and zero of the token
    targets,  # [B, S, C] fp16: what an outlier is stored as
    scale,  # [C] fp32
    zero,
    width,  # [C] int32
    first_boundary,
    boundaries,
    first_level,
    levels,
    order,  # [G, D] int32
    matrix,  # [G, D, D] fp16, in that order
    tokens,  # S
    G: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,  # D, rounded up
    DYNAMIC: tl.constexpr,
    WIDEST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Codes and targets of TILE tokens of one KV head."""
    tiles = (tokens + TILE - 1) // TILE
    b, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * TILE
    g = tl.program_id(1)
    token, lane = first + tl.arange(0, TILE), tl.arange(0, LANES)
    there = token < tokens
    ok = (lane < D)[:, None] & there[None, :]
    place = tl.load(order + g * D + lane, mask=lane < D, other=0)
    x_at = x + b * stride_b + g.to(tl.int64) * stride_g + token.to(tl.int64)[None, :] * stride_s + place[:, None]
    y = tl.load(x_at, mask=ok, other=0).to(tl.float32)
    row = b * tokens + token
    s = tl.zeros([TILE], tl.float32) + 1
    z = tl.zeros([TILE], tl.float32)
    if DYNAMIC:
        s = tl.load(ranges + row * 2, mask=there, other=1).to(tl.float32)
        z = tl.load(ranges + row * 2 + 1, mask=there, other=0).to(tl.float32)
    for i in range(D):
        now = tl.load(order + g * D + i)
        handed_on = tl.load(matrix + (g.to(tl.int64) * D + i) * D + lane, mask=lane < D, other=0).to(tl.float32)
        channel = g * D + now
        if not DYNAMIC:
            s = tl.load(scale + channel) + tl.zeros([TILE], tl.float32)
            z = tl.load(zero + channel) + tl.zeros([TILE], tl.float32)
        here = (lane == i)[:, None]
        target = tl.sum(tl.where(here, y, 0.0), 0)
        at = row * (G * D) + channel
        kept = tl.load(codes + at, mask=there, other=0) == OUTLIER
        normalised = tl.div_rn(target - z, tl.maximum(s, TINY))
        bits, base = tl.load(width + channel) + tl.zeros([TILE], tl.int32), tl.load(first_boundary + channel)
        found = search(normalised, bits, base, there, boundaries, WIDEST)
        value = tl.load(levels + tl.load(first_level + channel) + found, mask=there, other=0) * s + z
        # stored at once: what comes later changes what has had its turn no more
        tl.store(codes + at, found.to(tl.int16), mask=there & (kept == 0))
        tl.store(targets + at, half(target), mask=there)
        error = target - tl.where(kept, half(target).to(tl.float32), value)
        y -= handed_on[:, None] * error[None, :]


def feed_back(sides: Sequence[Side], found: Sequence[Codes]) -> list[Tensor]:
    """Replace the codes of each side's new tokens `[B, G, S, D]`; returns their targets, `[B, G, S, D]` fp16 each."""
    return [_feed_back(side, codes) for side, codes in zip(sides, found, strict=True)]


def _feed_back(side: Side, found: Codes) -> Tensor:
    packed, x, codes = side.packed, side.x, found.codes
    (batch, heads, tokens, dim), tables, fed = x.shape, packed.tables, packed.feedback
    assert fed is not None
    targets, tile = torch.empty_like(codes, dtype=torch.float16), TOKENS if tokens > 1 else 1
    options: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}
    feedback_kernel[(batch * triton.cdiv(tokens, tile), heads)](
        x, *x.stride()[:3], codes, found.ranges, targets, tables.scale, tables.zero, tables.width, tables.first_boundary, tables.boundaries,
        tables.first_level, tables.levels, fed.order, fed.matrix, tokens, G=heads, D=dim, LANES=max(16, triton.next_power_of_2(dim)),
        DYNAMIC=side.dynamic, WIDEST=tables.widest, TILE=tile, **options,
    )  # fmt: skip
    return targets.unflatten(-1, (heads, dim)).transpose(1, 2)
