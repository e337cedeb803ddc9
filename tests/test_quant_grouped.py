"""Ranges of groups: every group is quantized as if it were alone, whatever the axis and however short the last one is."""

import pytest
import torch
from conftest import gaussian
from torch import Tensor

from quant.codebook import fit_codebook, nf_codebook
from quant.grouped import GroupQuantizer, group_ranges
from quant.kmeans import Histogram
from quant.outliers import outliers_per_end
from quant.quantizer import Encoded, TokenQuantizer
from quant.scheme import Axis, Scheme

CHANNELS = 40  # not a multiple of 32
AXES: list[Axis] = ["channel", "token"]


def grouped(name: str, axis: Axis, group: int | None = None) -> GroupQuantizer:
    scheme = Scheme.parse(name, group=group, channel_range="online")
    return GroupQuantizer(scheme, fit_codebook(scheme.datatype, scheme.levels, Histogram.empty(-1, 1)), axis)


def per_token(name: str) -> TokenQuantizer:
    scheme = Scheme.parse(name)
    return TokenQuantizer(scheme, fit_codebook(scheme.datatype, scheme.levels, Histogram.empty(-1, 1)))


def round_trip(quantizer: GroupQuantizer | TokenQuantizer, x: Tensor) -> Tensor:
    return quantizer.decode(quantizer.encode(x))


def assert_same(one: Encoded, other: Encoded) -> None:
    for name, table in vars(one).items():
        twin = getattr(other, name)
        assert (table is None) == (twin is None), name
        assert table is None or (table.dtype == twin.dtype and torch.equal(table, twin)), name


@pytest.mark.parametrize("tokens", [0, 1, 31, 257])
@pytest.mark.parametrize("name", ["int2", "nf3", "nf4-2%", "int3-10%"])
def test_one_group_per_token_is_the_token_quantizer(name: str, tokens: int) -> None:
    x = gaussian(2, tokens, CHANNELS) * 3 + 1.7
    one, other = grouped(name, "token"), per_token(name)
    assert_same(one.encode(x), other.encode(x))
    assert torch.equal(round_trip(one, x), round_trip(other, x))


@pytest.mark.parametrize("group", [None, 8, 33], ids=["whole", "group 8", "group 33"])
@pytest.mark.parametrize("name", ["int2", "nf4-2%"])
def test_channels_are_transposed_tokens(name: str, group: int | None) -> None:
    x = gaussian(2, 60, CHANNELS) * torch.exp2(torch.arange(CHANNELS) % 5 - 2.0)
    along_tokens, along_channels = grouped(name, "channel", group), grouped(name, "token", group)
    one, other = along_tokens.encode(x), along_channels.encode(x.mT.contiguous())
    assert torch.equal(one.codes, other.codes.mT)
    assert torch.equal(one.scale, other.scale.mT)
    assert torch.equal(one.zero, other.zero.mT)
    assert (one.outliers is None) == (other.outliers is None) == (name == "int2")
    assert one.outliers is None or torch.equal(one.outliers, other.outliers.mT)
    assert torch.equal(along_tokens.decode(one), along_channels.decode(other).mT)
    # transposing matters: a token's range is not a channel's
    assert not torch.allclose(along_tokens.decode(one), round_trip(along_channels, x), atol=1e-2)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("group", [2, 8, 16, 35, 1000])
@pytest.mark.parametrize("name", ["int3", "nf3-10%"])
def test_every_group_is_quantized_as_if_it_were_alone(name: str, group: int, axis: Axis) -> None:
    """35 elements: the last group has 1, 3 or 3 elements where groups have 2, 8 or 16."""
    if name == "nf3-10%" and group == 2:
        group = 5  # two outliers are all of a group of 2
    dim = -2 if axis == "channel" else -1
    x = gaussian(2, 35, 35) * torch.exp2(torch.arange(35) % 7 - 3.0)
    quantizer, alone = grouped(name, axis, group), grouped(name, axis)
    encoded = quantizer.encode(x)
    decoded = quantizer.decode(encoded)
    pieces = [alone.encode(piece) for piece in x.split(group, dim)]
    assert torch.equal(encoded.codes, torch.cat([piece.codes for piece in pieces], dim))
    assert torch.equal(encoded.scale, torch.cat([piece.scale for piece in pieces], dim))
    assert torch.equal(encoded.zero, torch.cat([piece.zero for piece in pieces], dim))
    assert torch.equal(decoded, torch.cat([alone.decode(piece) for piece in pieces], dim))
    assert group >= 35 or not torch.allclose(decoded, round_trip(alone, x), atol=1e-2)


@pytest.mark.parametrize(
    ("axis", "shape", "group", "scales"),
    [
        pytest.param("token", (2, 5, 24), None, (2, 5, 1), id="token whole"),
        pytest.param("token", (2, 5, 24), 24, (2, 5, 1), id="token one group"),
        pytest.param("token", (2, 5, 24), 100, (2, 5, 1), id="token group too long"),
        pytest.param("token", (2, 5, 24), 8, (2, 5, 3), id="token even"),
        pytest.param("token", (2, 5, 24), 7, (2, 5, 4), id="token ragged"),
        pytest.param("token", (2, 0, 24), 7, (2, 0, 4), id="token no tokens"),
        pytest.param("channel", (2, 64, 24), None, (2, 1, 24), id="channel whole"),
        pytest.param("channel", (2, 64, 24), 32, (2, 2, 24), id="channel even"),
        pytest.param("channel", (2, 65, 24), 32, (2, 3, 24), id="channel ragged"),
        pytest.param("channel", (2, 1, 24), 32, (2, 1, 24), id="channel one token"),
        pytest.param("channel", (2, 0, 24), 32, (2, 0, 24), id="channel no tokens"),
        pytest.param("channel", (2, 0, 24), None, (2, 0, 24), id="channel whole, no tokens"),
        pytest.param("channel", (5, 24), 2, (3, 24), id="no batch"),
    ],
)
def test_encoded_tensors_have_the_promised_shapes(
    axis: Axis, shape: tuple[int, ...], group: int | None, scales: tuple[int, ...]
) -> None:
    quantizer, x = grouped("int2", axis, group), gaussian(*shape)
    encoded = quantizer.encode(x)
    assert encoded.codes.shape == shape and encoded.codes.dtype == torch.uint8
    assert encoded.scale.shape == encoded.zero.shape == scales
    assert encoded.scale.dtype == encoded.zero.dtype == torch.float16
    assert encoded.outliers is None and encoded.exact is None
    decoded = quantizer.decode(encoded)
    assert decoded.shape == shape and decoded.dtype == torch.float32 and decoded.isfinite().all()


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_integers_hit_both_ends_of_every_group(bits: int, axis: Axis) -> None:
    """Whole numbers of a few bits: ends, scale and zero are exact in fp16, and so must be what is decoded there."""
    group = 8
    x = torch.randint(-60, 61, (2, 24, 40), generator=torch.Generator().manual_seed(bits)).float()
    quantizer = grouped(f"int{bits}", axis, group)
    encoded = quantizer.encode(x)
    decoded = quantizer.decode(encoded)
    rows, codes, back = (
        (t.mT if axis == "channel" else t).unflatten(-1, (-1, group)) for t in (x, encoded.codes, decoded)
    )
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    at_low, at_high = rows == low, rows == high
    assert (codes[at_low] == 0).all() and (codes[at_high] == 2**bits - 1).all()
    assert torch.equal(back[at_low], rows[at_low]) and torch.equal(back[at_high], rows[at_high])
    # the grid between them is KIVI's: min + n (max - min) / (2^bits - 1), and every element takes its nearest point
    step = (high - low) / (2**bits - 1)
    assert torch.allclose(back, low + codes.float() * step, atol=1e-4)
    assert ((back - rows).abs() <= step / 2 + 1e-4).all()


@pytest.mark.parametrize("axis", AXES)
def test_outliers_are_the_extremes_of_their_group_and_exact(axis: Axis) -> None:
    group, share = 10, 0.1
    per_end = outliers_per_end(group, share)
    assert per_end == 1
    quantizer, x = grouped("int3-10%", axis, group), gaussian(2, 40, 40, seed=3).mul(4).round()  # with many ties
    encoded = quantizer.encode(x)
    decoded = quantizer.decode(encoded)
    assert torch.equal(decoded[encoded.outliers], x[encoded.outliers])
    assert torch.equal(encoded.exact, x[encoded.outliers].half())
    rows, mask, scale, zero = (
        (t.mT if axis == "channel" else t) for t in (x, encoded.outliers, encoded.scale, encoded.zero)
    )
    rows, mask = rows.unflatten(-1, (-1, group)), mask.unflatten(-1, (-1, group))
    assert (mask.sum(-1) == 2 * per_end).all()
    kept = rows.sort(-1).values[..., per_end:-per_end]
    assert torch.equal(scale.float(), (kept[..., -1] - kept[..., 0]) / 2)
    assert torch.equal(zero.float(), (kept[..., -1] + kept[..., 0]) / 2)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ["int2", "nf3-10%"])
def test_constant_groups_are_kept(name: str, axis: Axis) -> None:
    x = gaussian(32, 32)
    x[:16, :16] = 0.1
    decoded = round_trip(grouped(name, axis, 16), x)
    assert torch.equal(decoded[:16, :16], x[:16, :16].half().float())
    assert decoded.isfinite().all()


@pytest.mark.parametrize("axis", AXES)
def test_scales_are_used_as_stored_on_both_sides(axis: Axis) -> None:
    quantizer, x = grouped("nf4", axis, 16), gaussian(2, 64, 64) * 3 + 7.3
    encoded = quantizer.encode(x)
    dim = -2 if axis == "channel" else -1
    scale, zero = (table.float().repeat_interleave(16, dim) for table in (encoded.scale, encoded.zero))
    assert torch.equal(encoded.codes, quantizer.codebook.encode((x - zero) / scale))
    assert torch.equal(quantizer.decode(encoded), quantizer.codebook.decode(encoded.codes) * scale + zero)


def test_ranges_by_hand() -> None:
    x = torch.tensor([[1.0, 3.0, 10.0, 20.0, 7.0], [0.0, 8.0, -2.0, 2.0, -7.0]])
    outliers, scale, zero = group_ranges(x, "token", 2, 0.0)
    assert outliers is None
    assert scale.tolist() == [[1.0, 5.0, 0.0], [4.0, 2.0, 0.0]]
    assert zero.tolist() == [[2.0, 15.0, 7.0], [4.0, 0.0, -7.0]]
    _, scale, zero = group_ranges(x, "channel", 2, 0.0)
    assert scale.tolist() == [[0.5, 2.5, 6.0, 9.0, 7.0]]
    assert zero.tolist() == [[0.5, 5.5, 4.0, 11.0, 0.0]]


@pytest.mark.parametrize("tokens", [0, 1, 2, 33, 34])
def test_short_groups_with_outliers(tokens: int) -> None:
    quantizer = GroupQuantizer(Scheme.parse("datafree4", group=32), nf_codebook(16), "channel")
    x = torch.randn(2, tokens, 24, generator=torch.Generator().manual_seed(0))
    decoded = quantizer.decode(quantizer.encode(x))
    assert decoded.shape == x.shape and decoded.isfinite().all()
