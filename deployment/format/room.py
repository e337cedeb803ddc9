"""Capacity of the outlier buffers, managed on the host without synchronising with the device.

How many outliers a token has only the device knows. The host knows a bound: what was held when last counted, and the worst
case of every token since. Counts travel to the host behind the appends, into pinned memory, and a later append looks
whether one has arrived; none waits. The streams move to more room when the bound demands it, and to less when a count has
shown that much of it is unused: a long chunk's worst case is given back soon after it.

    append     bound <= places?  else move      ->  kernels  ->  bound += worst case  ->  ask for a count, now and then
    later      count arrived?    bound = count + worst case since then

On a CPU every count arrives at once. What finds no room after all (in a CUDA graph replayed too often) is not lost in
silence: the kernels report it, and the report travels with the counts.
"""

import torch
from torch import Tensor

from deployment.format.streams import OutlierStreams

ROOM_TOKENS = 32  # tokens that there is room for if all their elements are outliers, once a count has arrived
GRAPH_TOKENS = 64  # and such tokens while steps are recorded without having been asked for
ROOM_SHARE = 32  # and for this fraction, 1 / 32, of those held: growing does not copy a long stream again and again
_ASKED = 4  # a count is asked for when this part of the room may be gone
LOST = "outliers were lost for want of room; reserve more tokens before capturing a graph"


class Count:
    """Counts in flight to the host."""

    def __init__(self, numbers: Tensor, since: int) -> None:
        self.numbers, self.since, self._event = numbers, since, None
        if numbers.is_cuda:
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))

    @property
    def arrived(self) -> bool:
        """Whether `numbers` may be read; answers at once."""
        return self._event is None or self._event.query()


class Room:
    """What the host knows of the streams of a page: `held` and `places` `[B * G]` int64, both on the host."""

    def __init__(self, held: Tensor, places: Tensor) -> None:
        self.held, self.places = held, places
        self.since = 0  # outliers that every stream may have got beyond `held`
        self.fixed = False  # whether a graph relies on where the streams are
        self._count: Count | None = None
        self._settled = False
        self._update()

    @classmethod
    def of(cls, streams: OutlierStreams) -> "Room":
        """Of streams with starts about which nothing is known; waits for the device, unless they are empty."""
        if not len(streams.index):
            nothing = torch.zeros(streams.ends[..., 0].numel(), dtype=torch.int64)
            return cls(nothing, nothing)
        assert streams.starts is not None
        starts = streams.starts.flatten().cpu().long()
        return cls(streams.counts().flatten().cpu(), starts.diff(append=torch.tensor([len(streams.index)])))

    def _update(self) -> None:
        self._free = int((self.places - self.held).min()) - self.since

    def prepared(self, streams: OutlierStreams, most: int, spare: int) -> OutlierStreams:
        """`streams` with room for `most` more outliers in each, `spare` beyond that if they have to move."""
        news, self._settled = self._look(), False
        if most <= self._free and not news:
            return streams
        needed = self.held + (self.since + most)
        spares = self.held // ROOM_SHARE + spare
        wasteful = not self.fixed and (self.places - needed - 2 * spares).sum() > 0
        return self._moved(streams, needed + spares) if most > self._free or wasteful else streams

    def settled(self, streams: OutlierStreams, overflow: Tensor) -> OutlierStreams:
        """`streams` that nothing will be added to, without room once their count is known."""
        if self.fixed or self._settled:
            return streams
        self._look()
        if self.since:
            self._ask(streams, overflow)
            return streams
        self._settled = True
        return self._moved(streams, self.held)

    def used(self, streams: OutlierStreams, most: int, spare: int, overflow: Tensor) -> None:
        """Up to `most` outliers were added to each stream, or `overflow` `[1]` int32 was set."""
        self.since += most
        self._free -= most
        if self.since * _ASKED >= spare:
            self._ask(streams, overflow)

    def recount(self, held: Tensor) -> None:
        """Take over what the device has counted, `[B * G]` int64 on the host."""
        self.held, self.since, self._count = held, 0, None
        self._update()

    def _ask(self, streams: OutlierStreams, overflow: Tensor) -> None:
        if self._count is None:
            self._count = Count(torch.cat([streams.counts().flatten(), overflow]), self.since)

    def _look(self) -> bool:
        """Whether a count has arrived that was not taken over before. Raises RuntimeError if outliers were lost."""
        if self._count is None or not self._count.arrived:
            return False
        numbers, counted = self._count.numbers, self._count.since
        if numbers[-1]:
            raise RuntimeError(LOST)
        self.held, self.since, self._count = numbers[:-1], self.since - counted, None
        self._update()
        return True

    def _moved(self, streams: OutlierStreams, places: Tensor) -> OutlierStreams:
        self.places = places
        self._update()
        return streams.moved(places)
