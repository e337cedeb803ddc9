"""Codes to 32-bit words and back, at exactly `bits` bits per code.

32 codes fill `bits` words. The bits of a code are split into planes whose widths are powers of two (3 = 2 + 1), and
a plane of width w fills w words with 32 / w fields each, so that unpacking is a shift and a mask at every width:

    bits = 4    word 0: codes 0..7     word 1: codes 8..15    word 2: codes 16..23    word 3: codes 24..31
    bits = 3    word 0: low 2 bits of codes 0..15    word 1: of codes 16..31    word 2: high bit of codes 0..31

Within a word the first code has the lowest bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

WORD_BITS = 32
GROUP = WORD_BITS  # codes that fill whole words at any width


@dataclass(frozen=True)
class Plane:
    """`width` bits of every code, from bit `shift` on, in `width` words of a group from word `word` on."""

    width: int
    shift: int

    @property
    def words(self) -> slice:
        """Where in a group's words the plane lies: earlier planes hold as many words as bits."""
        return slice(self.shift, self.shift + self.width)

    @property
    def fields(self) -> int:
        """Codes that share a word."""
        return WORD_BITS // self.width


def planes(bits: int) -> Iterator[Plane]:
    """The planes of a code, widest first: the binary digits of `bits`."""
    shift = 0
    for exponent in reversed(range(bits.bit_length())):
        width = 1 << exponent
        if bits & width:
            yield Plane(width, shift)
            shift += width


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words `[..., n / 32 * bits]` int32 of codes `[..., n]` of any integer dtype, each below 2^bits.

    Raises ValueError unless n is a multiple of 32.
    """
    if codes.shape[-1] % GROUP:
        raise ValueError(f"{codes.shape[-1]} codes do not fill whole groups of {GROUP}")
    groups = codes.unflatten(-1, (-1, GROUP)).int()
    words = [
        ((groups >> plane.shift & (1 << plane.width) - 1).unflatten(-1, (plane.width, plane.fields)) << _offsets(plane, codes.device))
        # fields do not overlap, so the sum is their union
        .sum(-1, dtype=torch.int32)
        for plane in planes(bits)
    ]
    return torch.cat(words, dim=-1).flatten(-2)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes `[..., n]` int32 of words `[..., n / 32 * bits]`; inverse of `pack`."""
    groups = words.unflatten(-1, (-1, bits))
    codes = torch.zeros((), dtype=torch.int32, device=words.device)
    for plane in planes(bits):
        fields = groups[..., plane.words, None] >> _offsets(plane, words.device) & (1 << plane.width) - 1
        codes = codes | (fields.flatten(-2) << plane.shift)
    return codes.flatten(-2)


def _offsets(plane: Plane, device: torch.device) -> Tensor:
    return torch.arange(0, WORD_BITS, plane.width, dtype=torch.int32, device=device)
