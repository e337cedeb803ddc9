"""Codes to words and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployment.format.packing import GROUP, pack, planes, unpack


def hexadecimal(words: torch.Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08x}" for word in words.tolist()]


def test_four_bit_words_read_from_the_right() -> None:
    codes = torch.arange(32, dtype=torch.uint8) % 16
    assert hexadecimal(pack(codes, 4)) == ["76543210", "fedcba98", "76543210", "fedcba98"]


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one() -> None:
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[0], codes[1], codes[31] = 0b101, 0b010, 0b111
    # low bits 01 and 10 in word 0, 11 at the top of word 1; high bits of codes 0 and 31 in word 2
    assert hexadecimal(pack(codes, 3)) == ["00000009", "c0000000", "80000001"]


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_cover_every_bit_once(bits: int) -> None:
    covered = [bit for plane in planes(bits) for bit in range(plane.shift, plane.shift + plane.width)]
    assert covered == list(range(bits))


@pytest.mark.parametrize("bits", range(1, 9))
@given(data=st.data())
def test_unpack_inverts_pack_in_exactly_the_promised_words(bits: int, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 5))
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=GROUP * groups, max_size=GROUP * groups))
    tensor = torch.tensor(codes, dtype=torch.uint8).expand(2, -1)
    words = pack(tensor, bits)
    assert words.dtype == torch.int32 and words.shape == (2, groups * bits)
    assert torch.equal(unpack(words, bits), tensor)


def test_unpack_reads_a_strided_slice() -> None:
    codes = torch.randint(0, 8, (4, 6, 64), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, 3)[:, 1:3], 3), codes[:, 1:3])


def test_codes_that_fill_no_whole_group_are_refused() -> None:
    with pytest.raises(ValueError, match="33 codes"):
        pack(torch.zeros(33, dtype=torch.uint8), 4)
