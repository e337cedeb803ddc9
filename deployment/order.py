"""In which order the codes of a block lie in its words.

A block is 64 tokens of all KV heads, and its words `[W]` are the heads' words one after another. Two orders exist:

- `ChannelOrder`: channel after channel, each with its own number of bits. Any head dimension, any widths.
- `FragmentOrder`: for one width of 2, 3 or 4 bits and head dimensions of 64, 128 and 256. Lane by lane, each gets
  the codes that a tensor core wants from it, so that the decode kernel unpacks operands in registers.

A tensor core's `m16n8k16` takes from each lane l of a warp the elements k = 2 (l mod 4) + {0, 1} and + {8, 9} of row
n = l div 4 of its second operand. That operand is K^T (k: channel, n: token) for the scores, V (k: token,
n: channel) for the output. A *unit* is what one lane unpacks at once: 8 nibbles a word (packing.py). Keys hold the two
halves of the rotary pairs (c, c + D/2) in one unit, so that the rotation needs no other lane.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from deployment.packing import GROUP, pack, pack_spare_bits, unpack, unpack_spare_bits
from quant.quantizer import Quantizer
from quant.storage import BLOCK_TOKENS

Role = Literal["key", "value"]

LANES = 32
NIBBLES = 8  # of a word
_UNIT_CODES = {2: 16, 3: 32, 4: 8}
_MAX_VECTOR = 4  # words that a lane loads at once: 16 bytes
_HEAD_DIMS = (64, 128, 256)


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


@dataclass(frozen=True)
class FragmentOrder:
    """Unit after unit, those of lanes side by side; see `fragment_index` for which codes a unit holds."""

    bits: int
    heads: int
    head_dim: int
    role: Role
    device: torch.device

    @staticmethod
    def takes(bits: int, head_dim: int) -> bool:
        """Whether codes of `bits` bits of heads of this size can be laid out so."""
        return bits in _UNIT_CODES and head_dim in _HEAD_DIMS

    @cached_property
    def words(self) -> int:
        """Words of a block."""
        return self.heads * self.head_dim * BLOCK_TOKENS * self.bits // 32

    @cached_property
    def geometry(self) -> "Fragment":
        """How the units tile a head."""
        return Fragment.of(self.bits, self.head_dim, self.role)

    @property
    def _tables(self) -> tuple[Tensor, Tensor]:
        return _fragment_tables(self.bits, self.head_dim, self.role, self.device)

    def pack(self, codes: Tensor) -> Tensor:
        """Words `[..., W]` int32 of codes `[..., 64, C]` uint8."""
        by_head = codes.unflatten(-1, (self.heads, self.head_dim)).transpose(-2, -3).flatten(-2)
        ordered = by_head.index_select(-1, self._tables[0])
        words = pack_spare_bits(ordered) if self.bits == 3 else pack(ordered, self.bits)
        return words.flatten(-2)

    def unpack(self, words: Tensor) -> Tensor:
        """Codes `[..., 64, C]` uint8 of words `[..., W]`; inverse of `pack`."""
        by_head = words.unflatten(-1, (self.heads, -1))
        ordered = unpack_spare_bits(by_head) if self.bits == 3 else unpack(by_head, self.bits)
        return _gathered(ordered.flatten(-2), self._places).unflatten(-1, (BLOCK_TOKENS, self.heads * self.head_dim))

    @property
    def _places(self) -> Tensor:
        return _places_of_block(self.bits, self.heads, self.head_dim, self.role, self.device)


@dataclass(frozen=True)
class Fragment:
    """How the units of one head's block tile the operand, k by n elements, that `warps` warps share.

    A unit holds `halves` x `slots_n` x `slots_k` pairs of codes; every lane has `tiles_n` x `tiles_k` units, `vector` of
    which are neighbours in memory. For keys k counts pairs (c, c + D/2), and halves are its two sides.
    """

    role: Role
    head_dim: int
    warps: int
    halves: int
    slots_k: int
    slots_n: int
    tiles_k: int
    tiles_n: int

    @classmethod
    def of(cls, bits: int, head_dim: int, role: Role) -> "Fragment":
        """The tiling that both the torch path and the kernels use."""
        warps, halves = (8 if head_dim > 128 else 4), (2 if role == "key" else 1)
        k, n = (head_dim // 2, BLOCK_TOKENS) if role == "key" else (BLOCK_TOKENS, head_dim)
        slots = _UNIT_CODES[bits] // 2 // halves
        slots_k = min(slots, k // 8)
        slots_n = slots // slots_k
        return cls(role, head_dim, warps, halves, slots_k, slots_n, k // 8 // slots_k, n // (8 * warps) // slots_n)

    @property
    def vector(self) -> int:
        """Neighbouring words of a lane."""
        return min(self.tiles_k * self.tiles_n, _MAX_VECTOR)

    @property
    def units(self) -> int:
        """Units of one head's block."""
        return self.tiles_k * self.tiles_n * self.warps * LANES

    def constants(self) -> tuple[int, ...]:
        """What the kernels must know, in the order in which `arrange` (kernels/tiles.py) wants it."""
        sizes = (self.halves, self.slots_n, self.slots_k, self.tiles_n, self.tiles_k)
        return (*sizes, self.vector, self.warps)

    def index(self) -> Tensor:
        """For every unit and code in it, the element it stands for: token * D + channel, `[U, unit codes]` int64."""
        per_lane = self.tiles_k * self.tiles_n
        sizes = (per_lane // self.vector, self.warps, 4, 2, 4, self.vector, self.halves, self.slots_n, self.slots_k, 2)
        axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
        repeat, warp, lane_34, lane_2, lane_01, word, half, slot_n, slot_k, element = axes
        unit = repeat * self.vector + word
        k = (((unit % self.tiles_k) * self.slots_k + slot_k) * 4 + lane_01) * 2 + element
        n = (((unit // self.tiles_k) * self.slots_n + slot_n) * self.warps + warp) * 8 + lane_34 * 2 + lane_2
        token, channel = (n, k + half * (self.head_dim // 2)) if self.role == "key" else (k, n)
        return (token * self.head_dim + channel).reshape(self.units, -1)


def fragment_index(order: FragmentOrder) -> Tensor:
    """`Fragment.index` as the append kernel reads it, `[U, unit codes]` int32 on the order's device."""
    return _fragment_index(order.bits, order.head_dim, order.role, order.device)


@cache
def _fragment_index(bits: int, head_dim: int, role: Role, device: torch.device) -> Tensor:
    return Fragment.of(bits, head_dim, role).index().int().contiguous().to(device)


def fragment_place(order: FragmentOrder) -> Tensor:
    """The inverse of `fragment_index`: where element token * D + channel comes, unit * unit codes + number, `[64 D]`."""
    return _fragment_place(order.bits, order.head_dim, order.role, order.device)


@cache
def _fragment_place(bits: int, head_dim: int, role: Role, device: torch.device) -> Tensor:
    return Fragment.of(bits, head_dim, role).index().flatten().argsort().int().to(device)


@cache
def _fragment_tables(bits: int, head_dim: int, role: Role, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of a head's codes (token * D + channel) comes where, in the order in which `pack` wants them; its inverse."""
    index = Fragment.of(bits, head_dim, role).index()  # [U, unit codes]
    if bits == 2:  # the fields of a word are the two halves of its nibbles in turn
        index = index.unflatten(1, (2, NIBBLES)).transpose(1, 2).flatten(1)
    if bits == 3:  # word p of all units, then word p + 1; the codes in the spare bits last
        index = index.unflatten(1, (4, NIBBLES)).transpose(0, 1)
    source = index.flatten()
    return source.to(device), source.argsort().to(device)


@cache
def _places_of_block(bits: int, heads: int, head_dim: int, role: Role, device: torch.device) -> Tensor:
    """Where element token * C + channel of a block is among the unpacked codes of all its heads, `[64 C]` int32."""
    place = _fragment_tables(bits, head_dim, role, device)[1].view(BLOCK_TOKENS, 1, head_dim)
    first = torch.arange(heads, device=device)[:, None] * (BLOCK_TOKENS * head_dim)
    return (first + place).flatten().int()


def _gathered(rows: Tensor, places: Tensor) -> Tensor:
    """`rows` `[..., n]` in the order of `places` `[n]`: as one flat list, many times faster on a CPU than row by row."""
    first = torch.arange(0, rows.numel(), rows.shape[-1], dtype=torch.int32, device=rows.device)
    return rows.flatten().index_select(0, (first[:, None] + places).flatten()).view(rows.shape)


def fragment_words(order: FragmentOrder) -> tuple[Tensor, Tensor]:
    """For a reader that takes a head's words row by row, where a row is a token of keys or a channel of values.

    Returns (`which` `[M, R]`: word m of row r, `columns` `[M, fields]`: which channel or token its fields are), both int32
    and the same for all rows. Words are those of `pack`; at 3 bits, three quarters of them, then those of the spare bits.
    """
    return _fragment_words(order.bits, order.head_dim, order.role, order.device)


@cache
def _fragment_words(bits: int, head_dim: int, role: Role, device: torch.device) -> tuple[Tensor, Tensor]:
    source = _fragment_tables(bits, head_dim, role, torch.device("cpu"))[0]
    fields = source.view(-1, 2 * NIBBLES if bits == 2 else NIBBLES)
    token, channel = fields // head_dim, fields % head_dim
    row, column = (token, channel) if role == "key" else (channel, token)
    rows = BLOCK_TOKENS if role == "key" else head_dim
    which = row[:, 0].argsort(stable=True).view(rows, -1).T
    return which.int().contiguous().to(device), column[which[:, 0]].int().contiguous().to(device)


def order_of(quantizer: Quantizer, heads: int, head_dim: int, role: Role, fragments: bool = True) -> Order:
    """The order in which a quantizer's codes are stored; with `fragments` false always channel after channel."""
    widths = torch.zeros(heads * head_dim, dtype=torch.int64)
    for width, chosen in quantizer.channels.items():
        widths[chosen if isinstance(chosen, slice) else chosen.cpu()] = width
    device = quantizer_device(quantizer)
    bits = int(widths[0])
    if fragments and (widths == bits).all() and FragmentOrder.takes(bits, head_dim):
        return FragmentOrder(bits, heads, head_dim, role, device)
    return ChannelOrder(widths.to(device))


def quantizer_device(quantizer: Quantizer) -> torch.device:
    """Where a quantizer's tables are."""
    return next(iter(quantizer.tables.values())).device
