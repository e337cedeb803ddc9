"""Put together what was computed of parts of the context, the flash-decoding reduction, and of a few plain tokens."""

import triton
import triton.language as tl

from deployment.kernels.few import attend_few
from deployment.kernels.phase import first_of_pair, second_of_pair, steps_of

# numbers that change from call to call must not make the compiler specialise
_RUNTIME = ["new", "parts", "tiles", "batch", "query_stride_b", "query_stride_h", "query_stride_s"]
_RUNTIME += [f"{place}_{name}" for place in ("front", "back") for name in ("shift", "tokens")]


@triton.jit(do_not_specialize=_RUNTIME)
def combine_kernel(
    outputs,  # [parts, B, G, tiles, ROWS, D] fp32
    maxima,  # [parts, B, G, tiles, ROWS] fp32
    sums,
    result,  # [B, S, H, D] any float
    query,  # [B, H, S, D] any float, pre-RoPE
    query_stride_b,
    query_stride_h,
    query_stride_s,
    positions,  # [B, S] int64, of the queries; negative for padding
    steps,  # [D/2, 2] int32, see `Rotary`
    factor,  # [D/2] fp32
    scaling,  # of the scores, times log2 e
    front_key,  # [B, G, front_tokens, D] any float, pre-RoPE
    front_value,
    front_stride_b,
    front_stride_g,
    front_stride_t,
    front_origins,  # [B] int64, plus shift: position of the first token
    front_limits,  # [B] int64, positions from here on are not stored
    front_shift,
    front_tokens,  # 0: there is none
    back_key,
    back_value,
    back_stride_b,
    back_stride_g,
    back_stride_t,
    back_origins,
    back_limits,
    back_shift,
    back_tokens,
    new,  # S
    parts,
    tiles,
    batch,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    FRONT_LIMITED: tl.constexpr,
    BACK_LIMITED: tl.constexpr,
    PARTS: tl.constexpr,  # put together at once
    LIFT: tl.constexpr,  # of the weights, see `split_kernel`
    QUICK: tl.constexpr,
):
    """One query of one head: the parts' outputs weighted by 2^(their maximum - the maximum of all)."""
    GROUP: tl.constexpr = H // G
    head, rest = tl.program_id(0) % H, tl.program_id(0) // H
    token, b = rest % new, rest // new
    number = token * GROUP + head % GROUP
    row = ((b * G + head // GROUP) * tiles).to(tl.int64) * ROWS + number  # tiles are ROWS rows each
    per_part = (batch * G * tiles).to(tl.int64) * ROWS
    channel = tl.arange(0, CHANNELS)
    highest, total = float("-inf"), 0.0
    output = tl.zeros([CHANNELS], tl.float32)
    for part0 in range(0, parts, PARTS):
        part = part0 + tl.arange(0, PARTS)
        ok = part < parts
        at = row + part * per_part
        maximum = tl.load(maxima + at, mask=ok, other=float("-inf"))
        ok = ok & (maximum > float("-inf"))
        share = tl.load(sums + at, mask=ok, other=0)
        values = tl.load(
            outputs + at[:, None] * D + channel[None, :], mask=ok[:, None] & (channel < D)[None, :], other=0
        )
        raised = tl.maximum(highest, tl.max(maximum, 0))
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        shrink, own = tl.exp2(highest - reference), tl.exp2(maximum - reference)
        output = output * shrink + tl.sum(values * own[:, None], 0)
        total = total * shrink + tl.sum(share * own, 0)
        highest = raised
    if front_tokens + back_tokens > 0:
        pair = tl.arange(0, PAIRS)
        pair_ok = pair < D // 2
        first, second = first_of_pair(pair, ROTARY_HALF, D // 2), second_of_pair(pair, ROTARY_HALF, D // 2)
        query_at = query + b.to(tl.int64) * query_stride_b + head.to(tl.int64) * query_stride_h
        query_at += token.to(tl.int64) * query_stride_s
        scale = tl.load(factor + pair, mask=pair_ok, other=0) * scaling
        query_a = tl.load(query_at + first, mask=pair_ok, other=0).to(tl.float32) * scale
        query_b = tl.load(query_at + second, mask=pair_ok, other=0).to(tl.float32) * scale
        position = tl.load(positions + b * new + token)
        angles = steps_of(steps, pair, pair_ok)
        front = (front_key, front_value, front_stride_b, front_stride_g, front_stride_t, front_tokens)
        back = (back_key, back_value, back_stride_b, back_stride_g, back_stride_t, back_tokens)
        front_from = tl.load(front_origins + b) + front_shift
        back_from = tl.load(back_origins + b) + back_shift
        front_to, back_to = position + 1, position + 1
        if FRONT_LIMITED:
            front_to = tl.load(front_limits + b)
        if BACK_LIMITED:
            back_to = tl.load(back_limits + b)
        for side in tl.static_range(2):
            output, highest, total = attend_few(
                (output, highest, total),
                (query_a, query_b),
                position,
                front if side == 0 else back,
                front_from if side == 0 else back_from,
                front_to if side == 0 else back_to,
                (b, head // GROUP),
                angles,
                (first, second, pair_ok),
                D,
                CHANNELS,
                QUICK,
                LIFT,
            )
    output = output / tl.where(total == 0, 1.0, total)
    to = result + ((b * new + token).to(tl.int64) * H + head) * D + channel
    tl.store(to, output.to(result.dtype.element_ty), mask=channel < D)
