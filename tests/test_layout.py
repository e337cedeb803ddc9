"""The bytes of the packed cache: what is written is what is read, and nothing more is held."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deployment.layout import PAGE_TOKENS, OutlierLists, PackedTensor
from quant.codebook import int_codebook, nf_codebook
from quant.outliers import outliers_per_end
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS, packed_size

HEADS, HEAD_DIM = 3, 20  # C = 60, no multiple of 32
LENGTHS = [1, 31, 33, 63, 64, 65, 257, PAGE_TOKENS, PAGE_TOKENS + 1]


def make_quantizer(kind: str, bits: int, share: float = 0.05) -> Quantizer:
    channels = HEADS * HEAD_DIM
    scheme = Scheme(datatype="nf", bits=bits, outliers=share)
    if kind == "value":
        return TokenQuantizer(scheme, int_codebook(2**bits))
    scale = torch.linspace(0.5, 2, channels)
    return ChannelQuantizer(scheme, nf_codebook(2**bits), scale, torch.linspace(-1, 1, channels))


def read_all(packed: PackedTensor, tokens: int) -> Tensor:
    """`[B, tokens, C]`, as `quantizer.decode` lays it out."""
    read = torch.cat([packed.read(page, PAGE_TOKENS) for page in packed.pages], dim=2)
    return read.transpose(1, 2).flatten(2)[:, :tokens]


def write_in_pieces(quantizer: Quantizer, x: Tensor, pieces: Sequence[int]) -> PackedTensor:
    packed = PackedTensor(quantizer, len(x), HEADS, HEAD_DIM, x.device)
    start = 0
    for piece in x.split(list(pieces), dim=1):
        packed.write(slice(None), start, quantizer.encode(piece))
        start += piece.shape[1]
    return packed


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_reading_gives_what_decode_gives_bit_for_bit(kind: str, bits: int, tokens: int) -> None:
    quantizer = make_quantizer(kind, bits)
    x = torch.randn(2, tokens, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(tokens))
    packed = write_in_pieces(quantizer, x, [tokens])
    assert torch.equal(read_all(packed, tokens), quantizer.decode(quantizer.encode(x)))


@pytest.mark.parametrize("kind", ["key", "value"])
def test_how_tokens_arrive_does_not_change_a_byte(kind: str) -> None:
    quantizer = make_quantizer(kind, 3)
    x = torch.randn(2, 700, HEADS * HEAD_DIM)
    at_once = write_in_pieces(quantizer, x, [700])
    in_pieces = write_in_pieces(quantizer, x, [1, 1, 61, 2, 63, 400, 1, 171])
    for first, second in zip(at_once.tensors(), in_pieces.tensors(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_bytes_held_are_the_bytes_that_evaluation_counts(kind: str, bits: int, share: float) -> None:
    tokens = 4 * BLOCK_TOKENS + 7
    quantizer = make_quantizer(kind, bits, share)
    encoded = quantizer.encode(torch.randn(1, tokens, HEADS * HEAD_DIM))
    packed = PackedTensor(quantizer, 1, HEADS, HEAD_DIM, torch.device("cpu"))
    packed.reserve(tokens, exactly=True)
    packed.write(slice(None), 0, encoded)
    counted = packed_size(
        tokens,
        HEADS,
        HEADS * HEAD_DIM,
        bits * HEADS * HEAD_DIM,
        encoded.outlier_count,
        share > 0,
        token_scales=kind == "value",
    )
    assert sum(tensor.nbytes for tensor in packed.tensors()) * 8 == counted.bits


def test_value_outliers_are_exactly_as_many_as_promised() -> None:
    quantizer = make_quantizer("value", 2)
    packed = write_in_pieces(quantizer, torch.zeros(1, 70, HEADS * HEAD_DIM), [70])  # nothing but ties
    assert packed.pages[0].outliers.index.numel() == 70 * 2 * outliers_per_end(HEADS * HEAD_DIM, 0.05)


def test_a_page_full_of_outliers_and_a_page_without() -> None:
    quantizer = make_quantizer("key", 2)
    x = torch.cat([torch.full((1, PAGE_TOKENS, HEADS * HEAD_DIM), 9.5), torch.zeros(1, 3, HEADS * HEAD_DIM)], dim=1)
    packed = write_in_pieces(quantizer, x, [PAGE_TOKENS + 3])
    first, second = (page.outliers for page in packed.pages)
    assert first.index.numel() == PAGE_TOKENS * HEADS * HEAD_DIM
    assert torch.equal(read_all(packed, PAGE_TOKENS), x[:, :PAGE_TOKENS])
    assert (second.unsigned_index() // HEAD_DIM < 3).all()


def test_a_list_belongs_to_one_block_and_head() -> None:
    quantizer = make_quantizer("key", 4)
    x = torch.zeros(1, 130, HEADS * HEAD_DIM)
    token, head, dim = 70, 2, 5
    x[0, token, head * HEAD_DIM + dim] = 50.0
    outliers = write_in_pieces(quantizer, x, [130]).pages[0].outliers
    at = (outliers.value == 50).nonzero()[0, 0]
    block = token // BLOCK_TOKENS
    assert outliers.lists()[at] == block * HEADS + head
    assert outliers.unsigned_index()[at] == (token % BLOCK_TOKENS) * HEAD_DIM + dim


def test_indices_beyond_int16_survive() -> None:
    lists = OutlierLists.empty(1, 1, 1, torch.device("cpu"))
    index = torch.tensor([65535, 40000, 3])
    added = lists.with_added(torch.zeros(3, dtype=torch.int64), index, torch.tensor([1.0, 2.0, 3.0]).half())
    assert added.unsigned_index().tolist() == [3, 40000, 65535]
    assert added.value.tolist() == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("kind", ["key", "value"])
def test_truncated_then_continued_equals_never_written(kind: str) -> None:
    quantizer = make_quantizer(kind, 3)
    x, other = torch.randn(2, 200, HEADS * HEAD_DIM), torch.randn(2, 50, HEADS * HEAD_DIM)
    cropped = write_in_pieces(quantizer, x, [200])
    cropped.truncate([100, 100])
    cropped.write(slice(None), 100, quantizer.encode(other))
    straight = write_in_pieces(quantizer, torch.cat([x[:, :100], other], dim=1), [150])
    assert torch.equal(read_all(cropped, 150), read_all(straight, 150))
    assert cropped.pages[0].outliers.index.numel() == straight.pages[0].outliers.index.numel()


@pytest.mark.parametrize("order", [[1, 0], [0, 0, 1], [1]])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_selecting_sequences(kind: str, order: list[int]) -> None:
    quantizer = make_quantizer(kind, 3)
    x = torch.randn(2, 100, HEADS * HEAD_DIM)
    selected = write_in_pieces(quantizer, x, [100])
    selected.select(torch.tensor(order))
    expected = write_in_pieces(quantizer, x[order], [100])
    for first, second in zip(selected.tensors(), expected.tensors(), strict=True):
        assert torch.equal(first, second)


def test_growing_keeps_earlier_pages_where_they_are() -> None:
    quantizer = make_quantizer("key", 4)
    packed = write_in_pieces(quantizer, torch.randn(1, PAGE_TOKENS, HEADS * HEAD_DIM), [PAGE_TOKENS])
    address = packed.pages[0].words[4].data_ptr()
    packed.write(slice(None), PAGE_TOKENS, quantizer.encode(torch.randn(1, 1, HEADS * HEAD_DIM)))
    assert len(packed.pages) == 2 and packed.pages[0].words[4].data_ptr() == address
