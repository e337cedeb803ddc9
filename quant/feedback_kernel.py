"""The loop of `Feedback.encode` on a GPU in one launch, bit for bit: torch would launch ten kernels for every channel.

A program takes some tokens of one head, channels in the head's order. It must be compiled without fused multiply-adds, since
each product and each sum is rounded. Only `feedback.py` imports this, and only where Triton is.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 32  # of a program
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_FP16_MAX = tl.constexpr(torch.finfo(torch.float16).max)


@triton.jit(do_not_specialize=["tokens"])
def _feedback_kernel(
    y,  # [D, G, N] fp32, changed in place: the targets
    codes,  # [D, G, N] uint8
    exact,  # [D, G, N] bool
    scale,  # [D, G] or [N] fp32
    zero,
    levels,  # [D, G, L] fp32
    boundaries,  # [D, G, L - 1] fp32
    matrix,  # [G, D, D] fp16
    tokens,  # N
    G: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,  # D, rounded up
    LEVELS: tl.constexpr,  # L
    BITS: tl.constexpr,  # of L - 1
    DYNAMIC: tl.constexpr,  # scale and zero are those of tokens
    OUTLIERS: tl.constexpr,
    TILE: tl.constexpr,
):
    g = tl.program_id(1)
    token, lane = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, LANES)
    there = token < tokens
    ok = (lane < D)[:, None] & there[None, :]
    at = (lane * G + g).to(tl.int64)[:, None] * tokens + token[None, :]
    held = tl.load(y + at, mask=ok, other=0)
    s, z = tl.full([TILE], 1, tl.float32), tl.zeros([TILE], tl.float32)
    if DYNAMIC:
        s, z = tl.load(scale + token, mask=there, other=1), tl.load(zero + token, mask=there, other=0)
    for i in range(D):
        channel = i * G + g
        if not DYNAMIC:
            s = tl.load(scale + channel) + tl.zeros([TILE], tl.float32)
            z = tl.load(zero + channel) + tl.zeros([TILE], tl.float32)
        target = tl.sum(tl.where((lane == i)[:, None], held, 0.0), 0)
        normalised = tl.div_rn(target - z, tl.maximum(s, _TINY))
        code = tl.zeros([TILE], tl.int32)
        for bit in tl.static_range(BITS):
            probe = code + (1 << (BITS - 1 - bit))
            boundary = tl.load(boundaries + channel * (LEVELS - 1) + probe - 1, mask=probe < LEVELS, other=float("inf"))
            code = tl.where(boundary < normalised, probe, code)
        value = tl.load(levels + channel * LEVELS + code) * s + z
        here = channel.to(tl.int64) * tokens + token
        if OUTLIERS:
            stored = tl.minimum(tl.maximum(target, -_FP16_MAX), _FP16_MAX).to(tl.float16).to(tl.float32)
            value = tl.where(tl.load(exact + here, mask=there, other=0) != 0, stored, value)
        tl.store(codes + here, code.to(tl.uint8), mask=there)
        # the matrix is strictly upper triangular: what has had its turn stays
        handed_on = tl.load(matrix + (g.to(tl.int64) * D + i) * D + lane, mask=lane < D, other=0).to(tl.float32)
        held -= (target - value)[None, :] * handed_on[:, None]
    tl.store(y + at, held, mask=ok)


def feed_back(
    y: Tensor, exact: Tensor | None, scale: Tensor, zero: Tensor, levels: Tensor, boundaries: Tensor, matrix: Tensor
) -> tuple[Tensor, Tensor]:
    """(codes uint8, targets float32), both `[D, G, N]`, of `y` `[D, G, N]` float32, which may become the targets.

    Args:
        exact: mask of the elements kept exactly, `[D, G, N]`; None for none.
        scale, zero: float32, `[D, G, 1]` or `[1, 1, N]`.
        levels, boundaries: of every channel, `[D, G, L]` and `[D, G, L - 1]` float32.
        matrix: `[G, D, D]` fp16.
    """
    y, (dim, heads, tokens) = y.contiguous(), y.shape
    codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    options: dict[str, Any] = {"num_warps": max(1, dim // 32), "enable_fp_fusion": False}
    tensors = (y, codes, codes if exact is None else exact, scale, zero, levels, boundaries, matrix)
    with torch.cuda.device_of(y):
        _feedback_kernel[(triton.cdiv(tokens, _TOKENS), heads)](
            *(tensor.contiguous() for tensor in tensors),
            tokens,
            G=heads,
            D=dim,
            LANES=triton.next_power_of_2(dim),
            LEVELS=levels.shape[-1],
            BITS=(levels.shape[-1] - 1).bit_length(),
            DYNAMIC=scale.shape[0] == 1,
            OUTLIERS=exact is not None,
            TILE=_TOKENS,
            **options,
        )
    return codes, y
