"""Error feedback (feedback.py) on a GPU in one launch, bit for bit: of a simulation, and of the packed cache's new tokens (deployment/kernels).

A program takes some tokens of one head, `[D, tokens]`, a token to two threads, so that the channel that is next can be picked
out without asking many; a single token has its channels spread over the threads. Channels lie in the head's order.
The kernel must be compiled without fused multiply-adds: each product and each sum is rounded. Imported only where Triton is.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # of a program, where there are several: a token of 128 channels is too much for the registers of one thread (Triton 3.7)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
OUTLIER = tl.constexpr(256)  # its code until it is stored: one that no code of 8 bits is
_FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def half(x):
    """fp16, saturating; as `as_stored`."""
    return tl.minimum(tl.maximum(x, -_FP16_MAX), _FP16_MAX).to(tl.float16)


@triton.jit
def search(normalised, bits, base, ok, boundaries, WIDEST: tl.constexpr):
    """int32 codes of channels of so many `bits`: how many of the boundaries, which begin at `base`, lie below."""
    code = tl.zeros_like(bits)
    for level in tl.static_range(WIDEST):
        step = tl.where(bits > WIDEST - 1 - level, 1 << (WIDEST - 1 - level), 0)
        probe = code + step
        boundary = tl.load(boundaries + base + probe - 1, mask=ok & (step > 0), other=float("inf"))
        code = tl.where(normalised > boundary, probe, code)
    return code


@triton.jit(do_not_specialize=["stride_b", "stride_g", "stride_s", "tokens"])
def feedback_kernel(
    x,  # [B, G, S, D] any float
    stride_b,
    stride_g,
    stride_s,
    codes,  # [B, S, C] int16: OUTLIER or anything
    ranges,  # [B, S, 2] fp16 or fp32: scale and zero of the token, if DYNAMIC
    targets,  # [B, S, C] fp32, or fp16 as an outlier is stored
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
    MARKED: tl.constexpr,  # whether outliers stay marked as such
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
        if MARKED:
            tl.store(codes + at, found.to(tl.int16), mask=there & (kept == 0))
        else:
            tl.store(codes + at, found.to(tl.int16), mask=there)
        if targets.dtype.element_ty == tl.float16:
            tl.store(targets + at, half(target), mask=there)
        else:
            tl.store(targets + at, target, mask=there)
        error = target - tl.where(kept, half(target).to(tl.float32), value)
        y -= handed_on[:, None] * error[None, :]


def launch(
    x: Tensor,
    codes: Tensor,
    ranges: Tensor | None,
    targets: Tensor,
    tables: tuple[Tensor, ...],
    widest: int,
    marked: bool,
) -> None:
    """Codes and targets of `x` `[B, G, S, D]`; `tables` are the kernel's from `scale` on."""
    batch, heads, tokens, dim = x.shape
    tile = TOKENS if tokens > 1 else 1
    options: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}
    feedback_kernel[(batch * triton.cdiv(tokens, tile), heads)](
        x, *x.stride()[:3], codes, targets if ranges is None else ranges, targets, *tables, tokens, G=heads, D=dim,
        LANES=max(16, triton.next_power_of_2(dim)), DYNAMIC=ranges is not None, WIDEST=widest, MARKED=marked, TILE=tile, **options,
    )  # fmt: skip


def feed_back(
    x: Tensor,
    outliers: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor,
    boundaries: Tensor,
    order: Tensor,
    matrix: Tensor,
) -> tuple[Tensor, Tensor]:
    """(codes uint8, targets float32), both `[N, C]`, of `x` `[N, C]` float32.

    Args:
        outliers: mask of the elements kept exactly, `[N, C]`; None for none.
        scale, zero: float32, `[C]` or `[N, 1]`.
        levels, boundaries: of every channel, `[C, L]` and `[C, L - 1]` float32, L a power of two.
        order, matrix: as of `Feedback`.
    """
    (tokens, channels), (heads, dim), count = x.shape, order.shape, levels.shape[1]
    x, widest = x.contiguous(), count.bit_length() - 1
    codes = torch.zeros(x.shape, dtype=torch.int16, device=x.device)
    if outliers is not None:
        codes.masked_fill_(outliers, OUTLIER.value)
    targets, number = torch.empty_like(x), torch.arange(channels, dtype=torch.int32, device=x.device)
    ranges = torch.cat([scale, zero], dim=1) if scale.ndim == 2 else None
    books = (torch.full_like(number, widest), number * (count - 1), boundaries, number * count, levels)
    tables = tuple(table.contiguous() for table in (scale, zero, *books, order.int(), matrix))
    with torch.cuda.device_of(x):
        launch(x.view(1, tokens, heads, dim).transpose(1, 2), codes, ranges, targets, tables, widest, marked=False)
    return codes.to(torch.uint8), targets
