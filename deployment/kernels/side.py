"""New keys or values, and what the kernels that store them must know.

Of tokens of which this process has some heads only (gradients/parallel.py), where their range is that of all, the others are
gathered: they are encoded as one process would, and the own heads are stored. Nothing waits for the device.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deployment.format.layout import PackedTensor
from deployment.format.page import Page
from deployment.kernels.sums import already_opened
from gradients.parallel import Part, gathered_heads
from quant.outliers import outliers_per_end
from quant.quantizer import TokenQuantizer


@dataclass(frozen=True)
class Side:
    """New keys or values `x` `[B, G, S, D]`, and where they go.

    The first `sinks.shape[2]` tokens of a sequence go to `sinks` `[B, G, sink tokens, D]`, others to `pages`: all that may be
    touched. If `x` has more heads than are stored here, these begin at `first_head`.
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
    def per_end(self) -> int:
        """Outliers at each end of a token, where ranges are its own."""
        channels = self.x.shape[1] * self.packed.head_dim
        return outliers_per_end(channels, self.packed.quantizer.scheme.outliers) if self.dynamic else 0

    def with_all_heads(self) -> "Side":
        """The same with whatever of its tokens takes part in what is stored, channels side by side."""
        quantizer, x = self.packed.quantizer, self.x if self.x.stride(-1) == 1 else self.x.contiguous()
        if not isinstance(quantizer, TokenQuantizer) or quantizer.part.is_whole or x.shape[1] > self.packed.heads:
            return replace(self, x=x)
        return replace(self, x=_gathered(x, quantizer.part), first_head=quantizer.part.number * self.packed.heads)

    def with_own_heads(self) -> "Side":
        """The same with those that are stored here."""
        own = slice(self.first_head, self.first_head + self.packed.heads)
        return replace(self, x=self.x[:, own], first_head=0)


def _gathered(x: Tensor, part: Part) -> Tensor:
    sums = already_opened(part) if x.is_cuda else None
    if sums is None or not sums.takes(x.numel(), x.dtype):
        return gathered_heads(x, part, 1)
    return sums.gathered(x.movedim(1, 0).contiguous()).flatten(0, 1).movedim(0, 1)


@dataclass(frozen=True)
class Codes:
    """What is found of a chunk of new tokens before it is stored, see encode.py."""

    codes: Tensor  # [B, S, C] int16; 256 for an outlier
    ranges: Tensor  # [B, S, 2] fp16: scale and zero, where they are the token's own
    counts: Tensor  # [B, G, S] int32: outliers

    @classmethod
    def empty(cls, side: Side) -> "Codes":
        """For the tokens of a side."""
        (batch, _, tokens, dim), heads, device = side.x.shape, side.packed.heads, side.x.device
        return cls(
            torch.empty(batch, tokens, heads * dim, dtype=torch.int16, device=device),
            torch.empty(batch, tokens, 2, dtype=torch.float16, device=device),
            torch.empty(batch, heads, tokens, dtype=torch.int32, device=device),
        )
