"""Decode attention in C against the torch path, which other tests pin to float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.format.groups import half_words
from deployment.format.order import uniform_order
from deployment.layer import PackedLayer
from deployment.rope import Rope
from deployment.step import native
from deployment.step.append import append
from deployment.step.attend import attend_with_torch
from gradients.cli import UserError
from gradients.models import decoder
from quant.codebook import int_codebook, nf_codebook
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.scheme import Scheme

pytestmark = pytest.mark.skipif(native._library() is None, reason="no C compiler")


def quantizer(axis: str, bits: int, share: float, channels: int) -> Quantizer:
    scheme = Scheme(datatype="nf", bits=bits, outliers=share)
    if axis == "token":
        return TokenQuantizer(scheme, nf_codebook(2**bits))
    generator = torch.Generator().manual_seed(bits)
    scale = torch.rand(channels, generator=generator) + 0.5
    scale[1] = 0.0  # a constant channel
    return ChannelQuantizer(scheme, int_codebook(2**bits), scale, torch.randn(channels, generator=generator))


def both_ways(
    monkeypatch: pytest.MonkeyPatch,
    rope: Rope,
    axes: tuple[str, str] = ("channel", "token"),
    bits: tuple[int, int] = (4, 4),
    share: float = 0.05,
    dim: int = 64,
    lengths: tuple[int, ...] = (300,),
    queries: int = 1,
    exact_chunk: bool = True,
) -> tuple[Tensor, Tensor]:
    """One attention step of 4 query heads and 2 KV heads, in C and in torch."""
    heads, generator = 2, torch.Generator().manual_seed(7)
    sides = [quantizer(axis, width, share, heads * dim) for axis, width in zip(axes, bits, strict=True)]
    layer = PackedLayer(*sides, sink_tokens=1, exact_chunk=exact_chunk)
    longest = max(lengths)
    for start, end in ((0, longest // 2), (longest // 2, longest)):  # so that pages grow
        states = [torch.randn(len(lengths), heads, end - start, dim, generator=generator) for _ in range(2)]
        padding = [min(max(longest - length - start, 0), end - start) for length in lengths]
        layer.update(*states)
        append(layer, *states, padding)
    assert layer.lengths == list(lengths)
    query, *chunk = (torch.randn(len(lengths), h, queries, dim, generator=generator) for h in (4, heads, heads))
    before = layer.lengths if exact_chunk else [length - queries for length in lengths]
    outputs = []
    for switch in ("1", "0"):
        monkeypatch.setenv(native.VARIABLE, switch)
        assert native.takes(layer, query) == (switch == "1")
        given = tuple(chunk) if exact_chunk else None
        outputs.append(attend_with_torch(layer, rope, query, given, [0] * len(lengths), 0.125, before))
    return outputs[0], outputs[1]


def assert_close(mine: Tensor, expected: Tensor) -> None:
    """To rounding in float32, that of angles of a thousand radians included."""
    assert (mine - expected).norm() < 3e-6 * expected.norm()


@pytest.fixture
def rope_of(make_model) -> Callable[[int], Rope]:
    def make(dim: int) -> Rope:
        model = make_model("llama")
        config = model.config.__class__.from_dict({**model.config.to_dict(), "head_dim": dim})
        return Rope(type(decoder(model).rotary_emb)(config))

    return make


@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (4, 2)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_all_widths_and_head_sizes_agree_with_torch(monkeypatch, rope_of, bits: tuple[int, int], dim: int) -> None:
    mine, expected = both_ways(monkeypatch, rope_of(dim), bits=bits, dim=dim)
    assert_close(mine, expected)


@pytest.mark.parametrize("axes", [("channel", "channel"), ("token", "token"), ("token", "channel")])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_all_axes_and_outliers_agree_with_torch(monkeypatch, rope_of, axes: tuple[str, str], share: float) -> None:
    mine, expected = both_ways(monkeypatch, rope_of(64), axes=axes, share=share)
    assert_close(mine, expected)


@pytest.mark.parametrize("exact_chunk", [True, False])
def test_batches_and_several_queries_agree_with_torch(monkeypatch, rope_of, exact_chunk: bool) -> None:
    mine, expected = both_ways(
        monkeypatch, rope_of(64), lengths=(1200, 130, 70), queries=4, exact_chunk=exact_chunk, share=0.1
    )
    assert_close(mine, expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("role", ["key", "value"])
def test_every_row_has_its_words(bits: int, role: str) -> None:
    """What row 0 says of its columns must hold for all rows, and every element must occur once."""
    for dim in (64, 128, 256):
        order = uniform_order(bits, 1, dim, role, dim // 2, torch.device("cpu"))
        which, columns = half_words(order)
        codes = torch.randint(0, 2**bits, (64, dim), generator=torch.Generator().manual_seed(dim)).to(torch.uint8)
        nibbles = uniform_order(4, 1, dim, role, dim // 2, torch.device("cpu")).pack(codes)
        halves = nibbles.view(torch.int16).int()
        fields = halves[which.long()][..., None] >> 4 * torch.arange(4) & 15
        tile = torch.empty(columns.numel(), which.shape[1], dtype=torch.int64)
        tile[columns.flatten().long()] = fields.transpose(1, 2).flatten(0, 1).long()
        assert torch.equal(tile, (codes.T if role == "key" else codes).long())


def test_without_a_compiler_torch_does_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="there is no C library .*no-such-compiler.* torch attends"):
        assert native._library.__wrapped__() is None


def test_a_variable_that_says_something_else_is_refused(llama, quantizers, make_tokens, monkeypatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "yes")
    with packed_attention(llama), pytest.raises(UserError, match="KVQUANT_NATIVE=yes says neither 0 nor 1"):
        llama(make_tokens(1, 3), past_key_values=PackedCache(quantizers, llama.config))
