"""The append kernels against `Quantizer.encode` and `PackedTensor.write`, bit for bit."""

from dataclasses import replace

import pytest
import torch
from conftest import SPANS, all_pairs
from test_kernels_attention import DEVICE, make_quantizer
from test_quant_feedback import random_feedback
from torch import Tensor

from deployment.format.layout import PackedTensor
from deployment.kernels.append import Side, append
from quant.quantizer import as_stored

HEADS = 2


def append_both(
    kind: str,
    bits: int,
    dim: int,
    chunks: list[Tensor],
    pads: list[list[int]],
    sinks: int,
    share: float = 0.05,
    feedback: bool = False,
) -> None:
    """Append chunks `[B, G, S, D]` with the kernels and with torch, and compare everything that is stored."""
    batch = len(chunks[0])
    quantizer = make_quantizer(HEADS * dim, kind, bits, share)
    if feedback:
        quantizer = replace(quantizer, feedback=random_feedback(HEADS, dim).to(DEVICE))
    total = sum(chunk.shape[2] for chunk in chunks)
    packed, expected = (PackedTensor(quantizer, batch, HEADS, dim, DEVICE, "key") for _ in range(2))
    for tensor in (packed, expected):
        tensor.reserve(total, exactly=True)
    stored = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    lengths = [0] * batch
    held, expected_sinks = (torch.zeros(batch, HEADS, sinks, dim, dtype=torch.float16, device=DEVICE) for _ in range(2))
    overflow = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for page in packed.pages:
        if page.outliers is not None:
            page.outliers = page.outliers.with_room(total * dim)
            page.outliers.index.fill_(-1)
    for chunk, padding in zip(chunks, pads, strict=True):
        pad = torch.tensor(padding, device=DEVICE)
        append([Side(packed, chunk, held, packed.pages)], stored, pad, overflow)
        stored += chunk.shape[2] - pad
        for row, skipped in enumerate(padding):
            tokens = chunk[row, :, skipped:].transpose(0, 1).flatten(1)[None]
            exact = max(min(sinks - lengths[row], tokens.shape[1]), 0)
            sink = as_stored(tokens[0, :exact].float()).unflatten(-1, (HEADS, dim)).transpose(0, 1)
            expected_sinks[row, :, lengths[row] : lengths[row] + exact] = sink
            if tokens.shape[1] > exact:
                start = lengths[row] + exact - sinks
                expected.write(torch.tensor([row], device=DEVICE), start, expected.quantizer.encode(tokens[:, exact:]))
            lengths[row] += tokens.shape[1]
    assert torch.equal(held, expected_sinks) and not overflow.any()
    for page, reference in zip(packed.pages, expected.pages, strict=True):
        assert torch.equal(page.words, reference.words)
        if page.scales is not None:
            assert torch.equal(page.scales, reference.scales)
        if page.outliers is not None:
            for got, wanted in zip(page.outliers.entries(), reference.outliers.entries(), strict=True):
                assert torch.equal(got, wanted)


def make_chunks(dim: int, sizes: list[int], batch: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(sizes))
    made = [torch.randn(batch, size, HEADS, dim, generator=generator) * 2 for size in sizes]
    return [chunk.to(DEVICE, dtype).transpose(1, 2) for chunk in made]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("channel", [63, 2, 66]), ("mixed", [70, 1, 1]), ("token", [1, 1, 1]), ("token", [10, 7])],
)
def test_everything_stored_is_what_torch_stores(kind: str, sizes: list[int]) -> None:
    append_both(kind, 3, 64, make_chunks(64, sizes), [[0]] * len(sizes), sinks=1)


@pytest.mark.parametrize(
    ("kind", "bits", "share", "dim", "sizes"),
    [
        ("channel", 3, 0.05, 20, [63, 2, 1]),
        ("channel", 2, 0.0, 20, [33, 1]),
        ("mixed", 3, 0.05, 20, [10, 1]),
        ("token", 4, 0.05, 20, [34, 1, 1]),
        pytest.param("token", 3, 0.0, 64, [5, 1], marks=pytest.mark.slow),
        pytest.param("mixed", 3, 0.05, 64, [70, 1], marks=pytest.mark.slow),
    ],
)
def test_error_feedback_is_torchs_to_the_bit(kind: str, bits: int, share: float, dim: int, sizes: list[int]) -> None:
    chunks = make_chunks(dim, sizes)
    append_both(kind, bits, dim, chunks, [[0]] * len(sizes), sinks=1, share=share, feedback=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_error_feedback_of_padded_rows_in_half_precision_and_odd_heads(dtype: torch.dtype) -> None:
    chunks = make_chunks(20, [8, 3, 1], batch=2, dtype=dtype)
    append_both("token", 3, 20, chunks, [[8, 0], [1, 0], [0, 0]], sinks=2, feedback=True)


@pytest.mark.parametrize(
    ("dim", "bits"),
    all_pairs(
        [64, 20, 128],
        [2, 4, 5, 8],
        lambda dim, bits: (dim, bits) in {*((64, b) for b in (2, 4, 5)), (20, 5), (20, 8), (128, 2)},
    ),
)
def test_widths_and_heads(dim: int, bits: int) -> None:
    append_both("channel", bits, dim, make_chunks(dim, [40, 29, 1]), [[0]] * 3, sinks=0)


@pytest.mark.parametrize("kind", ["channel", "token"])
def test_rows_of_different_lengths(kind: str) -> None:
    append_both(kind, 3, 64, make_chunks(64, [8, 3, 1], batch=2), [[8, 0], [1, 0], [0, 0]], sinks=4)


@pytest.mark.parametrize(("dim", "span"), SPANS)
def test_tokens_beyond_the_span_of_an_index(dim: int, span: int) -> None:
    append_both("channel", 2, dim, make_chunks(dim, [span - 2, 3, 70]), [[0], [0], [0]], sinks=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["channel", "token"])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    append_both(kind, 4, 64, make_chunks(64, [9, 1], dtype=dtype), [[0], [0]], sinks=1)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("kind", ["channel", "token"])
def test_shares(kind: str, share: float) -> None:
    append_both(kind, 3, 64, make_chunks(64, [8, 1]), [[0], [0]], sinks=0, share=share)


@pytest.mark.parametrize("levels", [[0.0], [1.0, 1.0, 2.0], [-0.0, 0.0], [3.0, -3.0], [1e5, -1e5, 0.5]])
def test_ties_and_extremes(levels: list[float]) -> None:
    """Nothing but ties, both zeros, numbers beyond fp16: the choice of outliers must still agree."""
    pattern = (
        torch.tensor(levels).repeat(HEADS * 64)[: HEADS * 64].view(1, 1, HEADS, 64).expand(1, 3, -1, -1).transpose(1, 2)
    )
    for kind in ("token", "channel"):
        append_both(kind, 3, 64, [pattern.to(DEVICE), pattern[:, :, :1].to(DEVICE)], [[0], [0]], sinks=0)


def test_boundaries_belong_to_the_lower_code() -> None:
    quantizer = make_quantizer(HEADS * 64, "channel", 4, 0.05)
    boundaries = quantizer.codebook.boundaries
    at = boundaries[torch.arange(HEADS * 64, device=DEVICE) % 15] * quantizer.scale + quantizer.zero
    append_both("channel", 4, 64, [at.view(1, HEADS, 1, 64).expand(1, -1, 3, -1)], [[0]], sinks=0)


def test_a_full_stream_is_reported_and_nothing_else_is_overwritten() -> None:
    quantizer = make_quantizer(HEADS * 64, "channel", 4, 0.05)
    packed = PackedTensor(quantizer, 1, HEADS, 64, DEVICE, "key")
    packed.reserve(64, exactly=True)
    page = packed.pages[0]
    page.outliers = page.outliers.with_room(10)
    overflow, none = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    x = torch.zeros(1, HEADS, 1, 64, device=DEVICE)
    x[:, 0] = 100.0
    append([Side(packed, x, x.new_zeros(1, HEADS, 0, 64).half(), [page])], none, none, overflow)
    lists, index, value = page.outliers.entries()
    assert overflow.item() == 1
    assert index[lists == 0].tolist() == list(range(10)) and (value[lists == 0] == 100).all()
    assert (value[lists == 1] == 0).all()
