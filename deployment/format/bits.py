"""Bit positions of one token's codes within the words of its block, for storing a single token.

A block's words are the union of what its tokens put there: whatever the order (order.py), every bit of every code has one
place. The places are found by asking the order itself: words whose bit p is digit d of the number p unpack to codes
whose bits are digit d of their own place, so one `unpack` for each digit tells all places.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from deployment.format.groups import GroupOrder
from deployment.format.order import Order
from quant.storage import BLOCK_TOKENS

_WORD = 32


@dataclass(frozen=True)
class Places:
    """Of all bits of the codes of one token: `word` and `shift`, `[64, n]`, and which bit of which code they are, `[n]`."""

    word: Tensor  # int32
    shift: Tensor  # int32
    channel: Tensor  # int64
    bit: Tensor  # int32
    taken: Tensor  # [64, W] int32: all bits of a token

    @classmethod
    def of(cls, order: Order, device: torch.device) -> "Places":
        """Those of an order's blocks."""
        places = torch.arange(order.words * _WORD, device=device)
        everywhere = order.unpack(_words(torch.ones_like(places)))  # [64, C]
        bits = torch.arange(8, dtype=torch.uint8, device=device)
        channel, bit = ((everywhere[0][:, None] >> bits) & 1).nonzero(as_tuple=True)
        found = torch.zeros(BLOCK_TOKENS, len(channel), dtype=torch.int64, device=device)
        for digit in range(len(places).bit_length()):
            codes = order.unpack(_words(places >> digit & 1))
            found |= (codes[:, channel] >> bits[bit] & 1).long() << digit
        word, shift = (found // _WORD).int(), (found % _WORD).int()
        taken = torch.zeros(BLOCK_TOKENS, order.words, dtype=torch.int32, device=device)
        taken.scatter_add_(1, word.long(), torch.ones_like(shift) << shift)
        return cls(word, shift, channel, bit.int(), taken)

    def store(self, words: Tensor, token: int, codes: Tensor) -> Tensor:
        """Words `[R, W]` of a block with the codes `[R, C]` uint8 of one of its tokens, whatever was there before."""
        bits = (codes.int().index_select(1, self.channel) >> self.bit & 1) << self.shift[token]
        # no two bits share a place, so that their sum is their union
        return (words & ~self.taken[token]).index_add_(1, self.word[token], bits)


def _words(bits: Tensor) -> Tensor:
    """Words `[n / 32]` int32 of bits `[n]`, lowest first."""
    weights = 1 << torch.arange(_WORD, device=bits.device)
    return (bits.view(-1, _WORD) * weights).sum(-1).to(torch.int32)


@cache
def places_of(order: GroupOrder) -> Places:
    """`Places.of`, remembered: about a megabyte, which layers share that share their order."""
    return Places.of(order, order.device)
