"""A token stored bit by bit against blocks that are packed whole."""

import pytest
import torch

from deployment.format.bits import Places, places_of
from deployment.format.groups import GroupOrder
from deployment.format.order import ChannelOrder, Order, rotary_groups, uniform_order

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
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_one_by_one_equals_at_once(bits: int, dim: int, role: str) -> None:
    order = uniform_order(bits, HEADS, dim, role, dim // 2, torch.device("cpu"))
    codes = torch.randint(2**bits, (3, 64, HEADS * dim), dtype=torch.uint8)
    assert torch.equal(stored_one_by_one(order, codes), order.pack(codes))


def test_channels_of_several_widths() -> None:
    widths = torch.tensor([0, 1, 2, 3, 4, 0, 8, 3])
    order = ChannelOrder(widths)
    codes = (torch.randint(256, (2, 64, 8)) % (1 << widths)).to(torch.uint8)
    assert torch.equal(stored_one_by_one(order, codes), order.pack(codes))


def test_groups_of_several_widths() -> None:
    widths = torch.tensor([[4, 0, 3, 1], [2, 6, 0, 5]])
    channels = torch.stack([rotary_groups(torch.randperm(32).tolist(), 24) for _ in range(HEADS)])
    order = GroupOrder(widths, channels, "key")
    of_channels = torch.zeros(HEADS, 64, dtype=torch.int64).scatter(1, channels, widths.repeat_interleave(16, 1))
    codes = (torch.randint(256, (2, 64, HEADS * 64)) % (1 << of_channels.flatten())).to(torch.uint8)
    assert torch.equal(stored_one_by_one(order, codes), order.pack(codes))


def test_layers_share_their_places() -> None:
    one, other = (uniform_order(3, 2, 64, "key", 32, torch.device("cpu")) for _ in range(2))
    assert places_of(one) is places_of(other)
