"""Plain tokens, rotated at their positions: queries, and keys that are not packed."""

import triton
import triton.language as tl
from torch import Tensor

from deployment.kernels.phase import Rotary, cos_sin, first_of_pair, second_of_pair, steps_of

_ROWS = 16  # tokens of a program


def rotated(x: Tensor, positions: Tensor, rotary: Rotary, result: Tensor, scaling: float | None = None) -> Tensor:
    """Rotate `x` `[B, N, S, D]` at `positions` `[B, S]` int64 into `result` `[B, S, N, pitch]`, and return that.

    Positions `[B]` are those of the first tokens, which the others follow.
    Queries, which carry `scaling` and the rotary embedding's own factors, are multiplied by both; keys have None.
    """
    batch, heads, tokens, dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    rotate_kernel[(-(-tokens // _ROWS), heads, batch)](
        x, *x.stride()[:3], positions, positions.stride(0), positions.stride(1) if positions.ndim == 2 else 0, rotary.steps, rotary.factor,
        1.0 if scaling is None else scaling, result, *result.stride()[:3], tokens, D=dim, ROTARY_HALF=rotary.half,
        SCALED=scaling is not None, COUNTED=positions.ndim == 1, ROWS=_ROWS, PAIRS=triton.next_power_of_2(dim // 2),
    )  # fmt: skip
    return result


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    x,  # [B, N, S, D] any float
    x_b,
    x_n,
    x_s,
    positions,  # [B, S] int64; what is padding does not matter
    positions_b,
    positions_s,
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
    COUNTED: tl.constexpr,  # whether a position is that of the first token
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """ROWS tokens of a head."""
    token, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    first, second = first_of_pair(pair, ROTARY_HALF, D // 2), second_of_pair(pair, ROTARY_HALF, D // 2)
    pair_ok = pair < D // 2
    position = tl.load(positions + b * positions_b + token * positions_s, mask=token < tokens, other=0)
    if COUNTED:
        position += token
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
