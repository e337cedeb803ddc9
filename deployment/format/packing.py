"""Codes to 32-bit words and back, at exactly `bits` bits per code.

32 codes fill `bits` words. The bits of a code are split into planes whose widths are powers of two (3 = 2 + 1), and
a plane of width w fills w words with 32 / w fields each, so that unpacking is a shift and a mask at every width:

    bits = 4    word 0: codes 0..7     word 1: codes 8..15    word 2: codes 16..23    word 3: codes 24..31
    bits = 3    word 0: low 2 bits of codes 0..15    word 1: of codes 16..31    word 2: high bit of codes 0..31

Within a word the first code has the lowest bits. A word's bytes are little-endian on every device we know, so the
torch code below shifts bytes, a quarter of the traffic; no field crosses a byte.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

GROUP = 32  # codes that fill whole words at any width
WORD_BYTES = 4
_PLANE_WIDTHS = (8, 4, 2, 1)
_WIDE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Plane:
    """`width` bits of every code, from bit `shift` on; earlier planes of a group hold as many words as bits."""

    width: int
    shift: int

    @property
    def mask(self) -> int:
        """The plane's bits, shifted down."""
        return (1 << self.width) - 1

    @property
    def bytes_of_group(self) -> slice:
        """Where the plane lies among the bytes of a group's words."""
        return slice(WORD_BYTES * self.shift, WORD_BYTES * (self.shift + self.width))

    def offsets(self, device: torch.device) -> Tensor:
        """Bit offsets of the fields of a byte."""
        return torch.arange(0, 8, self.width, dtype=torch.uint8, device=device)


def planes(bits: int) -> Iterator[Plane]:
    """The planes of a code of 1 to 8 bits, widest first: the binary digits of `bits`."""
    shift = 0
    for width in _PLANE_WIDTHS:
        if bits & width:
            yield Plane(width, shift)
            shift += width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words `[..., n / 32 * bits]` int32 of codes `[..., n]` uint8, each below 2^bits.

    Raises ValueError unless n is a multiple of 32.
    """
    if codes.shape[-1] % GROUP:
        raise ValueError(f"{codes.shape[-1]} codes do not fill whole groups of {GROUP}")
    groups = codes.unflatten(-1, (-1, GROUP))
    packed = []
    for plane in planes(bits):
        fields = (groups >> plane.shift & plane.mask).unflatten(-1, (WORD_BYTES * plane.width, -1))
        # fields do not overlap, so their sum is their union
        packed.append((fields << plane.offsets(codes.device)).sum(-1, dtype=torch.uint8))
    return torch.cat(packed, dim=-1).flatten(-2).view(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes `[..., n]` uint8 of words `[..., n / 32 * bits]` int32; inverse of `pack`."""
    groups = words.contiguous().view(torch.uint8).unflatten(-1, (-1, WORD_BYTES * bits))
    codes = None
    for plane in planes(bits):
        held = groups[..., plane.bytes_of_group]
        fields = _fields_of_byte(plane, words.device).index_select(0, held.flatten().int())
        part = fields.view(torch.uint8).view(*held.shape[:-1], GROUP) << plane.shift
        codes = part if codes is None else codes.bitwise_or_(part)
    assert codes is not None
    return codes.flatten(-2)


@cache
def _fields_of_byte(plane: Plane, device: torch.device) -> Tensor:
    """For each of the 256 bytes its fields as consecutive bytes, `[256]` of an integer that holds them all."""
    every_byte = torch.arange(256, device=device).to(torch.uint8)
    fields = every_byte[:, None] >> plane.offsets(device) & plane.mask
    return fields.contiguous().view(_WIDE[fields.shape[1]]).flatten()
