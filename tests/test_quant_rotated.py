"""The rotated quantizer: an orthogonal rotation, the published levels and distortions, and arithmetic done by hand."""

import math

import pytest
import torch
from conftest import gaussian
from torch import Tensor

from quant.codebook import Codebook
from quant.quantizer import TokenQuantizer
from quant.rotated import RotatedQuantizer, gaussian_codebook, random_rotation
from quant.scheme import Scheme
from quant.side import Side, fit_side

# Max, "Quantizing for minimum distortion" (1960), table I
LLOYD_MAX = {
    2: [0.7980],
    4: [0.4528, 1.510],
    8: [0.2451, 0.7560, 1.344, 2.152],
    16: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
DISTORTION = {2: 0.3634, 4: 0.1175, 8: 0.03454, 16: 0.009497}


def rotated(bits: int, dim: int) -> RotatedQuantizer:
    return RotatedQuantizer(Scheme.parse(f"turbo{bits}"), gaussian_codebook(2**bits), random_rotation(dim))


def round_trip(quantizer: RotatedQuantizer, x: Tensor) -> Tensor:
    return quantizer.decode(quantizer.encode(x))


def gaussian_distortion(book: Codebook) -> float:
    """Mean squared error of a standard normal, by the midpoint rule."""
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    error = x - book.decode(book.encode(x.float())).double()
    return float((density * error**2).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("dim", [1, 2, 12, 16, 20, 64, 96, 128, 256])
def test_rotation_is_orthogonal(dim: int) -> None:
    rotation = random_rotation(dim)
    assert rotation.shape == (dim, dim) and rotation.dtype == torch.float32
    assert torch.allclose(rotation @ rotation.T, torch.eye(dim), atol=1e-5)
    x = gaussian(7, dim)
    assert torch.allclose((x @ rotation).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_rotation_spreads_every_channel_evenly_where_it_can(dim: int) -> None:
    rotation = random_rotation(dim)
    assert torch.allclose(rotation.abs(), torch.full((dim, dim), dim**-0.5), rtol=1e-6)
    # the first column of a Hadamard matrix is constant: the signs are random
    assert 0 < int((rotation[:, 0] > 0).sum()) < dim


@pytest.mark.parametrize("dim", [20, 64])
def test_rotation_is_always_the_same_and_leaves_other_draws_alone(dim: int) -> None:
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    one = random_rotation(dim)
    assert torch.equal(torch.randn(3), expected)
    assert torch.equal(random_rotation(dim), one)


@pytest.mark.parametrize("levels", list(LLOYD_MAX))
def test_levels_are_the_published_ones(levels: int) -> None:
    positive = LLOYD_MAX[levels]
    book = gaussian_codebook(levels)
    expected = torch.tensor([-x for x in reversed(positive)] + positive)
    assert torch.allclose(book.levels, expected, atol=2e-3), book.levels
    if levels == 2:
        assert book.levels.tolist() == pytest.approx([-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)], abs=2e-4)


@pytest.mark.parametrize("levels", list(DISTORTION))
def test_distortion_of_a_gaussian_is_the_published_one(levels: int) -> None:
    assert gaussian_distortion(gaussian_codebook(levels)) == pytest.approx(DISTORTION[levels], rel=2e-3)


@pytest.mark.parametrize("dim", [20, 64, 96, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gaussian_heads_err_as_the_levels_promise(bits: int, dim: int) -> None:
    x = gaussian(1, 3000, 2 * dim, seed=dim) * 5
    error = float((round_trip(rotated(bits, dim), x) - x).square().mean() / x.square().mean())
    # a vector divided by its norm is a little less than Gaussian: the bound of the distortion is approached from below
    assert 1 - 4 / dim < error / DISTORTION[2**bits] < 1.02


@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lopsided_heads_err_no_more_than_gaussian_ones(bits: int, dim: int) -> None:
    """A few large channels are what keys have; integers per token suffer from them, rotated levels do not."""
    sizes = torch.ones(dim)
    sizes[[3, 17, 22, 40, 59, 60]] = torch.tensor([15.0, 4.0, 9.0, 12.0, 6.0, 20.0])
    x = gaussian(1, 3000, dim) * sizes
    error = float((round_trip(rotated(bits, dim), x) - x).square().sum(-1).div(x.square().sum(-1)).mean())
    assert error < 1.1 * DISTORTION[2**bits]
    plain = TokenQuantizer(Scheme.parse(f"int{bits}"), Codebook.from_levels(torch.linspace(-1, 1, 2**bits)))
    worse = float((plain.decode(plain.encode(x)) - x).square().sum(-1).div(x.square().sum(-1)).mean())
    assert worse > 1.5 * error


@pytest.mark.parametrize("dim", [20, 64])
def test_round_trip_by_hand(dim: int) -> None:
    """Head by head and token by token in float64."""
    quantizer, x = rotated(3, dim), gaussian(2, 5, 3 * dim) * 4
    encoded = quantizer.encode(x)
    decoded = quantizer.decode(encoded)
    levels, rotation = quantizer.codebook.levels.double(), quantizer.rotation.double()
    for row in range(2):
        for token in range(5):
            for head in range(3):
                channels = slice(head * dim, (head + 1) * dim)
                vector = x[row, token, channels].double()
                scale = (vector.norm() / math.sqrt(dim)).half().double()
                assert encoded.scale[row, token, head].double() == pytest.approx(float(scale), rel=1e-3)
                scale = encoded.scale[row, token, head].double()
                nearest = ((vector @ rotation / scale)[:, None] - levels).abs().argmin(-1)
                assert torch.equal(encoded.codes[row, token, channels].long(), nearest)
                expected = rotation @ (levels[nearest] * scale)
                assert torch.allclose(decoded[row, token, channels].double(), expected, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_encoding_has_the_promised_form(tokens: int) -> None:
    quantizer, x = rotated(2, 20), gaussian(3, tokens, 40)
    original = x.clone()
    encoded = quantizer.encode(x)
    assert torch.equal(x, original)
    assert encoded.codes.shape == (3, tokens, 40) and encoded.codes.dtype == torch.uint8
    assert encoded.scale.shape == (3, tokens, 2) and encoded.scale.dtype == torch.float16
    assert encoded.outliers is None and encoded.exact is None and encoded.zero is None
    decoded = quantizer.decode(encoded)
    assert decoded.shape == (3, tokens, 40) and decoded.dtype == torch.float32


def test_nothing_stays_nothing() -> None:
    x = torch.zeros(1, 3, 40)
    x[0, 1] = 1e-9  # its norm is zero as fp16
    assert torch.equal(round_trip(rotated(2, 20), x), torch.zeros(1, 3, 40))


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "token"])
def test_fitting_turns_every_head_alike_and_looks_at_no_data(per_channel: bool) -> None:
    scheme = Scheme.parse("turbo3")
    one, other = (
        fit_side(Side(gaussian(64, 40, seed=seed).half(), torch.ones(64, 40).bfloat16(), 64, 20), scheme, per_channel)
        for seed in (0, 1)
    )
    assert isinstance(one, RotatedQuantizer) and one.rotation.shape == (20, 20)
    assert set(one.tables) == {"levels", "boundaries", "rotation"}
    assert one.channels == {3: slice(None)}
    for name, table in one.tables.items():
        assert table.dtype == torch.float32 and torch.equal(table, other.tables[name]), name
