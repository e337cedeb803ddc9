"""Attention of many queries over packed segments: unpack a bounded stretch, attend to it, go on.

`attend_many` has the contract of `attend_packed` (packed.py), which hands over to it. One query reads every block once, and so
should never write it down unpacked; but hundreds share what it costs to unpack a block (unpack.py), and what is left to do
is plain attention over plain tensors (flash.py). All stretches go through the same memory, of `SCRATCH_BYTES` at most,
however long the context is. Nothing waits for the device: how much is stored only programs know, and end early.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from deployment.kernels.flash import finish_kernel, flash_kernel, rotate_kernel
from deployment.kernels.packed import Segment
from deployment.kernels.phase import Rotary
from deployment.kernels.schedule import multiprocessors
from deployment.kernels.unpacking import Unpacking
from quant.storage import BLOCK_TOKENS

SCRATCH_BYTES = (
    128 * 2**20
)  # of unpacked keys and values together; with less, launching would take longer than computing
_LOG2_E = math.log2(math.e)
_WAVES = 2  # programs per multiprocessor
_MAX_SPLITS = 32
_ROWS = 16  # queries of a program that rotates or finishes them


@dataclass(frozen=True)
class Tile:
    """How many queries and tokens a program of `flash_kernel` multiplies at a time, and how it is compiled."""

    rows: int
    tokens: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int, dim: int, precise: bool, wide: bool) -> "Tile":
        """For `rows` queries per KV head. `wide` GPUs (Hopper on) multiply from shared memory, of which they have 227 KB.

        Chosen so that no register spills (sm_80, sm_90; single precision has no tensor cores, and is slow anyway).
        """
        most = min(128, max(16, triton.next_power_of_2(rows)))
        if precise:
            return cls(min(most, 64 if dim <= 64 else 32), 32, 8, 1)
        if dim > 128:
            return cls(min(most, 64), 64 if wide else 32, 8, 2)
        if wide and most == 128:
            return cls(most, 128, 8, 2)
        return cls(most, 64, 8 if most == 128 else 4, 3)


@dataclass(frozen=True)
class _State:
    """What is known of all queries so far; `room` rows per sequence and KV head, a multiple of a tile's."""

    rotated: Tensor
    maxima: Tensor
    sums: Tensor
    outputs: Tensor
    room: int
    splits: int

    @classmethod
    def of(cls, streams: int, rows: int, tile: Tile, query: Tensor, dtype: torch.dtype) -> "_State":
        tiles, dim = -(-rows // tile.rows), query.shape[-1]
        room = tiles * tile.rows
        splits = max(1, min(_MAX_SPLITS, multiprocessors(query.device) * _WAVES // (streams * tiles)))
        new = query.new_zeros
        return cls(
            rotated=torch.empty(streams, room, dim, dtype=dtype, device=query.device),
            maxima=query.new_full((splits, streams, room), -torch.inf, dtype=torch.float32),
            sums=new(splits, streams, room, dtype=torch.float32),
            outputs=new(splits, streams, room, dim, dtype=torch.float32),
            room=room,
            splits=splits,
        )


def attend_many(
    query: Tensor, positions: Tensor, segments: Sequence[Segment], rotary: Rotary, scaling: float, kv_heads: int
) -> Tensor:
    """Causal softmax attention over segments.

    Args:
        query: `[B, H, S, D]`, pre-RoPE; query head h reads KV head h // (H / G).
        positions: `[B, S]` int64 of the queries; a query sees the tokens up to its own position, one at -1 none.
        scaling: factor on the scores.

    Returns `[B, S, H, D]` in the query's dtype.
    """
    batch, heads, new, dim = query.shape
    if query.stride(-1) != 1:
        query = query.contiguous()
    group, streams = heads // kv_heads, batch * kv_heads
    precise = query.dtype == torch.float32
    operand = torch.float32 if precise else torch.float16
    tile = Tile.of(new * group, dim, precise, _is_wide(query.device))
    state = _State.of(streams, new * group, tile, query, operand)
    shape = {"G": kv_heads, "GROUP": group, "D": dim}
    rotate_kernel[(state.room // _ROWS, streams)](
        query,
        *query.stride()[:3],
        positions,
        rotary.steps,
        rotary.factor,
        scaling * _LOG2_E,
        state.rotated,
        new,
        state.room,
        **shape,
        ROTARY_HALF=rotary.half,
        ROWS=_ROWS,
        PAIRS=triton.next_power_of_2(dim // 2),
    )
    _walk(state, positions, segments, rotary, tile, shape)
    result = torch.empty(batch, new, heads, dim, dtype=query.dtype, device=query.device)
    finish_kernel[(-(-new * group // _ROWS), streams)](
        state.maxima,
        state.sums,
        state.outputs,
        result,
        new,
        state.room,
        state.splits,
        **shape,
        ROWS=_ROWS,
        CHANNELS=triton.next_power_of_2(dim),
    )
    return result


def _walk(
    state: _State, positions: Tensor, segments: Sequence[Segment], rotary: Rotary, tile: Tile, shape: dict[str, int]
) -> None:
    """Unpack all segments stretch by stretch, and bring the state up to date with every one of them."""
    batch, new = positions.shape
    heads, dim = shape["G"], shape["D"]
    blocks = stretch_blocks([segment.tokens for segment in segments], batch * heads * dim * state.rotated.itemsize)
    room = -(-blocks * BLOCK_TOKENS // tile.tokens) * tile.tokens
    key, value = state.rotated.new_empty(2, batch, heads, room, dim)
    turn = rotary.turn.transpose(1, 2).contiguous()
    tiles = state.room // tile.rows
    for segment in segments:
        held = -(-segment.tokens // BLOCK_TOKENS)
        unpacking = Unpacking.of(segment, rotary, turn, key, value)
        for first in range(0, held, blocks):
            unpacking.run(first, min(blocks, held - first))
            flash_kernel[(tiles * state.splits, batch * heads)](
                state.rotated,
                positions,
                segment.origins,
                segment.start + first * BLOCK_TOKENS,
                segment.origins if segment.limits is None else segment.limits,
                min(blocks * BLOCK_TOKENS, segment.tokens - first * BLOCK_TOKENS),
                key,
                value,
                state.maxima,
                state.sums,
                state.outputs,
                new,
                room,
                tiles,
                state.splits,
                **shape,
                ROWS=tile.rows,
                TOKENS=tile.tokens,
                CHANNELS=max(16, triton.next_power_of_2(dim)),
                LIMITED=segment.limits is not None,
                PRECISE=state.rotated.dtype == torch.float32,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


def stretch_blocks(tokens: Sequence[int], bytes_per_token: int) -> int:
    """Blocks of a stretch: of all that the longest segment needs as many as `SCRATCH_BYTES` hold, one at least."""
    most = max(1, SCRATCH_BYTES // (2 * bytes_per_token * BLOCK_TOKENS))
    return min(most, max([-(-held // BLOCK_TOKENS) for held in tokens], default=1))


@cache
def _is_wide(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
