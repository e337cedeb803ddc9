"""Attention of many queries over packed segments: unpack a bounded stretch, hand it to the library, go on; put the parts together.

`attend_many` has the contract of `attend_packed` (packed.py), which hands over to it. One query reads every block once, and so
should never write it down unpacked; but hundreds share what it costs to unpack a block (unpack.py), and what is left to do
is plain attention over plain tensors (library.py). All stretches go through the same memory, of `SCRATCH_BYTES` at most (schedule.py),
however long the context is.

Where the host knows how long a sequence is, it is attended to in parts that need no mask: stretches of the past, the last one with the sinks
behind it, and the chunk, causally. Otherwise (while a graph is captured, if queries are few or just anywhere) portable.py does it.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deployment.kernels.library import PLANNED, Part, attend_all, attend_causally, merged
from deployment.kernels.packed import DenseSegment, Known, PackedSegment, Segment
from deployment.kernels.phase import Rotary
from deployment.kernels.plain import rotated
from deployment.kernels.portable import Asked
from deployment.kernels.portable import attend as attend_portably
from deployment.kernels.schedule import EVEN_TOKENS, SCRATCH_BYTES, SCRATCH_TOKENS
from deployment.kernels.unpacking import unpack
from quant.storage import BLOCK_TOKENS

_FEW = 16  # queries of a KV head, which are not worth unpacking anything for
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
    pitch = -(-dim // _EVEN) * _EVEN
    operand = torch.float32 if query.dtype == torch.float32 else torch.float16
    turned = query.new_empty(batch, new, heads, pitch, dtype=operand)
    turned = rotated(query, positions, rotary, turned if pitch == dim else turned.zero_(), scaling)
    asked = Asked(turned, positions.contiguous(), segments, rotary, kv_heads, dim)
    if known is None or new * heads // kv_heads <= _FEW or any(row.stored not in row.ends(new) for row in known):
        return attend_portably(asked).to(query.dtype)
    return _attend_known(asked, known).transpose(1, 2)[..., :dim].to(query.dtype).contiguous()


def _attend_known(asked: Asked, known: Sequence[Known]) -> Tensor:
    """All sequences at once if they are alike, else one by one."""
    alike = all(row == known[0] for row in known)
    if alike and not known[0].pad:
        return _Rows(asked, 0, len(known), known[0]).attend()
    output = torch.zeros_like(asked.query.transpose(1, 2), dtype=torch.float32)
    for first, row in enumerate(known[:1] if alike else known):
        rows = len(known) if alike else 1
        if row.pad < output.shape[2]:
            output[first : first + rows, :, row.pad :] = _Rows(asked, first, rows, row).attend()
    return output


def stretch_blocks(bytes_per_token: int) -> int:
    """Blocks of a stretch: as many as `SCRATCH_BYTES` hold of keys and values, whole plans of cuDNN if there are any; one at least."""
    tokens = min(SCRATCH_BYTES // (2 * bytes_per_token), SCRATCH_TOKENS)
    even = EVEN_TOKENS if tokens > EVEN_TOKENS else PLANNED
    return max(1, (tokens // even * even or tokens) // BLOCK_TOKENS)


def next_stretch(most: int, left: int) -> int:
    """Blocks of the next stretch where `left` are, and `most` fit."""
    while most > left and most > EVEN_TOKENS // BLOCK_TOKENS:
        most //= 2
    return min(most, left)


class _Rows:
    """Attention of some sequences that are equally long and equally padded."""

    def __init__(self, asked: Asked, first: int, rows: int, row: Known) -> None:
        self.which, self.row0, self.row = slice(first, first + rows), first, row
        query = self.query = asked.query[self.which, row.pad :].transpose(1, 2)
        self.positions, segments = asked.positions[self.which, row.pad :], asked.segments
        self.rotary, self.heads = asked.rotary, asked.kv_heads
        self.packed = [segment for segment in segments if isinstance(segment, PackedSegment)]
        dense = [segment for segment in segments if isinstance(segment, DenseSegment)]
        self.sinks = next((segment for segment in dense if segment.limits is not None), None)
        self.chunk = next((segment for segment in dense if segment.limits is None), None)
        self.padded = any(segment.key.shape[-1] < query.shape[-1] for segment in dense) or any(
            segment.key.head_dim < query.shape[-1] for segment in self.packed
        )

    def attend(self) -> Tensor:
        """Outputs `[R, H, S, D]` fp32 or in the query's dtype."""
        total: Part | None = None
        for part in self._parts():
            total = part if total is None else merged(total, part)
        assert total is not None  # a query sees itself
        return total[0]

    def _parts(self) -> Iterator[Part]:
        row = self.row
        first = min(self.packed[0].start if self.packed else row.before, row.before)
        size = len(self.query) * self.heads * self.query.shape[-1] * self.query.itemsize  # of a token's keys
        most, left = stretch_blocks(size), -(-(row.before - first) // BLOCK_TOKENS)
        key, value = self._scratch(next_stretch(most, left) * BLOCK_TOKENS + first)
        end = first
        while end < row.before:
            begin, blocks = end, next_stretch(most, left)
            end, left = min(begin + blocks * BLOCK_TOKENS, row.before), left - blocks
            self._unpack(begin, end, key, value)
            held = end - begin
            if end == row.before:
                held += self._put_sinks(0, first, key, value, held)
            yield from attend_all(self.query, _shown(key, 0, held), _shown(value, 0, held))
        if 0 < first == row.before:
            self._put_sinks(0, first, key, value, 0)
            yield from attend_all(self.query, _shown(key, 0, first), _shown(value, 0, first))
        if self.chunk is not None:
            yield attend_causally(self.query, *self._chunk(self.chunk))
        elif row.stored > row.before:
            yield attend_causally(self.query, *self._stored_chunk())

    def _scratch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[R, tokens, G, D]`, zeros where a head ends before D."""
        shape = (2, len(self.query), tokens, self.heads, self.query.shape[-1])
        key, value = self.query.new_zeros(shape) if self.padded else self.query.new_empty(shape)
        return key, value

    def _unpack(self, begin: int, end: int, key: Tensor, value: Tensor, to: int = 0) -> None:
        """The packed tokens `begin`, ..., `end` - 1, the first one of a block, and the rest of the last one's block; token `to` is the first."""
        for page in self.packed:
            low, high = max(begin, page.start), min(end, page.start + page.tokens)
            if low < high:
                block, last = (low - page.start) // BLOCK_TOKENS, -(-(high - page.start) // BLOCK_TOKENS)
                at = to + page.start + block * BLOCK_TOKENS - begin
                unpack(page, self.rotary, block, last - block, self.row0, key, value, at)

    def _put_sinks(self, begin: int, end: int, key: Tensor, value: Tensor, at: int) -> int:
        """Sinks `begin`, ..., `end` - 1 go to `key` and `value` from token `at` on; returns how many."""
        if begin < end:
            assert self.sinks is not None
            places = self.sinks.origins[self.which, None] + torch.arange(begin, end, device=key.device)
            rotated(self.sinks.key[self.which, :, begin:end], places, self.rotary, key[:, at : at + end - begin])
            own = self.sinks.value[self.which, :, begin:end]
            value[:, at : at + end - begin, :, : own.shape[-1]] = own.transpose(1, 2)
        return end - begin

    def _chunk(self, chunk: DenseSegment) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values `[R, G, S, D]` of a chunk that is not stored yet."""
        key, value = (tokens[self.which, :, self.row.pad :] for tokens in (chunk.key, chunk.value))
        turned, own = self._scratch(key.shape[2])
        rotated(key, self.positions, self.rotary, turned)
        if self.padded or value.dtype != own.dtype or value.stride(-1) != 1:
            own[..., : value.shape[-1]] = value.transpose(1, 2)
            value = own.transpose(1, 2)
        return turned.transpose(1, 2), value

    def _stored_chunk(self) -> tuple[Tensor, Tensor]:
        """The same of one that is stored: its last tokens, some of which may be sinks."""
        row, start = self.row, self.packed[0].start if self.packed else self.row.stored
        sinks = min(max(start - row.before, 0), row.stored - row.before)
        begin = max(row.before - start, 0) // BLOCK_TOKENS * BLOCK_TOKENS + start  # a block's first token
        key, value = self._scratch(sinks + max(0, -(-(row.stored - begin) // BLOCK_TOKENS) * BLOCK_TOKENS))
        self._put_sinks(row.before, row.before + sinks, key, value, 0)
        self._unpack(begin, row.stored, key, value, sinks)
        skipped = max(0, row.before - begin)
        tokens = row.stored - row.before
        return _shown(key, skipped, tokens), _shown(value, skipped, tokens)


def _shown(tokens: Tensor, first: int, count: int) -> Tensor:
    """`[R, G, count, D]` of `[R, room, G, D]`."""
    return tokens[:, first : first + count].transpose(1, 2)
