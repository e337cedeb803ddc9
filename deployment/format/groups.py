"""Groups of 16 channels that share a width, in the order in which a tensor core wants their codes.

A tensor core's `m16n8k16` takes from each lane l of a warp, r = l div 4 and c = l mod 4, the elements of rows r and r +
8 and of columns 2 c + {0, 1, 8, 9} of its first operand. That operand is 16 tokens x 16 channels of keys for the
scores, 16 channels x 16 tokens of values for the output. So a lane has 32 codes of every group and block:

    keys     code 4 v + i      token 8 v + r              channel 2 c + (0, 1, 8, 9)[i] of the group     v = 0 ... 7
    values   code 16 h + t     token 16 c + t             channel 8 h + r of the group                   (any order of tokens does)

The 32 codes are eight nibbles of four words, code 8 n + j in nibble j of word n, if they have 4 bits. Other widths are
made of planes of 4, 2 and 1 bits, widest first, as in packing.py (3 = 2 + 1): a plane of p bits of a group takes p
words a lane, which lie side by side, and

    plane of 4 bits    word n                nibble j                    has all of code 8 n + j
    plane of 2 bits    word n div 2          nibble j, upper half if n is odd
    plane of 1 bit     the only word         nibble j, bit n

so that a shift and a mask make a word of eight nibbles of any of them. A group of w bits takes 32 w words. Groups of
keys come in pairs, the first halves of 16 rotary pairs and their second halves, so that a rotation needs no other lane.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deployment.format.packing import pack, planes, unpack
from gradients.models import Kind
from quant.scheme import GROUP_CHANNELS
from quant.storage import BLOCK_TOKENS

LANES = 32
MOST_BITS = 6
_LANE_CODES = 32  # of a group and block
_EVERY_NIBBLE = 0x11111111


@dataclass(frozen=True, eq=False)
class GroupOrder:
    """Groups of 16 channels one after another, head by head.

    `widths` `[G, D / 16]` int64, at most 6. `channels` `[G, D]` int64: which channel of its head comes where, 16 to a
    group. Groups of keys hold the first halves of rotary pairs, and every second one the others of the group before.
    Raises ValueError for something else.
    """

    widths: Tensor
    channels: Tensor
    kind: Kind

    def __post_init__(self) -> None:
        heads, dim = self.channels.shape
        every = torch.arange(dim, device=self.channels.device).expand(heads, -1)
        if dim % (2 * GROUP_CHANNELS) or self.widths.shape != (heads, dim // GROUP_CHANNELS):
            raise ValueError(f"widths {tuple(self.widths.shape)} of channels {tuple(self.channels.shape)}")
        if not torch.equal(self.channels.sort(dim=1).values, every) or not int(self.widths.min()) >= 0:
            raise ValueError("every channel of a head has one place in a group of 0 bits or more")
        if int(self.widths.max()) > MOST_BITS:
            raise ValueError(f"groups of {int(self.widths.max())} bits; {MOST_BITS} at most")

    @property
    def heads(self) -> int:
        """G."""
        return self.channels.shape[0]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.channels.shape[1]

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.channels.device

    @cached_property
    def words(self) -> int:
        """Words of a block."""
        return LANES * int(self.widths.sum())

    @cached_property
    def offsets(self) -> Tensor:
        """First word of every group in a block, `[G, D / 16]` int64."""
        sizes = LANES * self.widths.flatten()
        return (sizes.cumsum(0) - sizes).view_as(self.widths)

    @cached_property
    def slots(self) -> Tensor:
        """The inverse of `channels`."""
        return self.channels.argsort(dim=1)

    @cached_property
    def occurring(self) -> tuple[int, ...]:
        """The widths that occur, ascending."""
        return tuple(self.widths.unique().tolist())

    @cached_property
    def _columns(self) -> list[tuple[int, Tensor, Tensor]]:
        """For every width that occurs but 0: its groups `[n]`, and their words `[n, 32 w]`."""
        widths, columns = self.widths.flatten(), []
        for width in filter(None, self.occurring):
            group = (widths == width).nonzero()[:, 0]
            within = torch.arange(LANES * width, device=self.device)
            columns.append((width, group, self.offsets.flatten()[group][:, None] + within))
        return columns

    @cached_property
    def _codes(self) -> Tensor:
        """Which code, token * C + channel, is in which nibble, group by group and lane by lane: `[64 C]` int32."""
        lane, code = torch.meshgrid(torch.arange(LANES), torch.arange(_LANE_CODES), indexing="ij")
        token, channel = (table.flatten().to(self.device) for table in place_of_code(lane, code, self.kind))
        head = torch.arange(self.heads, device=self.device)[:, None, None]
        own = self.channels.unflatten(1, (-1, GROUP_CHANNELS))[..., channel] + head * self.head_dim
        return (token * (self.heads * self.head_dim) + own).flatten().int()

    @cached_property
    def _places(self) -> Tensor:
        return self._codes.argsort().int()

    def pack(self, codes: Tensor) -> Tensor:
        """Words `[..., W]` int32 of codes `[..., 64, C]` uint8."""
        ordered = _gathered(codes.flatten(-2), self._codes).unflatten(-1, (-1, LANES * _LANE_CODES))
        words = torch.empty(*codes.shape[:-2], self.words, dtype=torch.int32, device=codes.device)
        for width, group, columns in self._columns:
            own = ordered if len(group) == ordered.shape[-2] else ordered[..., group, :]
            packed = [
                _narrowed(pack(own >> 4 * (plane.shift // 4) & 15, 4), plane.width, plane.shift % 4)
                for plane in planes(width)
            ]
            words[..., columns] = torch.cat(packed, dim=-1)
        return words

    def unpack(self, words: Tensor) -> Tensor:
        """Codes `[..., 64, C]` uint8 of words `[..., W]`; inverse of `pack`."""
        groups = self.widths.numel()
        ordered = torch.zeros(*words.shape[:-1], groups, LANES * _LANE_CODES, dtype=torch.uint8, device=words.device)
        for width, group, columns in self._columns:
            own = words.unflatten(-1, columns.shape) if len(group) == groups else words[..., columns]
            codes = _codes_of_words(own, width)
            if len(group) == groups:
                ordered = codes
            else:
                ordered[..., group, :] = codes
        return _gathered(ordered.flatten(-2), self._places).unflatten(-1, (BLOCK_TOKENS, -1))


def _codes_of_words(words: Tensor, width: int) -> Tensor:
    """Codes `[..., 1024]` uint8 of groups `[..., 32 w]` of `width` bits, in the order of nibbles."""
    parts: list[Tensor | None] = [None, None]  # nibbles of the lower four bits, and of the others
    for plane in planes(width):
        held = words[..., LANES * plane.shift : LANES * (plane.shift + plane.width)]
        nibbles, number = _widened(held, plane.width, plane.shift % 4), plane.shift // 4
        before = parts[number]
        parts[number] = nibbles if before is None else before.bitwise_or_(nibbles)
    low, high = parts
    assert low is not None
    codes = unpack(low, 4)
    return codes if high is None else codes | unpack(high, 4) << 4


def _narrowed(nibbles: Tensor, bits: int, shift: int) -> Tensor:
    """Words `[..., 32 p]` of a plane of p `bits` of a group, from bit `shift` of nibbles `[..., 128]` on, four words a lane."""
    if bits == 4:
        return nibbles
    fields = (nibbles >> shift & _EVERY_NIBBLE * (2**bits - 1)).unflatten(-1, (-1, 4 // bits))
    moves = bits * torch.arange(4 // bits, dtype=torch.int32, device=nibbles.device)
    return (fields << moves).sum(-1, dtype=torch.int32)


def _widened(words: Tensor, bits: int, shift: int) -> Tensor:
    """The inverse of `_narrowed`: nibbles `[..., 128]` with a plane in its place and zeros beside it."""
    if bits == 4:
        return words
    moves = bits * torch.arange(4 // bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> moves & _EVERY_NIBBLE * (2**bits - 1)) << shift).flatten(-2)


def place_of_code(lane: Tensor, code: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """(token of the block, channel of the group) of a lane's codes 0, ..., 31, as the table above says."""
    row, column = lane // 4, lane % 4
    if kind == "key":
        return 8 * (code // 4) + row, 2 * column + code % 2 + 8 * (code // 2 % 2)
    return 16 * column + code % 16, 8 * (code // 16) + row


def half_words(order: GroupOrder) -> tuple[Tensor, Tensor]:
    """For a reader that takes a head's codes row by row, where a row is a token of keys or a channel of values.

    Of the 16-bit halves of the words of nibbles, [D / 16, 32 lanes, 4 words, 2], returns (`which` `[M, R]`: half m of
    row r, `columns` `[M, 4]`: which channel or token its nibbles are), both int32, the same for all rows, and of head
    0.
    """
    head_codes = order._codes.view(order.heads, -1, 4)[0].cpu()  # of every half
    token, channel = head_codes // (order.heads * order.head_dim), head_codes % order.head_dim
    row, column = (token, channel) if order.kind == "key" else (channel, token)
    rows = BLOCK_TOKENS if order.kind == "key" else order.head_dim
    key = row.long() * BLOCK_TOKENS * order.head_dim + column  # halves of a row in the order of their columns
    which = key[:, 0].argsort().view(rows, -1).T
    return which.int().contiguous(), column[which[:, 0]].int().contiguous()


def _gathered(rows: Tensor, places: Tensor) -> Tensor:
    """`rows` `[..., n]` in the order of `places` `[n]`: as one flat list, many times faster on a CPU than row by row."""
    first = torch.arange(0, rows.numel(), rows.shape[-1], dtype=torch.int32, device=rows.device)
    return rows.flatten().index_select(0, (first[:, None] + places).flatten()).view(rows.shape)
