"""What attention of many queries needs beside the library's: plain tokens rotated at their positions, and two results put together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployment.kernels.phase import Rotary, cos_sin, first_of_pair, second_of_pair, steps_of

_ROWS = 16  # tokens of a program


def rotated(x: Tensor, positions: Tensor, rotary: Rotary, result: Tensor, scaling: float | None = None) -> Tensor:
    """Rotate `x` `[B, N, S, D]` at `positions` `[B, S]` int64 into `result` `[B, S, N, pitch]`, and return that.

    Queries, which carry `scaling` and the rotary embedding's own factors, are multiplied by both; keys have None.
    """
    batch, heads, tokens, dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    rotate_kernel[(-(-tokens // _ROWS), heads, batch)](
        x,
        *x.stride()[:3],
        positions,
        positions.stride(0),
        rotary.steps,
        rotary.factor,
        1.0 if scaling is None else scaling,
        result,
        *result.stride()[:3],
        tokens,
        D=dim,
        ROTARY_HALF=rotary.half,
        SCALED=scaling is not None,
        ROWS=_ROWS,
        PAIRS=triton.next_power_of_2(dim // 2),
    )
    return result


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    x,  # [B, N, S, D] any float
    x_b,
    x_n,
    x_s,
    positions,  # [B, S] int64; what is padding does not matter
    positions_b,
    steps,  # [D/2, 2] int32, see `Rotary`
    factor,  # [D/2] fp32
    scaling,
    result,  # [B, S, N, pitch] fp16 or fp32
    result_b,
    result_s,
    result_n,
    tokens,  # S
    D: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """ROWS tokens of a head."""
    token, n, b = (
        tl.program_id(0) * ROWS + tl.arange(0, ROWS),
        tl.program_id(1).to(tl.int64),
        tl.program_id(2).to(tl.int64),
    )
    pair = tl.arange(0, PAIRS)
    first, second = first_of_pair(pair, ROTARY_HALF, D // 2), second_of_pair(pair, ROTARY_HALF, D // 2)
    pair_ok = pair < D // 2
    position = tl.load(positions + b * positions_b + token, mask=token < tokens, other=0)
    high, low = steps_of(steps, pair, pair_ok)
    cos, sin = cos_sin(position[:, None], high[None, :], low[None, :])
    at = (x + b * x_b + n * x_n + token.to(tl.int64) * x_s)[:, None]
    ok = (token < tokens)[:, None] & pair_ok[None, :]
    one = tl.load(at + first[None, :], mask=ok, other=0).to(tl.float32)
    two = tl.load(at + second[None, :], mask=ok, other=0).to(tl.float32)
    if SCALED:
        scale = (tl.load(factor + pair, mask=pair_ok, other=0) * scaling)[None, :]
        one, two = one * scale, two * scale
    to = (result + b * result_b + n * result_n + token.to(tl.int64) * result_s)[:, None]
    tl.store(to + first[None, :], (one * cos - two * sin).to(result.dtype.element_ty), mask=ok)
    tl.store(to + second[None, :], (two * cos + one * sin).to(result.dtype.element_ty), mask=ok)


def merged(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two sets of tokens from that over each: (outputs `[B, H, S, D]`, log-sum-exp `[B, H, S]` float32) of both.

    Returns the same, the outputs in float32.
    """
    (batch, heads, tokens, dim), device = one[0].shape, one[0].device
    output = torch.empty(batch, tokens, heads, dim, dtype=torch.float32, device=device).transpose(1, 2)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=device)
    parts = [
        argument for values, sums in (one, two) for argument in (values, *values.stride()[:3], sums, *sums.stride())
    ]
    merge_kernel[(-(-tokens // _ROWS), heads, batch)](
        *parts, output, *output.stride()[:3], lse, tokens, D=dim, ROWS=_ROWS, CHANNELS=triton.next_power_of_2(dim)
    )
    return output, lse


@triton.jit(do_not_specialize=["tokens"])
def merge_kernel(
    one,  # [B, H, S, D] any float
    one_b,
    one_h,
    one_s,
    one_lse,  # [B, H, S] fp32
    one_lse_b,
    one_lse_h,
    one_lse_s,
    two,
    two_b,
    two_h,
    two_s,
    two_lse,
    two_lse_b,
    two_lse_h,
    two_lse_s,
    output,  # [B, H, S, D] fp32
    output_b,
    output_h,
    output_s,
    lse,  # [B, H, S] fp32, contiguous
    tokens,  # S
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """ROWS queries of a head."""
    token, h, b = (
        tl.program_id(0) * ROWS + tl.arange(0, ROWS),
        tl.program_id(1).to(tl.int64),
        tl.program_id(2).to(tl.int64),
    )
    channel, token_ok = tl.arange(0, CHANNELS), token < tokens
    ok = token_ok[:, None] & (channel < D)[None, :]
    a = tl.load(one_lse + b * one_lse_b + h * one_lse_h + token * one_lse_s, mask=token_ok, other=0)
    c = tl.load(two_lse + b * two_lse_b + h * two_lse_h + token * two_lse_s, mask=token_ok, other=0)
    highest = tl.maximum(a, c)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    first, second = tl.exp(a - highest), tl.exp(c - highest)
    total = first + second
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    both = tl.where(seen, highest + tl.log(total), float("-inf"))
    tl.store(lse + (b * tl.num_programs(1) + h) * tokens + token, both, mask=token_ok)
    at = token.to(tl.int64)[:, None]
    x = tl.load(one + b * one_b + h * one_h + at * one_s + channel[None, :], mask=ok, other=0).to(tl.float32)
    y = tl.load(two + b * two_b + h * two_h + at * two_s + channel[None, :], mask=ok, other=0).to(tl.float32)
    mixed = x * (first / total)[:, None] + y * (second / total)[:, None]
    tl.store(output + b * output_b + h * output_h + at * output_s + channel[None, :], mixed, mask=ok)
