"""Encoding and decoding: exact where it can be, and outliers, scales and constants as stored."""

import math

import pytest
import torch
from conftest import gaussian
from torch import Tensor

from quant.codebook import Codebook, int_codebook, nf_codebook
from quant.outliers import outliers_per_end
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer, as_stored
from quant.scheme import Scheme
from quant.side import Side, fit_side

TOKENS = [1, 31, 33, 257]
CHANNELS = 40  # not a multiple of 32


def dyadic_codebook(bits: int) -> Codebook:
    """Levels and boundaries with short binary fractions, both ends included, so that float32 loses nothing."""
    levels = 2**bits
    return Codebook.from_levels(torch.cat([torch.arange(levels - 1) * 2 / levels - 1, torch.ones(1)]))


def random_codes(tokens: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (2, tokens, CHANNELS), generator=torch.Generator().manual_seed(tokens))


def calibrated(name: str, per_channel: bool, x: Tensor, **options: object) -> Quantizer:
    """Fitted to `[N, C]` with equal weights."""
    return fit_side(Side(x.half(), torch.ones_like(x).bfloat16()), Scheme.parse(name, **options), per_channel)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_channel_round_trip_is_exact_on_the_levels(bits: int, tokens: int) -> None:
    book, codes = dyadic_codebook(bits), random_codes(tokens, bits)
    scale = torch.exp2(torch.arange(CHANNELS) % 7 - 3.0)
    zero = torch.arange(CHANNELS) / 4 - 3
    x = book.levels[codes] * scale + zero
    quantizer = ChannelQuantizer(Scheme.parse(f"int{bits}-1%"), book, scale, zero)
    encoded = quantizer.encode(x)
    assert torch.equal(encoded.codes, codes.to(torch.uint8))
    assert encoded.outlier_count == 0
    assert torch.equal(quantizer.decode(encoded), x)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_token_round_trip_is_exact_on_the_levels(bits: int, tokens: int) -> None:
    book, codes = dyadic_codebook(bits), random_codes(tokens, bits)
    codes[..., 0], codes[..., -1] = 0, 2**bits - 1  # the range takes in every token's extremes
    scale = torch.exp2(torch.arange(tokens) % 7 - 3.0)[:, None]
    zero = torch.arange(tokens)[:, None] / 4 - 3
    x = book.levels[codes] * scale + zero
    quantizer = TokenQuantizer(Scheme.parse(f"int{bits}"), book)
    encoded = quantizer.encode(x)
    assert torch.equal(encoded.codes, codes.to(torch.uint8))
    assert torch.equal(encoded.scale, scale.half().expand(2, -1, -1))
    assert torch.equal(encoded.zero, zero.half().expand(2, -1, -1))
    assert torch.equal(quantizer.decode(encoded), x)


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "token"])
@pytest.mark.parametrize("name", ["int2", "nf3-1%", "nuq4-2%"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_encoding_has_the_promised_form(tokens: int, name: str, per_channel: bool) -> None:
    quantizer = calibrated(name, per_channel, gaussian(300, CHANNELS))
    x = gaussian(3, tokens, CHANNELS, seed=1) * 1.5
    original = x.clone()
    encoded = quantizer.encode(x)
    assert torch.equal(x, original)
    assert encoded.codes.shape == x.shape
    assert encoded.codes.dtype == torch.uint8
    assert int(encoded.codes.max()) < quantizer.scheme.levels
    assert (encoded.outliers is None) == (encoded.exact is None) == (quantizer.scheme.outliers == 0)
    assert (encoded.scale is None) == (encoded.zero is None) == per_channel
    if not per_channel:
        assert encoded.scale.shape == encoded.zero.shape == (3, tokens, 1)
        assert encoded.scale.dtype == encoded.zero.dtype == torch.float16
    assert quantizer.decode(encoded).dtype == torch.float32


def test_channel_outliers_lie_beyond_the_range_and_are_exact_in_fp16() -> None:
    quantizer = calibrated("nuq3-2%", True, gaussian(500, CHANNELS))
    x = gaussian(257, CHANNELS, seed=1) * 1.2
    encoded = quantizer.encode(x)
    beyond = ((x - quantizer.zero) / quantizer.scale).abs() > 1
    assert torch.equal(encoded.outliers, beyond)
    assert torch.equal(encoded.exact, x[beyond].half())
    assert 0 < encoded.outlier_count == encoded.exact.numel() < x.numel() // 5
    decoded = quantizer.decode(encoded)
    assert torch.equal(decoded[beyond], x[beyond].half().float())
    # what stays is within half a step of its value, so outliers were not merely clamped
    assert ((decoded - x).abs() <= quantizer.scale)[~beyond].all()


def test_channel_range_ends_are_no_outliers() -> None:
    quantizer = ChannelQuantizer(Scheme.parse("int2-1%"), int_codebook(4), torch.tensor([2.0]), torch.tensor([1.0]))
    encoded = quantizer.encode(torch.tensor([[-1.0], [3.0], [3.0001], [-1.0001]]))
    assert encoded.outliers.flatten().tolist() == [False, False, True, True]


def test_without_a_share_of_outliers_what_lies_beyond_is_clamped() -> None:
    quantizer = ChannelQuantizer(Scheme.parse("int2"), int_codebook(4), torch.tensor([2.0]), torch.tensor([1.0]))
    assert quantizer.decode(quantizer.encode(torch.tensor([[-9.0], [99.0]]))).flatten().tolist() == [-1.0, 3.0]


def test_outlier_cap_clamps_the_others() -> None:
    scheme = Scheme.parse("int2-1%", outlier_cap=2)
    quantizer = ChannelQuantizer(scheme, int_codebook(4), torch.tensor([1.0, 1.0, 1.0, 4.0]), torch.zeros(4))
    x = torch.tensor([[3.0, -2.0, 5.0, 8.0], [0.5, -7.0, 0.5, 0.5]])  # distances 3 2 5 2; 7
    encoded = quantizer.encode(x)
    assert encoded.outliers.tolist() == [[True, False, True, False], [False, True, False, False]]
    assert encoded.exact.tolist() == [3.0, 5.0, -7.0]
    assert quantizer.decode(encoded)[0].tolist() == [3.0, -1.0, 5.0, 4.0]


@pytest.mark.parametrize("tokens", TOKENS)
def test_token_outliers_are_the_extremes_even_under_ties(tokens: int) -> None:
    quantizer = TokenQuantizer(Scheme.parse("int3-10%"), int_codebook(8))
    per_end = outliers_per_end(CHANNELS, 0.1)
    assert per_end == 2
    x = gaussian(tokens, CHANNELS).mul(2).round()
    encoded = quantizer.encode(x)
    assert torch.equal(encoded.outliers.sum(-1), torch.full((tokens,), 2 * per_end))
    assert torch.equal(quantizer.decode(encoded)[encoded.outliers], x[encoded.outliers])
    rest = x.masked_fill(encoded.outliers, math.nan)
    for token in range(tokens):
        kept = rest[token][~encoded.outliers[token]]
        assert x[token].sort().values[per_end:-per_end].tolist() == kept.sort().values.tolist()
        assert float(encoded.scale[token]) == float(kept.max() - kept.min()) / 2
        assert float(encoded.zero[token]) == float(kept.max() + kept.min()) / 2


def test_token_scales_are_used_as_stored_on_both_sides() -> None:
    quantizer = TokenQuantizer(Scheme.parse("nf4"), nf_codebook(16))
    x = gaussian(257, CHANNELS) * 3 + 7.3
    encoded = quantizer.encode(x)
    scale, zero = encoded.scale.float(), encoded.zero.float()
    exact_scale, exact_zero = (x.amax(-1) - x.amin(-1))[:, None] / 2, (x.amax(-1) + x.amin(-1))[:, None] / 2
    stored = quantizer.codebook.encode((x - zero) / scale)
    assert torch.equal(encoded.codes, stored)
    assert torch.equal(quantizer.decode(encoded), quantizer.codebook.decode(stored) * scale + zero)
    # the test would say nothing if rounding the scales moved no code
    assert not torch.equal(stored, quantizer.codebook.encode((x - exact_zero) / exact_scale))


@pytest.mark.parametrize("name", ["int2", "nf3-2%", "nuq4-2%", "nuq2"])
def test_constant_channels_are_exact(name: str) -> None:
    x = gaussian(300, CHANNELS).half().float()
    x[:, 3], x[:, 17], x[:, 39] = 0.0, -2.625, 1e-4
    x = x.half().float()
    quantizer = calibrated(name, True, x)
    decoded = quantizer.decode(quantizer.encode(x))
    for channel in (3, 17, 39):
        assert torch.equal(decoded[:, channel], x[:, channel])
    assert decoded.isfinite().all()
    # a newcomer to a constant channel is an outlier, or takes the constant
    newcomer = quantizer.decode(quantizer.encode(torch.full((1, CHANNELS), 0.5)))
    assert newcomer[0, 17] == (0.5 if quantizer.scheme.outliers else -2.625)


@pytest.mark.parametrize("name", ["int2", "nf3-2%", "nuq4"])
def test_constant_tokens_are_exact(name: str) -> None:
    quantizer = calibrated(name, False, gaussian(300, CHANNELS))
    x = torch.tensor([0.0, 1.5, -3.25, 0.1])[:, None].expand(4, CHANNELS)
    assert torch.equal(quantizer.decode(quantizer.encode(x)), x.half().float())


def test_stored_numbers_saturate() -> None:
    assert as_stored(torch.tensor([1e6, -1e6, 1.0])).tolist() == [65504.0, -65504.0, 1.0]
    quantizer = ChannelQuantizer(Scheme.parse("int2-1%"), int_codebook(4), torch.ones(1), torch.zeros(1))
    assert quantizer.decode(quantizer.encode(torch.tensor([[1e6]]))).item() == 65504.0


def test_all_who_ask_for_a_device_share_one_copy() -> None:
    """Or else every simulated forward would move and check its quantizers anew, and wait for the device each time."""
    own = TokenQuantizer(Scheme.parse("nuq2"), dyadic_codebook(2))
    copy = own.to("cpu")
    assert own.to(torch.device("cpu")) is copy
    assert torch.equal(copy.codebook.levels, own.codebook.levels) and copy.scheme == own.scheme
