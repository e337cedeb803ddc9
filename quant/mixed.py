"""Channels of different widths: what rate-distortion allocation (`quant/allocate.py`) leaves behind.

Ranges are static, as for the paper's keys, and everything outside its channel's range is kept exactly. Each channel
has its own number of bits; channels of one width share a codebook. A width of 0 stores nothing but outliers: all
other elements decode to the channel's one level.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quant.arithmetic import normalise
from quant.codebook import Codebook
from quant.feedback import ChannelBooks, Feedback
from quant.quantizer import Encoded, FedBack, feedback_tables, kept_exactly


@dataclass(frozen=True)
class MixedQuantizer(FedBack):
    """`widths` `[C]` uint8, `scale` and `zero` `[C]` float32, and a codebook for every width that occurs.

    `places` `[G, D]` uint8 are each head's channels in groups of 16 of one width; None where each has its own.
    """

    codebooks: dict[int, Codebook]
    widths: Tensor
    scale: Tensor
    zero: Tensor
    feedback: Feedback | None = None
    places: Tensor | None = None

    @cached_property
    def channels(self) -> Mapping[int, Tensor]:
        """The channels of each width, `[n]` int64 ascending."""
        return {width: (self.widths == width).nonzero()[:, 0] for width in self.codebooks}

    @cached_property
    def _by_width(self) -> Tensor:
        return torch.cat(list(self.channels.values()))

    @cached_property
    def _back(self) -> Tensor:
        return self._by_width.argsort()

    @cached_property
    def _counts(self) -> list[int]:
        return [len(channels) for channels in self.channels.values()]

    @property
    def _codebooks(self) -> list[Codebook]:
        return list(self.codebooks.values())

    def coded(self, x: Tensor) -> tuple[Encoded, Tensor]:
        """`encode(x)`, and the targets float32 `[..., T, C]` whose codes these are."""
        x = x.float()
        normalised = normalise(x, self.scale, self.zero)
        outliers = normalised.abs() > 1 if self.scheme.outliers else None
        if self.feedback is None:
            codes, targets = self._encode(normalised), x
        else:
            codes, targets = self.feedback.encode(x, outliers, self.scale, self.zero, self._books)
        return Encoded(codes, outliers, kept_exactly(targets, outliers)), targets

    def _encode(self, normalised: Tensor) -> Tensor:
        sides = normalised.index_select(-1, self._by_width).split(self._counts, dim=-1)
        codes = [codebook.encode(side.contiguous()) for codebook, side in zip(self._codebooks, sides, strict=True)]
        return torch.cat(codes, dim=-1).index_select(-1, self._back)

    @cached_property
    def _books(self) -> ChannelBooks:
        which = torch.zeros(len(self.widths), dtype=torch.int64, device=self.widths.device)
        for number, channels in enumerate(self.channels.values()):
            which[channels] = number
        return ChannelBooks.of(self._codebooks, which)

    def ranges(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """See `FedBack`."""
        return self.scale, self.zero

    def levels(self, codes: Tensor) -> Tensor:
        """See `FedBack`."""
        sides = codes.index_select(-1, self._by_width).split(self._counts, dim=-1)
        levels = [codebook.decode(side) for codebook, side in zip(self._codebooks, sides, strict=True)]
        return torch.cat(levels, dim=-1).index_select(-1, self._back)

    @property
    def tables(self) -> dict[str, Tensor]:
        """The fitted tensors, by the name they have in the artefact."""
        tables = {"widths": self.widths, "scale": self.scale, "zero": self.zero, **feedback_tables(self.feedback)}
        if self.places is not None:
            tables["places"] = self.places
        for width, codebook in self.codebooks.items():
            tables |= {f"levels.{width}": codebook.levels, f"boundaries.{width}": codebook.boundaries}
        return tables
