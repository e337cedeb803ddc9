"""Attention of many queries over packed segments: unpack a bounded stretch, hand it to the library, go on; put the parts together.

`attend_many` has the contract of `attend_packed` (packed.py), which hands over to it. One query reads every block once, and so
should never write it down unpacked; but hundreds share what it costs to unpack a block (unpack.py), and what is left to do
is plain attention over plain tensors (library.py). All stretches go through the same memory, bounded (scratch.py),
however long the context is.

Where the host knows how long a sequence is, it is attended to in parts that need no mask: stretches of the past, the last one with the sinks
behind it, and the chunk, causally. Otherwise (while a graph is captured, if queries are few and the past is short, or they are just anywhere)
portable.py does it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from deployment.kernels.library import Part, attend_all, attend_causally, is_planned
from deployment.kernels.merge import MOST_PARTS, merge
from deployment.kernels.packed import DenseSegment, Known, PackedSegment, Segment
from deployment.kernels.phase import Rotary
from deployment.kernels.plain import rotated
from deployment.kernels.portable import Asked
from deployment.kernels.portable import attend as attend_portably
from deployment.kernels.repeated import Repeated, repeated
from deployment.kernels.scratch import FEW, LONG, planned_lengths, room_of, stretch_tokens, whole_stretches
from deployment.kernels.unpacking import unpack
from quant.storage import BLOCK_TOKENS

_EVEN = 8  # channels: the library wants whole multiples


def attend_many(
    query: Tensor,
    positions: Tensor,
    segments: Sequence[Segment],
    rotary: Rotary,
    scaling: float,
    kv_heads: int,
    known: Sequence[Known] | None = None,
) -> Tensor:
    """As `attend_packed` (packed.py)."""
    batch, heads, new, dim = query.shape
    least = LONG // (kv_heads * dim) if new * heads // kv_heads <= FEW else 0
    if known is None or any(row.stored not in row.ends(new) or row.stored < least for row in known):
        turned = _turned(query, positions, rotary, scaling)
        return attend_portably(Asked(turned, positions.contiguous(), segments, rotary, kv_heads, dim)).to(query.dtype)
    asked = _Asked(query, positions, segments, rotary, scaling, kv_heads)
    alike = all(row == known[0] for row in known)
    if alike and not known[0].pad:
        return _Rows(asked, 0, batch, known[0]).attend()
    output = query.new_zeros(batch, new, heads, dim)
    for first, row in enumerate(known[:1] if alike else known):
        rows = batch if alike else 1
        if row.pad < new:
            output[first : first + rows, row.pad :] = _Rows(asked, first, rows, row).attend()
    return output


def _turned(query: Tensor, positions: Tensor, rotary: Rotary, scaling: float) -> Tensor:
    """Queries `[B, S, H, pitch]`, rotated and scaled, in the dtype of the operands; zeros behind D."""
    batch, heads, new, dim = query.shape
    pitch = _pitch(dim)
    turned = query.new_empty(batch, new, heads, pitch, dtype=_operand(query))
    return rotated(query, positions, rotary, turned if pitch == dim else turned.zero_(), scaling)


def _pitch(dim: int) -> int:
    return -(-dim // _EVEN) * _EVEN


def _operand(query: Tensor) -> torch.dtype:
    return torch.float32 if query.dtype == torch.float32 else torch.float16


@dataclass(frozen=True)
class _Asked:
    query: Tensor
    positions: Tensor
    segments: Sequence[Segment]
    rotary: Rotary
    scaling: float
    kv_heads: int


class _Rows:
    """Attention of some sequences that are equally long and equally padded."""

    def __init__(self, asked: _Asked, first: int, rows: int, row: Known) -> None:
        self.asked, self.which, self.row0, self.row = asked, slice(first, first + rows), first, row
        self.positions, segments = asked.positions[self.which, row.pad :], asked.segments
        self.rotary, self.heads = asked.rotary, asked.kv_heads
        self.new, self.pitch = asked.query.shape[2] - row.pad, _pitch(asked.query.shape[3])
        self.packed = [segment for segment in segments if isinstance(segment, PackedSegment)]
        dense = [segment for segment in segments if isinstance(segment, DenseSegment)]
        self.sinks = next((segment for segment in dense if segment.limits is not None), None)
        self.chunk = next((segment for segment in dense if segment.limits is None), None)
        self.parts: list[Part] = []
        self.padded = any(segment.key.shape[-1] < self.pitch for segment in dense) or any(
            segment.key.head_dim < self.pitch for segment in self.packed
        )

    @cached_property
    def query(self) -> Tensor:
        """`[R, H, S, pitch]`, rotated and scaled."""
        query = self.asked.query[self.which, :, self.row.pad :]
        return _turned(query, self.positions, self.rotary, self.asked.scaling).transpose(1, 2)

    def attend(self) -> Tensor:
        """Outputs `[R, S, H, D]`: the past a stretch at a time, with the last one the rest.

        Of that, sinks before it and the chunk behind it, what no plan takes goes with the chunk.
        """
        row, new, rows = self.row, self.new, self.which.stop - self.which.start
        start = self.packed[0].start if self.packed else row.stored
        sinks = min(start, row.stored)  # of the past or, where the chunk is stored, of the chunk
        size = rows * self.heads * self.pitch * _operand(self.asked.query).itemsize  # of a token's keys
        stretch, past = stretch_tokens(size), max(0, row.before - start)
        whole = whole_stretches(stretch, past)
        shared = self._shared()
        key, value = shared.kept(lambda: self._scratch(rows, room_of(stretch, past, sinks + new, rows)))
        for number in range(whole):
            begin = start + number * stretch
            self._unpack(begin, begin + stretch, key, value, 0)
            shared.do(partial(self._more, key, value, stretch))
        begin, held = start + whole * stretch, row.before - whole * stretch
        self._put_sinks(sinks, key, value)
        self._unpack(begin, row.stored, key, value, sinks)
        return shared.do(partial(self._last, key, value, held))

    def _shared(self) -> Repeated:
        """What repeats the work of the layer before, or else does all of it."""
        asked, found = self.asked, repeated()
        if found is None or len(asked.query) > self.which.stop - self.which.start or self.row.pad:
            return Repeated()
        chunk = () if self.chunk is None else (self.chunk.key, self.chunk.value)
        key = self.row, self.heads, asked.scaling, self.padded, bool(self.packed) and self.packed[0].start
        found.layer(key, (asked.query, asked.positions, self.rotary, *chunk))
        return found

    def _more(self, key: Tensor, value: Tensor, past: int, total: int = 0) -> None:
        """Parts from one stretch more, see `_planned`; no more than are merged at once."""
        parts = list(self.parts)
        for part in self._planned(key, value, past, total):
            if len(parts) == MOST_PARTS:
                parts = [self._merged(parts)]
            parts.append(part)
        self.parts = parts

    def _last(self, key: Tensor, value: Tensor, held: int) -> Tensor:
        if self.chunk is not None:
            self._put_chunk(self.chunk, key, value, held)
        self._more(key, value, held, held + self.new)
        output = self.asked.query.new_empty(len(self.query), self.new, self.query.shape[1], self.asked.query.shape[3])
        merge(self.parts, output)
        return output

    def _merged(self, parts: list[Part]) -> Part:
        result = torch.empty_like(self.query.transpose(1, 2), dtype=torch.float32)
        total = torch.empty_like(self.query[..., 0], dtype=torch.float32)
        merge(parts, result, total)
        return result.transpose(1, 2), total

    def _planned(self, key: Tensor, value: Tensor, past: int, total: int = 0) -> Iterator[Part]:
        """Attention to the first `past` tokens, or to `total`, of which the last are the queries' own."""
        first = 0
        for length in planned_lengths(past) if is_planned(self.query) else ():
            yield attend_all(self.query, _shown(key, first, length), _shown(value, first, length))
            first += length
        rest = max(past, total) - first
        if total:
            yield from attend_causally(self.query, _shown(key, first, rest), _shown(value, first, rest))
        elif rest:
            yield attend_all(self.query, _shown(key, first, rest), _shown(value, first, rest))

    def _scratch(self, rows: int, room: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[R, room, G, pitch]`, zeros where a head ends before that."""
        make = self.asked.query.new_zeros if self.padded else self.asked.query.new_empty
        key, value = make(2, rows, room, self.heads, self.pitch, dtype=_operand(self.asked.query))
        return key, value

    def _unpack(self, begin: int, end: int, key: Tensor, value: Tensor, to: int) -> None:
        """The packed tokens `begin`, ..., `end` - 1, the first one of a block, and the rest of the last one's block; token `to` is the first."""
        for page in self.packed:
            low, high = max(begin, page.start), min(end, page.start + page.tokens)
            if low < high:
                block, last = (low - page.start) // BLOCK_TOKENS, -(-(high - page.start) // BLOCK_TOKENS)
                at = to + page.start + block * BLOCK_TOKENS - begin
                unpack(page, self.rotary, block, last - block, self.row0, key, value, at)

    def _put_sinks(self, count: int, key: Tensor, value: Tensor) -> None:
        """The first `count` sinks go to the front of `key` and `value`."""
        if count:
            assert self.sinks is not None
            own = self.sinks.key[self.which, :, :count], self.sinks.value[self.which, :, :count].transpose(1, 2)
            rotated(own[0], self.sinks.origins[self.which], self.rotary, key[:, :count])
            value[:, :count, :, : own[1].shape[-1]] = own[1]

    def _put_chunk(self, chunk: DenseSegment, key: Tensor, value: Tensor, at: int) -> None:
        """A chunk that is not stored yet goes to `key` and `value` from token `at` on."""
        own = chunk.key[self.which, :, self.row.pad :], chunk.value[self.which, :, self.row.pad :].transpose(1, 2)
        end = at + own[0].shape[2]
        rotated(own[0], self.positions, self.rotary, key[:, at:end])
        value[:, at:end, :, : own[1].shape[-1]] = own[1]


def _shown(tokens: Tensor, first: int, count: int) -> Tensor:
    """`[R, G, count, D]` of `[R, room, G, D]`; of a single sequence, its strides say nothing of the room."""
    shown = tokens[:, first : first + count]
    return (shown[0][None] if len(shown) == 1 else shown).transpose(1, 2)
