"""Sparse outliers of a page: index and value lists per sequence and KV head, appended token by token.

    index  :: [N]             int16  (token % span) * D + channel within its page and head, unsigned
    value  :: [N]             fp16   the element itself
    ends   :: [B, G, blocks]  int32  where a block's list ends; it begins where the one before ends
    starts :: [B, G]          int32  where a stream begins, if there is room between streams

16 bits tell `span` tokens of D channels apart (`index_span`): 512 of 128, 256 of 256. A list belongs to one block of 64
tokens, so its number says the rest; whoever reads a whole stretch of `span` tokens needs no lists at all.

A token's outliers come after those of all earlier tokens, so an append writes at the end of the stream and moves
nothing, if there is room. The torch path leaves no room and needs no starts: it rebuilds the streams, exactly as long
as need be. The append kernels need room, which `moved` makes (how much, says room.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gradients.cli import UserError
from quant.storage import BLOCK_TOKENS

_INDICES = 1 << 16
FEW = 64  # outliers that are added one by one
_MOVED = 1 << 22  # places that are moved at a time, which bounds the memory it takes


def index_span(head_dim: int) -> int:
    """Tokens of `head_dim` channels that a 16-bit index tells apart: a power of two, and whole blocks.

    Raises `UserError` for heads of more channels than an index can number within one block.
    """
    most = _INDICES // head_dim
    if most < BLOCK_TOKENS:
        limit = _INDICES // BLOCK_TOKENS
        raise UserError(
            f"heads of {head_dim} channels are too large for 16-bit indices of outliers, which end at {limit}; "
            "use a scheme without outliers"
        )
    return 1 << (most.bit_length() - 1)


@dataclass
class OutlierStreams:
    """Lists are numbered (sequence * G + head) * blocks + block, which is also their order in `index` and `value`."""

    index: Tensor
    value: Tensor
    ends: Tensor
    starts: Tensor | None = None

    @classmethod
    def empty(cls, batch: int, heads: int, blocks: int, device: torch.device) -> "OutlierStreams":
        """No outliers yet, and no room for any."""
        return cls(
            index=torch.empty(0, dtype=torch.int16, device=device),
            value=torch.empty(0, dtype=torch.float16, device=device),
            ends=torch.zeros(batch, heads, blocks, dtype=torch.int32, device=device),
        )

    @property
    def blocks(self) -> int:
        """Blocks per sequence."""
        return self.ends.shape[-1]

    def lengths(self) -> Tensor:
        """Outliers of every list, `[B, G, blocks]` int64."""
        if self.starts is None:
            return self.ends.long().flatten().diff(prepend=self.ends.new_zeros(1)).view_as(self.ends)
        # the append kernel leaves the ends of blocks alone that it has not come to yet
        return self.ends.long().cummax(-1).values.diff(prepend=self.starts.long()[..., None])

    def counts(self) -> Tensor:
        """Outliers of every stream, `[B, G]` int64."""
        return self.lengths().sum(-1) if self.starts is None else (self.ends.amax(-1) - self.starts).long()

    def unused_bytes(self) -> int:
        """Of `index` and `value`, what no list has come to; none but where kernels append. Waits for the device."""
        if self.starts is None:
            return 0
        places = len(self.index) - int(self.counts().sum())
        return places * (self.index.element_size() + self.value.element_size())

    def places(self) -> tuple[Tensor, Tensor]:
        """(begin, end) of every list in `index` and `value`, `[B, G, blocks]` int64."""
        lengths = self.lengths()
        if self.starts is None:
            ends = lengths.flatten().cumsum(0).view_as(lengths)
        else:
            ends = lengths.cumsum(-1) + self.starts[..., None]
        return ends - lengths, ends

    def entries(self, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(number of the list int64, index int64, value fp16) of every outlier, in order.

        Or only of those of the blocks `first`, ..., `last - 1`, which costs no more than these.
        """
        begin, end = (place[..., first:last].flatten() for place in self.places())
        lengths = end - begin
        number = torch.arange(self.ends.numel(), device=self.ends.device).view_as(self.ends)[..., first:last]
        lists = torch.repeat_interleave(number.flatten(), lengths)
        shift = torch.repeat_interleave(begin - (lengths.cumsum(0) - lengths), lengths)
        place = torch.arange(len(lists), device=lists.device) + shift
        return lists, self.index[place].long() & 0xFFFF, self.value[place]

    def rebuilt(self, lists: Tensor, index: Tensor, value: Tensor, room: int | None = None) -> "OutlierStreams":
        """The same page with other outliers, sorted by list and index; `room` free places after every stream."""
        batch, heads, blocks = self.ends.shape
        counts = lists.bincount(minlength=self.ends.numel()).view(self.ends.shape)
        ends = counts.flatten().cumsum(0).view_as(counts)
        if room is None:
            return OutlierStreams(index.short(), value, ends.int())
        stream = torch.arange(batch * heads, device=lists.device)
        ends = ends + (stream * room).view(batch, heads, 1)
        streams = OutlierStreams(
            index=padded_zeros(self.index, len(lists) + batch * heads * room),
            value=padded_zeros(self.value, len(lists) + batch * heads * room),
            ends=ends.int(),
            starts=(ends[..., 0] - counts[..., 0]).int(),
        )
        place = torch.arange(len(lists), device=lists.device) + lists // blocks * room
        streams.index[place], streams.value[place] = index.short(), value
        return streams

    def with_added(self, lists: Tensor, index: Tensor, value: Tensor) -> "OutlierStreams":
        """The same page with more outliers, in any order, and no room."""
        held_lists, held_index, held_value = self.entries()
        keys = torch.cat([held_lists << 16 | held_index, lists << 16 | index])
        keys, order = keys.sort()
        return self.rebuilt(keys >> 16, keys & 0xFFFF, torch.cat([held_value, value])[order])

    def with_few(self, added: list[tuple[int, int, int]], value: Tensor) -> "OutlierStreams":
        """The same page with a few more outliers of later tokens than their lists hold, and no room; nothing is sorted.

        `added` says of each its list, its index and which of `value` `[N]` fp16 it is, in this order.
        """
        if self.starts is not None:
            return self.rebuilt(*self.entries()).with_few(added, value)
        lists, index, source = (list(column) for column in zip(*added, strict=True))
        # each is put behind its list
        cuts = [0, *self.ends.flatten()[lists].tolist(), len(self.index)]
        sizes = [end - begin for begin, end in pairwise(cuts)]
        device = self.index.device
        new_index = torch.tensor(index, dtype=torch.int32, device=device).short()
        new_value = value[torch.tensor(source, device=device)]
        more = torch.bincount(torch.tensor(lists, device=device), minlength=self.ends.numel()).cumsum(0)
        return OutlierStreams(
            _alternating(self.index.split(sizes), new_index),
            _alternating(self.value.split(sizes), new_value),
            self.ends + more.view_as(self.ends).int(),
        )

    def with_room(self, room: int) -> "OutlierStreams":
        """The same outliers with `room` free places after every stream."""
        return self.rebuilt(*self.entries(), room)

    def moved(self, places: Tensor) -> "OutlierStreams":
        """The same outliers with `places` for each stream, `[B * G]` int64 on the host; the device is not waited for.

        Raises `UserError` for 2^31 places or more.
        """
        before = self.with_starts()
        assert before.starts is not None
        starts = sent((places.cumsum(0) - places).int(), self.index.device)
        ends = sent(places.cumsum(0).int(), self.index.device)
        shift = starts - before.starts.flatten()
        total = int(places.sum())
        if total >= 1 << 31:
            raise UserError(
                f"room for {total} outliers goes beyond 32-bit numbers; use fewer sequences or shorter chunks"
            )
        index, value = padded_zeros(self.index, total), padded_zeros(self.value, total)
        for first in range(0, total if len(before.index) else 0, _MOVED):
            place = torch.arange(first, min(first + _MOVED, total), dtype=torch.int32, device=starts.device)
            stream = torch.searchsorted(ends, place, right=True, out_int32=True)
            # a place without an outlier gets any
            source = (place - shift.index_select(0, stream)).clamp_(0, len(before.index) - 1)
            index[first : first + len(place)] = before.index.index_select(0, source)
            value[first : first + len(place)] = before.value.index_select(0, source)
        by_head = before.starts.shape
        return OutlierStreams(index, value, before.ends + shift.view(*by_head, 1), starts.view(by_head))

    def with_starts(self) -> "OutlierStreams":
        """The same outliers with `starts`, which the kernels read."""
        if self.starts is None and not len(self.index):  # known without asking the device
            return OutlierStreams(self.index, self.value, self.ends, torch.zeros_like(self.ends[..., 0]))
        return self if self.starts is not None else self.with_room(0)

    def before(self, limits: Tensor, head_dim: int) -> "OutlierStreams":
        """Only the outliers of tokens before `limits` `[B]` of their sequence, and no room."""
        lists, index, value = self.entries()
        token = lists % self.blocks * BLOCK_TOKENS + index // head_dim % BLOCK_TOKENS
        kept = token < limits[lists // self.ends[0].numel()]
        return self.rebuilt(lists[kept], index[kept], value[kept])

    @property
    def can_shorten(self) -> bool:
        """Whether `shorten` may be called: there are starts, and this is no tensor of an inference mode that has ended."""
        return self.starts is not None and (torch.is_inference_mode_enabled() or not self.ends.is_inference())

    def shorten(self, limits: Tensor, head_dim: int) -> None:
        """Forget the outliers of tokens from `limits` `[B]` of their sequence on, in place; the device is not waited for.

        Those of earlier tokens come first in every list, so lists merely end earlier, and there is more room behind them.
        """
        if not len(self.index):
            return
        block = (limits // BLOCK_TOKENS).clamp(0, self.blocks - 1)[:, None, None]
        begin, end = (place.gather(-1, block.expand(*place.shape[:2], 1)) for place in self.places())
        place = begin + torch.arange(BLOCK_TOKENS * head_dim, device=begin.device)
        index = self.index[place.clamp(max=len(self.index) - 1)].long() & 0xFFFF
        token = block * BLOCK_TOKENS + index // head_dim % BLOCK_TOKENS
        last = begin + ((place < end) & (token < limits[:, None, None])).sum(-1, keepdim=True)
        earlier = torch.arange(self.blocks, device=begin.device) < block
        self.ends.copy_(self.ends.where(earlier, last.int()))

    def select(self, sequences: Tensor) -> "OutlierStreams":
        """The streams of the given sequences `[B']` int64, in this order, repeats allowed, and no room."""
        per_sequence = self.ends[0].numel()
        lists, index, value = self.entries()
        chosen = [(lists // per_sequence == wanted).nonzero()[:, 0] for wanted in sequences]
        source = torch.cat(chosen)
        moved = torch.cat([torch.full_like(c, number) for number, c in enumerate(chosen)])
        selected = OutlierStreams(self.index, self.value, self.ends[sequences])
        return selected.rebuilt(moved * per_sequence + lists[source] % per_sequence, index[source], value[source])

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        return [self.index, self.value, self.ends, *([] if self.starts is None else [self.starts])]


def padded_zeros(like: Tensor, places: int) -> Tensor:
    """`[places]` zeros of the dtype (2 bytes) and device of `like`; behind them memory goes on to a multiple of 16 bytes, which decode.cu copies at once."""
    return like.new_zeros(-(-places // 8) * 8)[:places]


def _alternating(pieces: Sequence[Tensor], singles: Tensor) -> Tensor:
    """The first of the pieces, the first single element, the second of the pieces, ..."""
    parts = [pieces[0]]
    for single, piece in zip(singles.split(1), pieces[1:], strict=True):
        parts += [single, piece]
    return torch.cat(parts)


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """`numbers` of the host on a device, which is not waited for."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
