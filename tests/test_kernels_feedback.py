"""append.cu against `Quantizer.encode`, bit for bit, as host C++ with lanes in random order; test_kernels_append.py does it on a GPU."""

import ctypes
from dataclasses import replace

import kernels_on_cpu
import pytest
import torch
from test_kernels_append import HEADS, append_both, make_chunks
from test_kernels_attention import make_quantizer
from torch import Tensor

from deployment.format.layout import PackedTensor
from deployment.kernels import append_host as host
from deployment.kernels.append import Side, append
from gradients.parallel import Part
from quant.arithmetic import as_stored
from quant.quantizer import Encoded, TokenQuantizer

pytestmark = [
    pytest.mark.skipif(not kernels_on_cpu.has_compiler(), reason="no C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernel itself runs"),
]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were run."""
    names: list[str] = []

    def run(kernel: str, *rest: object) -> None:
        names.append(kernel)
        kernels_on_cpu.run(kernel, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(host, "takes", host.fits)
    monkeypatch.setattr(host, "_runner", lambda _sides: run)
    return names


def store(
    kind: str, bits: int, chunks: list[Tensor], sinks: int = 1, share: float = 0.05, feedback: bool = True
) -> None:
    pads = [[0] * len(chunks[0])] * len(chunks)
    append_both(kind, bits, chunks[0].shape[-1], chunks, pads, sinks, share, feedback)


@pytest.mark.parametrize(
    ("kind", "bits", "share", "dim", "feedback"),
    [
        ("channel", 3, 0.05, 64, True),
        ("token", 4, 0.05, 64, True),
        ("mixed", 3, 0.05, 64, True),
        ("token", 2, 0.0, 96, True),
        pytest.param("channel", 2, 0.0, 128, True, marks=pytest.mark.slow),
        pytest.param("token", 3, 0.01, 128, True, marks=pytest.mark.slow),
        pytest.param("channel", 4, 0.05, 128, True, marks=pytest.mark.slow),
        ("channel", 4, 0.05, 64, False),
        ("token", 3, 0.01, 96, False),
        ("mixed", 5, 0.05, 32, False),
        ("channel", 2, 0.0, 256, False),
        ("token", 2, 0.05, 256, False),
        ("channel", 6, 0.05, 160, False),
    ],
)
def test_single_tokens(kind: str, bits: int, share: float, dim: int, feedback: bool, launches: list[str]) -> None:
    store(kind, bits, make_chunks(dim, [1] * 3), share=share, feedback=feedback)
    assert launches == ["append_token"] * 3


@pytest.mark.parametrize(
    ("kind", "bits", "share", "dim", "sizes"),
    [
        ("channel", 3, 0.05, 64, [70, 3, 1]),
        ("token", 4, 0.05, 64, [66, 2]),
        ("mixed", 3, 0.05, 64, [10, 1, 9]),
        pytest.param("channel", 2, 0.0, 64, [33, 40], marks=pytest.mark.slow),
        pytest.param("token", 3, 0.0, 96, [3, 5], marks=pytest.mark.slow),
        pytest.param("channel", 4, 0.05, 128, [5], marks=pytest.mark.slow),
        pytest.param("token", 2, 0.01, 256, [5, 1], marks=pytest.mark.slow),
        ("channel", 2, 0.05, 32, [67, 1]),
    ],
)
def test_chunks(kind: str, bits: int, share: float, dim: int, sizes: list[int], launches: list[str]) -> None:
    store(kind, bits, make_chunks(dim, sizes), share=share)
    assert launches == ["append_token" if size == 1 else "feed_back" for size in sizes]


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_stores_its_own_heads_of_whole_tokens(number: int) -> None:
    """The range and the outliers are those of all heads."""
    dim, part = 64, Part(number, 2)
    whole = make_quantizer(2 * HEADS * dim, "token", 3, 0.05)
    assert isinstance(whole, TokenQuantizer)
    ours, expected = (
        PackedTensor(replace(whole, part=part), 1, HEADS, dim, torch.device("cpu"), "value") for _ in "ab"
    )
    for tensor in (ours, expected):
        tensor.reserve(64, exactly=True)
    page = ours.pages[0]
    page.outliers = page.outliers.with_room(64 * dim)
    x = torch.randn(1, 2 * HEADS, 3, dim, generator=torch.Generator().manual_seed(7))
    own = part.of(2 * HEADS * dim)
    for token in range(3):
        stored, overflow = torch.tensor([token]), torch.zeros(1, dtype=torch.int32)
        side = Side(ours, x[:, :, token : token + 1], x.new_zeros(1, HEADS, 0, dim).half(), [page], number * HEADS)
        append([side], stored, torch.zeros(1, dtype=torch.int64), overflow)
        one = x[:, :, token].reshape(1, 1, -1)
        encoded = whole.encode(one)
        mask = encoded.outliers[..., own]
        mine = Encoded(encoded.codes[..., own], mask, as_stored(one[..., own][mask]), encoded.scale, encoded.zero)
        expected.write(slice(None), token, mine)
    assert torch.equal(page.words, expected.pages[0].words) and torch.equal(page.scales, expected.pages[0].scales)
    for got, wanted in zip(page.outliers.entries(), expected.pages[0].outliers.entries(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("kind", "dtype"), [("token", torch.float16), ("channel", torch.bfloat16)])
def test_padded_rows_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    chunks, pads = make_chunks(64, [8, 3, 1, 1], batch=2, dtype=dtype), [[8, 0], [1, 0], [0, 0], [1, 0]]
    append_both(kind, 3, 64, chunks, pads, sinks=4, feedback=True)


@pytest.mark.parametrize(
    "levels", [[0.0], [1.0, 1.0, 2.0], [-0.0, 0.0], [3.0, -3.0], [1e5, -1e5, 0.5], [1e-40, -3e-39]]
)
def test_ties_and_extremes(levels: list[float]) -> None:
    """Nothing but ties, both zeros, numbers beyond fp16 and below what is normal: the choice of outliers must still agree."""
    pattern = torch.tensor(levels).repeat(128)[:128].view(1, 2, 1, 64)
    for kind in ("token", "channel"):
        store(kind, 3, [pattern.expand(-1, -1, 3, -1), pattern, pattern], sinks=0)


def test_structures_are_as_large_as_in_the_source() -> None:
    for shape in (host.Shape(64, 2, 2, 16, 2, 1), host.Shape(96, 2, 4, 4, 2, 1), host.Shape(256, 2, 2, 16, 0, 0)):
        assert kernels_on_cpu.sizes(shape) == [shape.token_bytes, shape.tile_bytes, ctypes.sizeof(host.Params)]
