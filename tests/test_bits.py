"""A token stored bit by bit against blocks that are packed whole."""

import pytest
import torch

from deployment.bits import Places, places_of
from deployment.order import ChannelOrder, FragmentOrder, Order

HEADS = 2


def stored_one_by_one(order: Order, codes: torch.Tensor) -> torch.Tensor:
    """Words of a block whose words held anything before."""
    words = torch.randint(-(2**31), 2**31 - 1, (codes.shape[0], order.words), dtype=torch.int32)
    places = Places.of(order, codes.device)
    for token in range(codes.shape[1]):
        words = places.store(words, token, codes[:, token])
    return words


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_by_one_equals_at_once(bits: int, dim: int, role: str) -> None:
    order = FragmentOrder(bits, HEADS, dim, role, torch.device("cpu"))
    codes = torch.randint(2**bits, (3, 64, HEADS * dim), dtype=torch.uint8)
    assert torch.equal(stored_one_by_one(order, codes), order.pack(codes))


def test_channels_of_several_widths() -> None:
    widths = torch.tensor([0, 1, 2, 3, 4, 0, 8, 3])
    order = ChannelOrder(widths)
    codes = (torch.randint(256, (2, 64, 8)) % (1 << widths)).to(torch.uint8)
    assert torch.equal(stored_one_by_one(order, codes), order.pack(codes))


def test_layers_share_their_places() -> None:
    device = torch.device("cpu")
    assert places_of(FragmentOrder(3, 2, 64, "key", device)) is places_of(FragmentOrder(3, 2, 64, "key", device))
