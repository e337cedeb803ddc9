"""Some blocks of every sequence of a batch, their outliers, and the room that there is for more of these."""

from dataclasses import dataclass

from torch import Tensor

from deployment.format.room import Room
from deployment.format.streams import OutlierStreams
from quant.storage import BLOCK_TOKENS


@dataclass
class Page:
    """Some consecutive blocks of every sequence, from token `start` on."""

    start: int
    blocks: int
    words: Tensor
    scales: Tensor | None
    outliers: OutlierStreams | None
    room: Room | None = None  # of outliers, where kernels append; None where it is not known

    @property
    def end(self) -> int:
        """One past the last token there is room for."""
        return self.start + self.blocks * BLOCK_TOKENS

    @property
    def places(self) -> int:
        """Room for outliers of all streams, those that are there included."""
        return 0 if self.outliers is None else self.outliers.index.numel()

    def for_kernels(self) -> tuple[Tensor, ...]:
        """words, scales; index, value, starts, ends of outliers. What there is not is never read, and some other tensor."""
        scales = self.words if self.scales is None else self.scales
        if self.outliers is None:
            return (self.words, scales, *(self.words,) * 4)
        streams = self.outliers = self.outliers.with_starts()
        assert streams.starts is not None
        return self.words, scales, streams.index, streams.value, streams.starts, streams.ends

    def make_room(self, most: int, spare: int) -> None:
        """Let every stream have room for `most` more outliers, and `spare` if it has to be made."""
        assert self.outliers is not None
        if self.room is None:
            self.outliers = self.outliers.with_starts()
            self.room = Room.of(self.outliers)
        self.outliers = self.room.prepared(self.outliers, most, spare)
