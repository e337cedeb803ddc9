"""Layers that the kernels append to hold what torch stores, however the room for outliers grows and shrinks."""

from copy import deepcopy

import pytest
import torch
from test_kernels_attention import DEVICE, make_quantizer
from torch import Tensor

from deployment.format import layout, room
from deployment.format.page import Page
from deployment.layer import PackedLayer
from deployment.step.append import append, append_with_kernels
from deployment.step.recount import recount, reserve

HEADS, DIM = 2, 64
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter neither waits nor captures")


def make_layer(share: float = 0.1, capacity: int | None = None, batch: int = 1, heads: int = HEADS) -> PackedLayer:
    quantizers = [make_quantizer(heads * DIM, kind, 3, share) for kind in ("channel", "token")]
    layer = PackedLayer(*quantizers, sink_tokens=2, capacity=capacity)
    layer.lazy_initialization(*(torch.zeros(batch, heads, 1, DIM, device=DEVICE) for _ in range(2)))
    return layer


def tokens(count: int, batch: int = 1, seed: int = 0, heads: int = HEADS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * count + seed)
    made = torch.randn(2, batch, count, heads, DIM, generator=generator).mul(1.5).half()
    made[..., 0, :] *= 3  # of one head far more are outliers
    key, value = made.to(DEVICE).transpose(2, 3)
    return key, value


def store(layer: PackedLayer, key: Tensor, value: Tensor, padding: list[int] | None = None) -> None:
    padding = padding or [0] * len(key)
    append_with_kernels(layer, key, value, padding)


def assert_same(layer: PackedLayer, expected: PackedLayer) -> None:
    assert layer.lengths == expected.lengths == layer.stored.tolist()
    for kind, packed in layer.packed.items():
        assert torch.equal(layer.sinks[kind], expected.sinks[kind])
        for page, reference in zip(packed.pages, expected.packed[kind].pages, strict=True):
            assert torch.equal(page.words, reference.words)
            assert page.scales is None or torch.equal(page.scales, reference.scales)
            for got, wanted in zip(page.outliers.entries(), reference.outliers.entries(), strict=True):
                assert torch.equal(got, wanted)


def unused(page: Page) -> int:
    return len(page.outliers.index) - int(page.outliers.counts().sum())


def test_room_is_no_part_of_what_is_stored() -> None:
    layer, expected = make_layer(), make_layer()
    key, value = tokens(40)
    store(layer, key, value)
    append(expected, key, value, [0])
    for kind in layer.packed:
        [streams], [wanted] = ([page.outliers for page in each.packed[kind].pages] for each in (layer, expected))
        assert streams.unused_bytes() > 0 == wanted.unused_bytes()
        taken = sum(tensor.nbytes for tensor in (streams.index, streams.value)) - streams.unused_bytes()
        assert taken == wanted.index.nbytes + wanted.value.nbytes


def test_many_chunks_and_steps_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, expected = make_layer(), make_layer()
    monkeypatch.setattr(layout, "PAGE_BLOCKS", 1)
    monkeypatch.setattr(layout, "ROOM_TOKENS", 2)
    for seed, size in enumerate([1, 1, 1, 61, 1, 1, 9, 1]):
        key, value = tokens(size, seed=seed)
        store(layer, key, value)
        append(expected, key, value, [0])
    assert_same(layer, expected)
    assert len(layer.packed["key"].pages) == 2


def test_rows_of_different_lengths_and_padded_steps() -> None:
    layer, expected = make_layer(batch=2), make_layer(batch=2)
    for seed, (size, padding) in enumerate([(9, [7, 0]), (1, [0, 0]), (1, [1, 0]), (1, [0, 0]), (4, [3, 0])]):
        key, value = tokens(size, batch=2, seed=seed)
        store(layer, key, value, padding)
        append(expected, key, value, padding)
    assert_same(layer, expected)


def test_room_is_given_back_and_full_pages_keep_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "PAGE_BLOCKS", 1)
    monkeypatch.setattr(layout, "ROOM_TOKENS", 4)
    layer = make_layer()
    store(layer, *tokens(60))
    page = layer.packed["key"].pages[0]
    assert unused(page) > 20 * HEADS * DIM  # of a chunk's worst case
    store(layer, *tokens(1))
    spare = HEADS * (4 + 1) * DIM + int(page.outliers.counts().sum()) // 16
    assert 0 < unused(page) <= 2 * spare
    store(layer, *tokens(7))
    store(layer, *tokens(1))
    assert unused(page) == 0 and len(layer.packed["key"].pages) == 2


def test_counts_that_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as none arrives the worst case is what there must be room for."""
    layer, expected = make_layer(), make_layer()
    monkeypatch.setattr(room.Count, "arrived", False)
    monkeypatch.setattr(layout, "ROOM_TOKENS", 1)
    sizes = [9, 1, 1, 1, 1, 9]
    for seed, size in enumerate(sizes):
        key, value = tokens(size, seed=seed)
        store(layer, key, value)
        append(expected, key, value, [0])
    page = layer.packed["key"].pages[0]
    places = page.room.places
    assert (places >= (sum(sizes) - 2) * DIM).all() and (page.room.held == 0).all()
    assert_same(layer, expected)
    monkeypatch.setattr(room.Count, "arrived", True)
    for _ in range(2):  # the first count is an old one
        store(layer, *tokens(1))
        append(expected, *tokens(1), [0])
    assert page.room.places.sum() < places.sum()
    assert_same(layer, expected)


def test_storing_with_torch_in_between_and_cropping() -> None:
    layer, expected = make_layer(), make_layer()
    for way, size in [("kernels", 9), ("torch", 3), ("kernels", 1), ("crop", 5), ("kernels", 1), ("kernels", 8)]:
        if way == "crop":
            layer.crop(-size)
            expected.crop(-size)
            continue
        key, value = tokens(size)
        append(expected, key, value, [0])
        if way == "torch":
            append(layer, key, value, [0])
        else:
            store(layer, key, value)
    for packed, reference in zip(layer.packed.values(), expected.packed.values(), strict=True):
        for page, wanted in zip(packed.pages, reference.pages, strict=True):
            assert torch.equal(packed.read(page)[:, :, :15], reference.read(wanted)[:, :, :15])


def test_lost_outliers_are_an_error_at_the_next_count() -> None:
    layer = make_layer()
    store(layer, *tokens(3))
    layer.overflow.fill_(1)  # as a graph replayed too often would leave it
    with pytest.raises(RuntimeError, match="outliers were lost"):
        recount([layer])
    store(layer, *tokens(9))
    with pytest.raises(RuntimeError, match="outliers were lost"):
        store(layer, *tokens(1))


def test_tokens_beyond_the_pages_are_an_error() -> None:
    layer = make_layer(capacity=100)
    store(layer, *tokens(3))
    layer.stored.fill_(200)
    with pytest.raises(RuntimeError, match="replayed to 200 tokens"):
        recount([layer])


def test_reserved_streams_stay_where_they_are() -> None:
    layer, expected = make_layer(capacity=300), make_layer(capacity=300)
    store(layer, *tokens(5))
    append(expected, *tokens(5), [0])
    reserve(layer, 6)
    pages = [packed.pages[0] for packed in layer.packed.values()]
    addresses = [page.outliers.index.data_ptr() for page in pages]
    for seed in range(6):
        store(layer, *tokens(1, seed=seed))
        append(expected, *tokens(1, seed=seed), [0])
    recount([layer])
    assert [page.outliers.index.data_ptr() for page in pages] == addresses
    assert_same(layer, expected)


@pytest.mark.gpu
@ON_GPU
def test_nothing_waits_for_the_device() -> None:
    layer = make_layer(heads=8)
    chunks = [tokens(size, seed=size, heads=8) for size in (50, 1, 600, 1, 1, 300, 1)]
    for key, value in chunks[:2]:  # kernels are compiled and tables built
        append_with_kernels(layer, key, value, [0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for key, value in chunks[2:]:
            append_with_kernels(layer, key, value, [0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = make_layer(heads=8)
    for key, value in chunks:
        append(expected, key, value, [0])
    assert_same(layer, expected)


@pytest.mark.gpu
@ON_GPU
def test_a_captured_step_replayed_stores_what_eager_steps_store() -> None:
    layer, expected = make_layer(capacity=400, heads=8), make_layer(capacity=400, heads=8)
    for held in (layer, expected):
        append_with_kernels(held, *tokens(33, heads=8), [0])
        append_with_kernels(held, *tokens(1, heads=8), [0])
    reserve(layer, 70)
    key, value = (torch.empty_like(x) for x in tokens(1, heads=8))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_with_kernels(layer, key, value, [0])
    for seed in range(70):
        for static, new in zip((key, value), tokens(1, seed=seed, heads=8), strict=True):
            static.copy_(new)
        graph.replay()
        append_with_kernels(expected, *tokens(1, seed=seed, heads=8), [0])
    recount([layer])
    assert layer.slots == expected.slots == 104
    assert_same(layer, expected)
    store(layer, *tokens(1, heads=8))


def test_cropping_shortens_streams_where_they_are() -> None:
    """A graph may write there, and the device is not waited for."""
    first, then = tokens(140), tokens(3)
    filled, other = make_layer(), make_layer()
    store(filled, *first)
    append(other, *first, [0])
    for packed in filled.packed.values():
        packed.pages[0].room._count = None  # one on its way from a device cannot be copied; the bound goes on
    for kept in (1, 2, 66, 67, 100, 139):
        layer, expected = deepcopy(filled), deepcopy(other)
        places, counts = [tensor.data_ptr() for tensor in layer.tensors()], layer.stored
        layer.crop(torch.tensor(kept - 140))
        expected.crop(kept - 140)
        assert [tensor.data_ptr() for tensor in layer.tensors()] == places and layer.stored is counts
        for packed, wanted in zip(layer.packed.values(), expected.packed.values(), strict=True):
            mine, theirs = packed.pages[0].outliers, wanted.pages[0].outliers
            assert torch.equal(mine.counts(), theirs.counts())
            assert all(torch.equal(got, entry) for got, entry in zip(mine.entries(), theirs.entries(), strict=True))
    store(layer, *then)
    append(expected, *then, [0])
    assert_same(layer, expected)
