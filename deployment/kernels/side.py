"""New keys or values, and what the kernels that store them must know."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deployment.format.layout import PackedTensor
from deployment.format.page import Page
from deployment.kernels.unpack import source_of
from quant.outliers import outliers_per_end
from quant.quantizer import TokenQuantizer


@dataclass(frozen=True)
class Side:
    """New keys or values `x` `[B, G, S, D]`, and where they go.

    The first `sinks.shape[2]` tokens of a sequence go to `sinks` `[B, G, sink tokens, D]`, others to `pages`: all that may be
    touched. If `x` has more heads than are stored here (part.py), these begin at `first_head`.
    """

    packed: PackedTensor
    x: Tensor
    sinks: Tensor
    pages: list[Page]
    first_head: int = 0

    @property
    def dynamic(self) -> bool:
        """Whether ranges are the tokens' own."""
        return isinstance(self.packed.quantizer, TokenQuantizer)

    @property
    def is_partial(self) -> bool:
        """Whether a token's range takes heads that are not here."""
        quantizer = self.packed.quantizer
        here = isinstance(quantizer, TokenQuantizer) and not quantizer.part.is_whole
        return here and self.x.shape[1] == self.packed.heads

    @property
    def per_end(self) -> int:
        """Outliers at each end of a token, where ranges are its own."""
        quantizer = self.packed.quantizer
        channels = self.x.shape[1] * self.packed.head_dim
        return outliers_per_end(channels, quantizer.scheme.outliers) if self.dynamic else 0

    @property
    def placing(self) -> tuple[int, int]:
        """The order of codes, as unpack.py numbers them, and which planes they have."""
        return source_of(self.packed.order), self.packed.tables.planes

    @property
    def element_bits(self) -> int:
        """Of a number of x."""
        return self.x.element_size() * 8

    def page_pointers(self, page: Page) -> tuple[Tensor, ...]:
        """words, scales, index, value, starts, ends; what a page lacks is never read."""
        streams, unused = page.outliers, page.words
        scales = unused if page.scales is None else page.scales
        if streams is None:
            return (page.words, scales, *(unused,) * 4)
        assert streams.starts is not None
        return page.words, scales, streams.index, streams.value, streams.starts, streams.ends


@dataclass(frozen=True)
class Codes:
    """What is found of a chunk of new tokens before it is stored, see chunk.py."""

    codes: Tensor  # [B, S, C] int16; 256 for an outlier
    ranges: Tensor  # [B, S, 2] fp16: scale and zero, where they are the token's own
    counts: Tensor  # [B, G, S] int32: outliers

    @classmethod
    def empty(cls, x: Tensor) -> "Codes":
        """For `x` `[B, G, S, D]`."""
        batch, heads, tokens, dim = x.shape
        return cls(
            torch.empty(batch, tokens, heads * dim, dtype=torch.int16, device=x.device),
            torch.empty(batch, tokens, 2, dtype=torch.float16, device=x.device),
            torch.empty(batch, heads, tokens, dtype=torch.int32, device=x.device),
        )


def contiguous(side: Side) -> Side:
    """The same with new tokens whose channels lie side by side."""
    return replace(side, x=side.x.contiguous())


def places(page: Page) -> int:
    """Room for outliers of all streams of a page."""
    return 0 if page.outliers is None else page.outliers.index.numel()
