"""The bytes of the packed cache: what is written is what is read, and nothing more is held."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deployment.format.groups import GroupOrder
from deployment.format.layout import PAGE_BLOCKS, PackedTensor
from deployment.format.order import ChannelOrder, order_of, rotary_groups, uniform_order
from deployment.format.streams import OutlierStreams, index_span
from gradients.cli import UserError
from quant.codebook import int_codebook, nf_codebook
from quant.outliers import outliers_per_end
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS, packed_size

HEADS, HEAD_DIM = 3, 20  # C = 60, no multiple of 32
PAGE_TOKENS = PAGE_BLOCKS * BLOCK_TOKENS
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
    read = torch.cat([packed.read(page) for page in packed.pages], dim=2)
    return read.transpose(1, 2).flatten(2)[:, :tokens]


def write_in_pieces(quantizer: Quantizer, x: Tensor, pieces: Sequence[int], reserved: int = 0) -> PackedTensor:
    packed = PackedTensor(quantizer, len(x), HEADS, HEAD_DIM, x.device, "key")
    packed.reserve(reserved, exactly=True)
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
    at_once = write_in_pieces(quantizer, x, [700], reserved=700)
    in_pieces = write_in_pieces(quantizer, x, [1, 1, 61, 2, 63, 400, 1, 171], reserved=700)
    for first, second in zip(at_once.tensors(), in_pieces.tensors(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_bytes_held_are_the_bytes_that_evaluation_counts(kind: str, bits: int, share: float) -> None:
    tokens = 4 * BLOCK_TOKENS + 7
    quantizer = make_quantizer(kind, bits, share)
    encoded = quantizer.encode(torch.randn(1, tokens, HEADS * HEAD_DIM))
    packed = PackedTensor(quantizer, 1, HEADS, HEAD_DIM, torch.device("cpu"), "key")
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
    packed = write_in_pieces(quantizer, x, [PAGE_TOKENS, 3])
    first, second = (page.outliers for page in packed.pages)
    assert first.index.numel() == PAGE_TOKENS * HEADS * HEAD_DIM
    assert torch.equal(read_all(packed, PAGE_TOKENS), x[:, :PAGE_TOKENS])
    assert (second.entries()[1] // HEAD_DIM < 3).all()


def test_a_list_belongs_to_one_block_and_head() -> None:
    quantizer = make_quantizer("key", 4)
    x = torch.zeros(1, 130, HEADS * HEAD_DIM)
    token, head, dim = 70, 2, 5
    x[0, token, head * HEAD_DIM + dim] = 50.0
    outliers = write_in_pieces(quantizer, x, [130]).pages[0].outliers
    lists, index, value = outliers.entries()
    at = (value == 50).nonzero()[0, 0]
    assert lists[at] == head * outliers.blocks + token // BLOCK_TOKENS
    assert index[at] == token * HEAD_DIM + dim


@pytest.mark.parametrize(("head_dim", "span"), [(20, 2048), (64, 1024), (96, 512), (128, 512), (256, 256), (1024, 64)])
def test_indices_begin_anew_after_a_span(head_dim: int, span: int) -> None:
    assert index_span(head_dim) == span
    scheme = Scheme(datatype="nf", bits=2, outliers=0.05)
    quantizer = ChannelQuantizer(scheme, nf_codebook(4), torch.ones(head_dim), torch.zeros(head_dim))
    packed = PackedTensor(quantizer, 1, 1, head_dim, torch.device("cpu"), "key")
    x = torch.zeros(1, 2 * span + 70, head_dim)
    tokens = [0, 5, span - 1, span, span + 65, 2 * span + 69]
    x[0, tokens, head_dim - 1] = 50.0 + torch.arange(6)
    packed.write(slice(None), 0, quantizer.encode(x))
    assert len(packed.pages) == 1
    lists, index, _ = packed.pages[0].outliers.entries()
    assert lists.tolist() == [token // BLOCK_TOKENS for token in tokens]
    assert index.tolist() == [token % span * head_dim + head_dim - 1 for token in tokens]
    assert torch.equal(read_all(packed, x.shape[1]), quantizer.decode(quantizer.encode(x)))
    packed.truncate([span + 65])
    assert packed.pages[0].outliers.entries()[2].tolist() == [50, 51, 52, 53]


def test_heads_too_large_for_an_index_are_refused() -> None:
    with pytest.raises(UserError, match="heads of 1032 channels are too large"):
        index_span(1032)


@pytest.mark.parametrize("room", [0, 5])
def test_streams_with_room_hold_the_same_and_start_where_they_should(room: int) -> None:
    streams = OutlierStreams.empty(2, 3, 4, torch.device("cpu"))
    lists = torch.tensor([0, 0, 1, 7, 9, 23, 23])
    index, value = torch.tensor([4, 5, 0, 1, 2, 3, 60000]), torch.arange(7).half()
    roomy = streams.rebuilt(lists, index, value).with_room(room)
    for got, expected in zip(roomy.entries(), (lists, index, value), strict=True):
        assert torch.equal(got, expected)
    assert roomy.starts.flatten().tolist() == [room * n + held for n, held in enumerate([0, 3, 4, 5, 5, 5])]
    assert len(roomy.index) == len(roomy.value) == 7 + 6 * room
    moved = roomy.moved(torch.full((6,), 9))
    assert torch.equal(moved.entries()[2], value) and len(moved.index) == 54
    for tensor in (roomy.index, roomy.value, moved.index, moved.value):  # decode.cu copies 16 bytes at a time
        assert tensor.untyped_storage().nbytes() % 16 == 0


CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", [32, 96, 128])
@pytest.mark.parametrize("bits", range(7))
@pytest.mark.parametrize("role", ["key", "value"])
def test_groups_hold_every_code_at_its_bits(role: str, bits: int, head_dim: int) -> None:
    order = uniform_order(bits, 2, head_dim, role, head_dim // 2, CPU)
    codes = torch.randint(0, 2**bits, (2, 3, 64, 2 * head_dim), dtype=torch.uint8)
    words = order.pack(codes)
    assert words.shape == (2, 3, order.words) and words.nbytes * 8 == codes.numel() * bits
    assert torch.equal(order.unpack(words), codes)


@pytest.mark.parametrize("role", ["key", "value"])
def test_groups_of_any_widths_and_channels(role: str) -> None:
    widths = torch.tensor([[4, 0, 3, 1], [2, 6, 0, 5], [0, 0, 0, 0]])
    heads = [torch.randperm(32 if role == "key" else 64) for _ in widths]
    channels = torch.stack([rotary_groups(head.tolist(), 20) if role == "key" else head for head in heads])
    order = GroupOrder(widths, channels, role)
    of_channels = torch.zeros(3, 64, dtype=torch.int64).scatter(1, channels, widths.repeat_interleave(16, 1))
    codes = (torch.randint(0, 64, (5, 64, 192)) % (1 << of_channels.flatten())).to(torch.uint8)
    words = order.pack(codes)
    assert words.shape == (5, 32 * int(widths.sum())) and order.offsets.flatten()[-5].item() == 32 * 16
    assert torch.equal(order.unpack(words), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("role", ["key", "value"])
def test_a_lane_holds_what_the_tensor_core_wants_of_it(role: str, bits: int) -> None:
    """m16n8k16: lane l has rows l div 4 and + 8, columns 2 (l mod 4) + {0, 1, 8, 9}; eight codes to a word of nibbles."""
    order = uniform_order(bits, 1, 64, role, 32, CPU)
    codes = torch.randint(0, 2**bits, (64, 64), dtype=torch.uint8)
    words = order.pack(codes).view(4, -1)  # of groups
    planes, bit = [plane for plane in (4, 2, 1) if bits & plane], 0
    nibbles = torch.zeros(4, 32, 4, 8, dtype=torch.int64)  # group, lane, word, nibble
    for plane in planes:
        held = words[:, 32 * bit : 32 * (bit + plane)].view(4, 32, plane)
        for n in range(4):
            word = held[..., n * plane // 4].long()[..., None] >> 4 * torch.arange(8) + n * plane % 4
            nibbles[:, :, n] |= (word & 2**plane - 1) << bit
        bit += plane
    for group, lane, n, j in [(0, 0, 0, 0), (0, 5, 1, 3), (1, 31, 3, 7), (2, 14, 2, 5), (3, 9, 0, 6)]:
        row, column = lane // 4, lane % 4
        if role == "key":  # pairs 16 i ... are groups 2 i (first halves) and 2 i + 1
            token = 8 * (2 * n + j // 4) + row
            channel = 16 * (group // 2) + 32 * (group % 2) + 2 * column + (0, 1, 8, 9)[j % 4]
        else:
            token, channel = 16 * column + (8 * n + j) % 16, 16 * group + 8 * (n // 2) + row
        assert nibbles[group, lane, n, j] == codes[token, channel]


def test_groups_are_refused_that_are_none() -> None:
    channels = rotary_groups(range(32), 32).expand(2, -1)
    for widths, places in [
        (torch.full((2, 3), 4), channels),
        (torch.full((2, 4), 7), channels),
        (torch.full((2, 4), -1), channels),
        (torch.full((2, 4), 4), torch.zeros_like(channels)),
    ]:
        with pytest.raises(ValueError, match="bits|widths|channel"):
            GroupOrder(widths, places, "key")


def test_heads_that_make_no_groups_go_channel_by_channel() -> None:
    quantizer = make_quantizer("key", 3)
    assert isinstance(order_of(quantizer, HEADS, HEAD_DIM, "key"), ChannelOrder)
    assert isinstance(order_of(make_quantizer("value", 3), 3, 64, "key"), GroupOrder)
    assert isinstance(order_of(make_quantizer("value", 8), 3, 64, "key"), ChannelOrder)


def test_channels_follow_one_another_at_their_own_widths() -> None:
    order = ChannelOrder(torch.tensor([0, 3, 1, 0, 6]))
    assert order.offsets.tolist() == [0, 0, 6, 8, 8] and order.words == 20
    codes = torch.stack([torch.randint(0, 2**width, (4, 64), dtype=torch.uint8) for width in (0, 3, 1, 0, 6)], dim=-1)
    assert torch.equal(order.unpack(order.pack(codes)), codes)


def test_outliers_leave_code_zero_behind() -> None:
    quantizer = make_quantizer("key", 4)
    x = torch.full((1, 3, HEADS * HEAD_DIM), 9.5)
    packed = write_in_pieces(quantizer, x, [3])
    assert (packed.pages[0].words == 0).all() and (quantizer.encode(x).codes == 15).all()


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
def test_selected_sequences_hold_what_they_held(kind: str, order: list[int]) -> None:
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
    address = packed.pages[0].words.data_ptr()
    packed.write(slice(None), PAGE_TOKENS, quantizer.encode(torch.randn(1, 1, HEADS * HEAD_DIM)))
    assert len(packed.pages) == 2 and packed.pages[0].words.data_ptr() == address
