"""Attention over several sets of tokens from that over each, by their log-sum-exp."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from deployment.kernels.library import Part

_NUMBERS = 4096  # of a program's tile
MOST_PARTS = 4  # at once


def merge(parts: Sequence[Part], result: Tensor, total: Tensor | None = None) -> None:
    """Merge up to `MOST_PARTS` parts `[B, H, S, pitch]` into `result` `[B, S, H, D]`, D at most the pitch; zeros where nothing is seen.

    `total` `[B, H, S]` float32, if given, becomes the log-sum-exp of all.
    """
    batch, new, heads, dim = result.shape
    channels = triton.next_power_of_2(dim)
    rows = max(1, _NUMBERS // channels)
    outputs = tuple(output if output.stride(-1) == 1 else output.contiguous() for output, _ in parts)
    weights = tuple(lse for _, lse in parts)
    merge_kernel[(-(-new // rows), heads, batch)](
        outputs, tuple(output.stride()[:3] for output in outputs), weights, tuple(lse.stride() for lse in weights), result,
        result.stride()[:3], result if total is None else total, (0, 0, 0) if total is None else total.stride(), new, D=dim,
        CHANNELS=channels, ROWS=rows, PARTS=len(outputs), TOTAL=total is not None,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def merge_kernel(
    outputs,  # [B, H, S, pitch] each
    output_strides,
    weights,  # [B, H, S] fp32 each: log-sum-exp
    weight_strides,
    result,  # [B, S, H, D]
    result_strides,
    total,  # [B, H, S] fp32
    total_strides,
    tokens,  # S
    D: tl.constexpr,
    CHANNELS: tl.constexpr,  # D, rounded up
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """ROWS queries of a head."""
    token, h = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    channel, there = tl.arange(0, CHANNELS), token < tokens
    ok, token = there[:, None] & (channel < D)[None, :], token.to(tl.int64)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        at = weights[part] + b * weight_strides[part][0] + h * weight_strides[part][1] + token * weight_strides[part][2]
        largest = tl.maximum(largest, tl.load(at, mask=there, other=float("-inf")))
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    whole, acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, CHANNELS], tl.float32)
    for part in tl.static_range(PARTS):
        at = weights[part] + b * weight_strides[part][0] + h * weight_strides[part][1] + token * weight_strides[part][2]
        weight = tl.exp(tl.load(at, mask=there, other=float("-inf")) - shift)
        whole += weight
        at = outputs[part] + b * output_strides[part][0] + h * output_strides[part][1]
        held = tl.load((at + token * output_strides[part][2])[:, None] + channel[None, :], mask=ok, other=0)
        acc += tl.where((weight > 0)[:, None], held.to(tl.float32) * weight[:, None], 0.0)
    acc = acc / tl.where(whole > 0, whole, 1.0)[:, None]
    to = result + b * result_strides[0] + token * result_strides[1] + h * result_strides[2]
    tl.store(to[:, None] + channel[None, :], acc.to(result.dtype.element_ty), mask=ok)
    if TOTAL:
        at = total + b * total_strides[0] + h * total_strides[1] + token * total_strides[2]
        tl.store(at, tl.where(whole > 0, shift + tl.log(tl.where(whole > 0, whole, 1.0)), float("-inf")), mask=there)
