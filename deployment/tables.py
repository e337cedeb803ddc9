"""What the kernels must know of a quantizer: its tables, channel by channel, whatever kind it is."""

from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from deployment.order import ChannelOrder, FragmentOrder, Order
from quant.codebook import Codebook
from quant.mixed import MixedQuantizer
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer


@dataclass(frozen=True)
class Tables:
    """One layer's keys or values; where the range is dynamic `scale`, `zero` and `floor` are all zeros."""

    levels: Tensor  # [sum of L] float32, the codebooks one after another
    boundaries: Tensor  # [sum of L - 1] float32, at least one number
    scale: Tensor  # [C] float32
    zero: Tensor  # [C] float32
    floor: Tensor  # [C] float32: what code 0 decodes to
    width: Tensor  # [C] int32
    offset: Tensor  # [C] int32: first word in a block, in channel order
    first_level: Tensor  # [C] int32: where the channel's codebook begins in levels
    first_boundary: Tensor  # [C] int32: and in boundaries
    bytes: Tensor  # [2, 256] int32: what `kernels/pairs.py` finds for the bytes of words, where an order has fragments
    planes: int  # union of the binary digits of all widths
    widest: int

    @classmethod
    def of(cls, quantizer: Quantizer, order: Order, channels: int) -> "Tables":
        """The tables of a quantizer whose codes lie in `order`."""
        device = next(iter(quantizer.tables.values())).device
        codebooks = _codebooks(quantizer)
        width = torch.zeros(channels, dtype=torch.int64, device=device)
        first_level, first_boundary = width.clone(), width.clone()
        levels = boundaries = 0
        for bits, codebook in codebooks.items():
            chosen = quantizer.channels[bits]
            width[chosen], first_level[chosen], first_boundary[chosen] = bits, levels, boundaries
            levels, boundaries = levels + len(codebook.levels), boundaries + len(codebook.boundaries)
        all_levels = torch.cat([codebook.levels for codebook in codebooks.values()])
        zeros = all_levels.new_zeros(channels)
        scale = zero = zeros
        if isinstance(quantizer, ChannelQuantizer | MixedQuantizer):
            scale, zero = quantizer.scale, quantizer.zero
        offset = order.offsets if isinstance(order, ChannelOrder) else torch.zeros_like(width)
        occurring = [bits for bits in codebooks if (width == bits).any()]
        return cls(
            levels=all_levels,
            # never an empty tensor: its pointer would be null
            boundaries=torch.cat([*(codebook.boundaries for codebook in codebooks.values()), all_levels[:1]]),
            scale=scale.contiguous(),
            zero=zero.contiguous(),
            floor=(all_levels[first_level] * scale + zero).contiguous(),
            width=width.int(),
            offset=offset.int(),
            first_level=first_level.int(),
            first_boundary=first_boundary.int(),
            bytes=_levels_of_bytes(all_levels, order) if isinstance(order, FragmentOrder) else width.int()[:1],
            planes=reduce(or_, occurring, 0),
            widest=max(occurring),
        )


@dataclass(frozen=True)
class FeedbackTables:
    """A feedback whose matrix has its columns in the order of the channels, so that kernels permute nothing."""

    order: Tensor  # [G, D] int32: which channel of the head comes i-th
    rank: Tensor  # [G, D] int32: the inverse
    matrix: Tensor  # [G, D, D] fp16: row i is what the channel that comes i-th hands on to each

    @classmethod
    def of(cls, quantizer: Quantizer) -> "FeedbackTables | None":
        """The tables of a quantizer, if it has feedback."""
        feedback = getattr(quantizer, "feedback", None)
        if feedback is None:
            return None
        columns = feedback.order[:, None, :].expand_as(feedback.matrix)
        matrix = torch.zeros_like(feedback.matrix).scatter_(2, columns, feedback.matrix)
        return cls(feedback.order.int().contiguous(), feedback.order.argsort(dim=1).int(), matrix)


def _levels_of_bytes(levels: Tensor, order: FragmentOrder) -> Tensor:
    """For every byte of a word in fragment order, the fp16 levels of its codes: two words of a pair each, the lower number first.

    A nibble is a code of 4 bits or, with a bit of another in front, of 3; or two of 2, of which the lower belong to the first word, and the
    upper to the second. The words are equal if there is just one.
    """
    byte = torch.arange(256, device=levels.device)
    numbers = levels.half().view(torch.int16).long() & 0xFFFF
    mask = 2**order.bits - 1
    words = [numbers[byte >> shift & mask] | numbers[byte >> shift + 4 & mask] << 16 for shift in (0, 2)]
    if order.bits != 2:
        words[1] = words[0]
    return torch.stack([(word + 2**31) % 2**32 - 2**31 for word in words]).int()


def _codebooks(quantizer: Quantizer) -> dict[int, Codebook]:
    if isinstance(quantizer, MixedQuantizer):
        return quantizer.codebooks
    assert isinstance(quantizer, ChannelQuantizer | TokenQuantizer)
    return {int(quantizer.scheme.bits): quantizer.codebook}
