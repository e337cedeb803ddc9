"""Attention of any queries over packed and plain tokens, in Triton without a word to any particular machine.

It is the readable definition of what decode.cu does, and runs where that does not: without `[cuda]`, for heads, widths and dtypes it has no words for, in
the interpreter. It also takes queries that are just anywhere, or of which the host may not know how much they see, since a graph is captured.

A program takes some rows (queries x heads) of a KV head through a part of a segment, 64 tokens at a time, with a running softmax. Parts are put
together by their log-sum-exp.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployment.kernels.packed import DenseSegment, PackedSegment, Segment
from deployment.kernels.phase import Rotary
from deployment.kernels.schedule import multiprocessors, parts_of
from deployment.kernels.unpack import block_angles, decoded, key_halves, pairs_of, put_outliers
from deployment.kernels.unpacking import page_kind, page_tensors
from quant.storage import BLOCK_TOKENS

_ACCUMULATED = 8192  # numbers of a program's output, which stay in registers
_PROGRAMS = 2  # at once, of a multiprocessor


@dataclass(frozen=True)
class Asked:
    """Queries `[B, S, H, pitch]` fp16 or fp32, rotated and scaled, and what they attend to; a pitch is D or more, zeros behind it.

    `positions` `[B, S]` int64 are negative for queries that see nothing, which get zeros.
    """

    query: Tensor
    positions: Tensor
    segments: Sequence[Segment]
    rotary: Rotary
    kv_heads: int
    head_dim: int


def attend(asked: Asked) -> Tensor:
    """Causal attention over all segments, `[B, S, H, D]` float32."""
    query, heads, dim = asked.query, asked.kv_heads, asked.head_dim
    batch, new, group = len(query), query.shape[1], query.shape[2] // heads
    pairs, channels = (max(16, triton.next_power_of_2(size)) for size in (dim // 2, dim))
    rows = max(16, min(triton.next_power_of_2(new * group), _ACCUMULATED // channels))
    tiles = -(-new * group // rows)
    together = multiprocessors(query.device) * _PROGRAMS
    segments = [segment for segment in asked.segments if segment.tokens]
    parts = [parts_of(segment.tokens, batch * heads * tiles, together) for segment in segments]
    outputs = query.new_empty(sum(parts), batch, heads, new * group, dim, dtype=torch.float32)
    weights = query.new_empty(sum(parts), batch, heads, new * group, 1, dtype=torch.float32)
    first = 0
    for segment, count in zip(segments, parts, strict=True):
        programs = (count, batch * heads, tiles)
        key, value, kinds, block_words = _tensors(segment)
        exact = any(kind[5] for kind in kinds)  # elements that outliers are written over
        scratch = query.new_empty((count * batch * heads * tiles if exact else 1) * BLOCK_TOKENS * dim)
        limited = segment.limits is not None
        attend_kernel[programs](
            query, asked.positions, outputs[first:], weights[first:], key, value, segment.origins, segment.start,
            segment.limits if limited else segment.origins, asked.rotary.steps, asked.rotary.by_token, scratch, new,
            segment.tokens, *block_words, PACKED=isinstance(segment, PackedSegment), LIMITED=limited, KEY=kinds[0], VALUE=kinds[1],
            SHAPE=(heads, dim, asked.rotary.half, pairs, channels), PITCH=query.shape[-1], GROUP=group, ROWS=rows, num_warps=4 if rows < 64 else 8, num_stages=1,
        )  # fmt: skip
        first += count
    if not segments:
        return query.new_zeros(batch, new, heads * group, dim, dtype=torch.float32)
    total = weights.logsumexp(0)
    output = (outputs * (weights - total).exp().nan_to_num(0.0)).sum(0)  # all -inf: nothing is seen
    return output.view(batch, heads, new, group, dim).transpose(1, 2).flatten(2, 3)


def _tensors(
    segment: Segment,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[tuple[int, ...], ...], tuple[int, int]]:
    """(those of keys, of values, their kinds, words of a block); of plain tokens the last two say nothing."""
    if isinstance(segment, DenseSegment):
        return (segment.key.contiguous(),), (segment.value.contiguous(),), ((0,) * 6,) * 2, (0, 0)
    sides = (segment.key, segment.key_page), (segment.value, segment.value_page)
    key, value = (page_tensors(*side) for side in sides)
    kinds = tuple(page_kind(*side) for side in sides)
    return key, value, kinds, (segment.key.order.words, segment.value.order.words)


@triton.jit(do_not_specialize=["shift", "new", "tokens"])
def attend_kernel(
    query,  # [B, S, H, PITCH], rotated and scaled
    positions,  # [B, S] int64
    outputs,  # [parts, B, G, S * GROUP, D] fp32
    weights,  # [parts, B, G, S * GROUP] fp32: log-sum-exp
    key,  # tensors of a page (unpacking.py), or plain tokens [B, G, n, D]
    value,
    origins,  # [B] int64, plus shift: position of the first token
    shift,
    limits,  # [B] int64, positions from here on are not stored, if LIMITED
    steps,
    turn,  # [2, 64, D/2] fp32
    scratch,  # [programs, 64, D]
    new,  # S
    tokens,  # of the segment, n
    key_words,  # of a block
    value_words,
    PACKED: tl.constexpr,
    LIMITED: tl.constexpr,
    KEY: tl.constexpr,  # of the page (unpacking.py), if PACKED
    VALUE: tl.constexpr,
    SHAPE: tl.constexpr,  # G, D, half of the channels that rotate, D / 2 and D rounded up
    PITCH: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of a KV head over a part of a segment."""
    G: tl.constexpr = SHAPE[0]
    D: tl.constexpr = SHAPE[1]
    CHANNELS: tl.constexpr = SHAPE[4]
    ELEMENT: tl.constexpr = query.dtype.element_ty
    stream = tl.program_id(1).to(tl.int64)
    b, g = stream // G, (stream % G).to(tl.int32)
    row, channel = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    first, second, pair_ok = pairs_of(SHAPE)
    row_ok, channel_ok = row < new * GROUP, channel < D
    at = query + ((b * new + row // GROUP) * (G * GROUP) + g * GROUP + row % GROUP)[:, None] * PITCH
    one = tl.load(at + first[None, :], mask=row_ok[:, None] & pair_ok[None, :], other=0)
    two = tl.load(at + second[None, :], mask=row_ok[:, None] & pair_ok[None, :], other=0)
    sees = tl.load(positions + b * new + row // GROUP, mask=row_ok, other=-1)
    begin = tl.load(origins + b) + shift
    stored = tokens + tl.zeros_like(begin)
    if LIMITED:
        stored = tl.minimum(tl.maximum(tl.load(limits + b) - begin, 0), tokens)
    blocks, parts = (tokens + 63) // 64, tl.num_programs(0)
    each = (blocks + parts - 1) // parts
    number = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    own = scratch + (number * tl.num_programs(2) + tl.program_id(2)) * (64 * D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, CHANNELS], tl.float32)
    for block in range(tl.program_id(0) * each, tl.minimum((tl.program_id(0) + 1) * each, (stored + 63) // 64)):
        token = tl.arange(0, 64)
        held = tl.minimum(stored - block * 64, 64).to(tl.int32)
        there, place = token < held, begin + block * 64 + token
        if PACKED:
            a, c = key_halves(key, own, b, g, block, blocks, key_words, held, KEY, SHAPE, D)
            tile = decoded(
                value, b, g, block, blocks, value_words, channel, channel_ok, 0, held, VALUE, SHAPE, CHANNELS
            )
            if VALUE[5]:
                to = own + token[:, None] * D + channel[None, :]
                tl.store(to, tile.to(ELEMENT), mask=channel_ok[None, :])
                put_outliers(value, own, stream, block, blocks, held, D, D)
                tl.debug_barrier()
                tile = tl.load(to, mask=channel_ok[None, :], other=0).to(tl.float32)
                tl.debug_barrier()
        else:
            plain = ((stream * tokens + block * 64 + token) * D)[:, None]
            a = plain_tile(key[0] + plain, there, first, pair_ok)
            c = plain_tile(key[0] + plain, there, second, pair_ok)
            tile = plain_tile(value[0] + plain, there, channel, channel_ok)
        cos, sin = block_angles(begin + block * 64, steps, turn, SHAPE)
        score = tl.dot(one, tl.trans((a * cos - c * sin).to(ELEMENT)), input_precision="ieee")
        score = tl.dot(two, tl.trans((c * cos + a * sin).to(ELEMENT)), score, input_precision="ieee")
        seen = there[None, :] & (place >= 0)[None, :] & (place[None, :] <= sees[:, None])
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing is seen yet
        weight, shrink = tl.exp(score - finite[:, None]), tl.exp(top - finite)
        total = total * shrink + tl.sum(weight, 1)
        output = tl.dot(weight.to(ELEMENT), tile.to(ELEMENT), output * shrink[:, None], input_precision="ieee")
        top = higher
    at = (tl.program_id(0) * tl.num_programs(1) + stream) * (new * GROUP) + row
    total = tl.where(total == 0, 1.0, total)  # nothing is seen, and top is -inf
    tl.store(
        outputs + at[:, None] * D + channel[None, :],
        output / total[:, None],
        mask=row_ok[:, None] & channel_ok[None, :],
    )
    tl.store(weights + at, top + tl.log(total), mask=row_ok)


@triton.jit
def plain_tile(at, there, channel, ok):
    """Some channels of plain tokens `at` `[64, 1]`, fp32; 0 where no token is."""
    return tl.load(at + channel[None, :], mask=there[:, None] & ok[None, :], other=0).to(tl.float32)
