"""One token more in the recent window, keys and values in one launch: what the slots hold moves one slot to the front.

Source and target may be the same memory, which is what a CUDA graph needs. A program moves one KV head of one sequence, so
many slots at a time, and reads them all before it writes any.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

_SLOTS = 64  # moved at a time


def shift(sources: Sequence[Tensor], chunk: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Write all slots but the first of keys and values `sources`, and one new token behind them, to `targets`.

    Sources and targets are contiguous `[B, G, N + 1, D]`, the chunk is `[B, G, 1, D]` of the same dtype.
    """
    batch, heads, slots, dim = sources[0].shape
    key, value = (states if states.stride(-1) == 1 else states.contiguous() for states in chunk)
    shift_kernel[(2 * batch * heads,)](
        *(sources[0], key, targets[0], *key.stride()[:2]),
        *(sources[1], value, targets[1], *value.stride()[:2]),
        batch * heads,
        heads,
        slots,
        D=dim,
        LANES=triton.next_power_of_2(dim),
        SLOTS=_SLOTS,
        num_warps=8,
    )


@triton.jit
def move_head(
    source,
    new,
    target,
    stride_b,
    stride_g,
    stream,
    heads,
    slots,
    D: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One KV head of one sequence."""
    lane = tl.arange(0, LANES)
    token = tl.load(new + stream // heads * stride_b + stream % heads * stride_g + lane, mask=lane < D)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)[:, None]
        at = (stream * slots + slot) * D + lane[None, :]
        there = lane[None, :] < D
        moved = tl.load(source + at + D, mask=there & (slot < slots - 1))
        moved = tl.where(slot == slots - 1, token[None, :], moved)
        tl.debug_barrier()  # all have read what some are about to overwrite
        tl.store(target + at, moved, mask=there & (slot < slots))


@triton.jit(do_not_specialize=["key_stride_b", "key_stride_g", "value_stride_b", "value_stride_g", "streams"])
def shift_kernel(
    key_source,  # [B, G, N + 1, D]
    key_new,  # [B, G, 1, D]
    key_target,
    key_stride_b,
    key_stride_g,
    value_source,
    value_new,
    value_target,
    value_stride_b,
    value_stride_g,
    streams,  # B * G
    heads,
    slots,
    D: tl.constexpr,
    LANES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Keys, then values."""
    program = tl.program_id(0).to(tl.int64)
    if program < streams:
        move_head(key_source, key_new, key_target, key_stride_b, key_stride_g, program, heads, slots, D, LANES, SLOTS)
    else:
        stream = program - streams
        move_head(
            value_source, value_new, value_target, value_stride_b, value_stride_g, stream, heads, slots, D, LANES, SLOTS
        )
