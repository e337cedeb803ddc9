"""Cosines of one and sines of zero that a model multiplies by, and nothing is computed."""

import torch
from torch import Tensor

from deployment.step.unrotated import unrotated


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _tables(batch: int = 1, tokens: int = 5, channels: int = 8) -> tuple[Tensor, Tensor]:
    angles = torch.randn(batch, tokens, channels)
    return unrotated(angles.cos(), angles.sin())


def test_what_a_model_rotates_is_the_same_tensor() -> None:
    cos, sin = (table.to("cpu").unsqueeze(1) for table in _tables())
    x = torch.randn(2, 3, 5, 8)
    turned = (x * cos) + (_rotate_half(x) * sin)
    assert turned.data_ptr() == x.data_ptr() and type(turned) is Tensor
    assert ((cos * x) + (sin * _rotate_half(x))).data_ptr() == x.data_ptr()


def test_whatever_else_is_done_gives_what_ones_and_zeros_give() -> None:
    cos, sin = _tables()
    ones, zeros = torch.ones(1, 5, 8), torch.zeros(1, 5, 8)
    x, narrow = torch.randn(2, 5, 8), torch.randn(5, 1)
    for own, plain in ((cos, ones), (sin, zeros)):
        for found, expected in (
            (own + 1, plain + 1),
            (x - own, x - plain),
            (x + own, x + plain),
            (own * narrow, plain * narrow),
            (own + narrow, plain + narrow),
            (own * x.double(), plain * x.double()),
            (own[..., :4], plain[..., :4]),
            (torch.cat([own, own]), torch.cat([plain, plain])),
            ((own * x).sum(), (plain * x).sum()),
            ((own * x) @ x.mT, (plain * x) @ x.mT),
        ):
            assert type(found) is not type(own) and found.dtype == expected.dtype
            torch.testing.assert_close(found.as_subclass(Tensor), expected)
    assert torch.equal((sin * x).as_subclass(Tensor), torch.zeros_like(x)) and (sin * x).shape == x.shape
