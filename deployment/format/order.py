"""In which order the codes of a block lie in its words.

A block is 64 tokens of all KV heads, and its words `[W]` are the heads' words one after another. Two orders exist:

- `ChannelOrder`: channel after channel, each with its own number of bits. Any head dimension, any widths.
- `GroupOrder`: groups of 16 channels with a width each, 0 to 6 bits, lane by lane as a tensor core wants them, so that
  the decode kernel unpacks operands in registers (groups.py). Which channels share a group is part of the order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

import torch
from torch import Tensor

from deployment.format.groups import MOST_BITS, GroupOrder
from deployment.format.packing import GROUP, pack, unpack
from gradients.models import Kind
from quant.grouping import are_groups, rotary_pairs
from quant.mixed import MixedQuantizer
from quant.quantizer import Quantizer
from quant.scheme import GROUP_CHANNELS
from quant.storage import BLOCK_TOKENS


class Order(Protocol):
    """Where codes lie: `words` is W."""

    @property
    def words(self) -> int: ...  # noqa: D102
    def pack(self, codes: Tensor) -> Tensor: ...  # noqa: D102
    def unpack(self, words: Tensor) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class ChannelOrder:
    """Channels one after another: 64 codes of w bits take 2 w words. `widths` `[C]` int64, 0 for no codes at all."""

    widths: Tensor

    @cached_property
    def offsets(self) -> Tensor:
        """First word of every channel, `[C]` int64."""
        sizes = self.widths * (BLOCK_TOKENS // GROUP)
        return sizes.cumsum(0) - sizes

    @cached_property
    def words(self) -> int:
        """Words of a block."""
        return int(self.widths.sum()) * BLOCK_TOKENS // GROUP

    @cached_property
    def _columns(self) -> list[tuple[int, Tensor, Tensor]]:
        """For every width that occurs: its channels, and their words `[n, 2 w]`."""
        columns = []
        for width in self.widths.unique().tolist():
            if width:
                channels = (self.widths == width).nonzero()[:, 0]
                within = torch.arange(BLOCK_TOKENS // GROUP * width, device=channels.device)
                columns.append((width, channels, self.offsets[channels][:, None] + within))
        return columns

    def pack(self, codes: Tensor) -> Tensor:
        """Words `[..., W]` int32 of codes `[..., 64, C]` uint8."""
        words = torch.empty(*codes.shape[:-2], self.words, dtype=torch.int32, device=codes.device)
        for width, channels, columns in self._columns:
            words[..., columns] = pack(codes[..., channels].transpose(-1, -2).contiguous(), width)
        return words

    def unpack(self, words: Tensor) -> Tensor:
        """Codes `[..., 64, C]` uint8 of words `[..., W]`; inverse of `pack`."""
        shape = (*words.shape[:-1], BLOCK_TOKENS, len(self.widths))
        codes = torch.zeros(shape, dtype=torch.uint8, device=words.device)
        for width, channels, columns in self._columns:
            codes[..., channels] = unpack(words[..., columns], width).transpose(-1, -2)
        return codes


def rotary_groups(pairs: Sequence[int], rotary_half: int) -> Tensor:
    """Channels of a head of keys, `[D]` int64: pairs, in the order given, 16 to two groups.

    Of D/2 pairs the first `rotary_half` are channels (p, p + rotary_half), the others, which do not rotate, are alike:
    see phase.py.
    """
    channels = torch.from_numpy(rotary_pairs(2 * len(pairs), rotary_half))[torch.as_tensor(pairs)]
    return channels.view(-1, GROUP_CHANNELS, 2).transpose(1, 2).flatten()


@cache
def usual_channels(heads: int, head_dim: int, kind: Kind, rotary_half: int, device: torch.device) -> Tensor:
    """Channels in their own order, but keys in pairs: `GroupOrder.channels` where nothing else is asked for."""
    keys = kind == "key"
    head = rotary_groups(range(head_dim // 2), rotary_half) if keys else torch.arange(head_dim)
    return head.expand(heads, -1).contiguous().to(device)


@cache
def uniform_order(
    bits: int, heads: int, head_dim: int, kind: Kind, rotary_half: int, device: torch.device
) -> GroupOrder:
    """All groups of one width; layers share the order and what it remembers."""
    widths = torch.full((heads, head_dim // GROUP_CHANNELS), bits, device=device)
    return GroupOrder(widths, usual_channels(heads, head_dim, kind, rotary_half, device), kind)


def order_of(
    quantizer: Quantizer,
    heads: int,
    head_dim: int,
    kind: Kind,
    rotary_half: int | None = None,
    channels: Tensor | None = None,
) -> Order:
    """The order in which a quantizer's codes are stored: in groups if their channels have one width and keys lie in pairs, else by channel.

    `rotary_half` is half of the channels that rotate, None for all. `channels` `[G, D]` int64 are as of `GroupOrder`;
    None for those that the quantizer has formed groups of, if it has.
    """
    device = quantizer_device(quantizer)
    half = head_dim // 2 if rotary_half is None else rotary_half
    widths = torch.zeros(heads * head_dim, dtype=torch.int64)
    for width, chosen in quantizer.channels.items():
        widths[chosen if isinstance(chosen, slice) else chosen.cpu()] = width
    if head_dim % (2 * GROUP_CHANNELS) or int(widths.max()) > MOST_BITS:
        return ChannelOrder(widths.to(device))
    if channels is None and isinstance(quantizer, MixedQuantizer) and quantizer.places is not None:
        channels = quantizer.places.long()
    if channels is None and (widths == widths[0]).all():
        return uniform_order(int(widths[0]), heads, head_dim, kind, half, device)
    places = usual_channels(heads, head_dim, kind, half, torch.device("cpu")) if channels is None else channels.cpu()
    grouped = widths.view(heads, head_dim).gather(1, places).view(heads, -1, GROUP_CHANNELS)
    paired = kind == "value" or are_groups(places.numpy(), rotary_pairs(head_dim, half))
    if not paired or (grouped != grouped[..., :1]).any():
        return ChannelOrder(widths.to(device))
    return GroupOrder(grouped[..., 0].to(device), places.to(device), kind)


def quantizer_device(quantizer: Quantizer) -> torch.device:
    """Where a quantizer's tables are."""
    return next(iter(quantizer.tables.values())).device
