"""What the kernels must know of a quantizer: its tables, channel by channel, whatever kind it is."""

from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from deployment.format.groups import GroupOrder
from deployment.format.order import ChannelOrder, Order, quantizer_device
from quant.codebook import Codebook
from quant.mixed import MixedQuantizer
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.scheme import GROUP_CHANNELS


@dataclass(frozen=True)
class Tables:
    """One layer's keys or values; where the range is dynamic `scale`, `zero` and `floor` are all zeros."""

    levels: Tensor  # [sum of L] float32, the codebooks one after another
    boundaries: Tensor  # [sum of L - 1] float32, at least one number
    scale: Tensor  # [C] float32
    zero: Tensor  # [C] float32
    floor: Tensor  # [C] float32: what code 0 decodes to
    width: Tensor  # [C] int32
    offset: Tensor  # [C] int32: first word in a block, of the channel or of its group
    slot: Tensor  # [C] int32: where a channel comes within its head
    channel: Tensor  # [C] int32: the inverse
    first_level: Tensor  # [C] int32: where the channel's codebook begins in levels
    first_boundary: Tensor  # [C] int32: and in boundaries
    planes: int  # union of the binary digits of all widths
    widest: int
    lowest: float  # the first level

    @classmethod
    def of(cls, quantizer: Quantizer, order: Order, channels: int) -> "Tables":
        """The tables of a quantizer whose codes lie in `order`."""
        device = quantizer_device(quantizer)
        codebooks = codebooks_of(quantizer)
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
        offset, slot, channel = _places(order, channels, device)
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
            slot=slot.int(),
            channel=channel.int(),
            first_level=first_level.int(),
            first_boundary=first_boundary.int(),
            planes=reduce(or_, occurring, 0),
            widest=max(occurring),
            lowest=float(all_levels[0].half()),
        )


@dataclass(frozen=True)
class FeedbackTables:
    """How errors are handed on, as of `Feedback` (quant/feedback.py)."""

    order: Tensor  # [G, D] int32: which channel of the head comes i-th
    matrix: Tensor  # [G, D, D] fp16, in that order

    @classmethod
    def of(cls, quantizer: Quantizer) -> "FeedbackTables | None":
        """The tables of a quantizer, if it has feedback."""
        feedback = getattr(quantizer, "feedback", None)
        return None if feedback is None else cls(feedback.order.int().contiguous(), feedback.matrix.contiguous())


def _places(order: Order, channels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(offset, slot, channel) `[C]` int64, as of `Tables`."""
    if isinstance(order, GroupOrder):
        offset = order.offsets.gather(1, order.slots // GROUP_CHANNELS)
        return offset.flatten(), order.slots.flatten(), order.channels.flatten()
    assert isinstance(order, ChannelOrder)
    number = torch.arange(channels, device=device)
    return order.offsets, number, number


def codebooks_of(quantizer: Quantizer) -> dict[int, Codebook]:
    """By width, in the order in which `levels` has them."""
    if isinstance(quantizer, MixedQuantizer):
        return quantizer.codebooks
    assert isinstance(quantizer, ChannelQuantizer | TokenQuantizer)
    return {int(quantizer.scheme.bits): quantizer.codebook}
