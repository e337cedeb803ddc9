"""Ranges taken from the sequence itself, in groups: online channels, and the groupwise integers of FlexGen, Atom and KIVI.

Along a channel-wise axis a group is some consecutive tokens of one channel, along a token-wise axis some consecutive
channels of one token; the last group of a vector may be shorter. Each has a scale and a zero of its own. Simulated
only: a cache that grows by single tokens would have to quantize the open group of every channel again and again.
A group of tokens is quantized as a whole here, so its first ones profit from the range of later ones: what is simulated
is at least as good as what a cache could do. Outliers are a share of each group, at least one at each end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.codebook import Codebook
from quant.quantizer import Encoded, Quantizer, as_stored, codebook_tables, denormalise, normalise, token_range
from quant.scheme import Axis


@dataclass(frozen=True)
class GroupQuantizer(Quantizer):
    """Dynamic ranges of groups of `scheme.group` elements (None: the whole vector) along `axis`."""

    codebook: Codebook
    axis: Axis

    def encode(self, x: Tensor) -> Encoded:
        """Quantize `x`, `[..., T, C]`, in float32. Scales are `[..., T, groups]`, or `[..., groups, C]` of channels."""
        x = x.float()
        outliers, scale, zero = group_ranges(x, self.axis, self.scheme.group, self.scheme.outliers)
        codes = self.codebook.encode(normalise(x, *self._spread(x.shape, scale, zero)))
        return Encoded(codes, outliers, None if outliers is None else as_stored(x[outliers]), scale, zero)

    def dense(self, encoded: Encoded) -> Tensor:
        """Float32 values `[..., T, C]`, outliers not yet put in their place."""
        assert encoded.scale is not None and encoded.zero is not None
        levels = self.codebook.decode(encoded.codes)
        return denormalise(levels, *self._spread(levels.shape, encoded.scale, encoded.zero))

    @property
    def tables(self) -> dict[str, Tensor]:
        """The fitted tensors, by the name they have in the artefact."""
        return codebook_tables(self.codebook)

    def _spread(self, shape: torch.Size, *tables: Tensor) -> list[Tensor]:
        return [spread(table.float(), shape, self.axis, self.scheme.group) for table in tables]


def group_ranges(x: Tensor, axis: Axis, group: int | None, share: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """(outlier mask or None, scale, zero) of each group of float32 `x`, `[..., T, C]`; scales as `encode` has them."""
    rows = x.mT if axis == "channel" else x
    length = rows.shape[-1]
    size = min(group or length, length)
    whole = length // size * size if size else 0
    pieces = [rows[..., :whole].unflatten(-1, (-1, size)) if whole else rows.new_zeros(*rows.shape[:-1], 0, 1)]
    if whole < length:
        pieces.append(rows[..., None, whole:])
    ranges = [token_range(piece, share) for piece in pieces]
    scale, zero = (torch.cat([one[which].squeeze(-1) for one in ranges], dim=-1) for which in (1, 2))
    outliers = None
    if share:
        outliers = torch.cat([mask.flatten(-2) for mask, _, _ in ranges if mask is not None], dim=-1)
        outliers = outliers.mT if axis == "channel" else outliers
    return (outliers, scale.mT, zero.mT) if axis == "channel" else (outliers, scale, zero)


def spread(table: Tensor, shape: torch.Size, axis: Axis, group: int | None) -> Tensor:
    """A number per group as one that broadcasts against the elements `[..., T, C]` of `shape`."""
    dim = -2 if axis == "channel" else -1
    length = shape[dim]
    index = torch.arange(length, device=table.device) // max(1, min(group or length, length))
    return table.index_select(dim, index)
