"""feedback.cu against `Quantizer.encode`, bit for bit, as host C++ with lanes in random order; test_kernels_append.py does it on a GPU."""

import ctypes

import decode_on_cpu
import feedback_on_cpu
import pytest
import torch
from test_kernels_append import append_both, make_chunks
from torch import Tensor

from deployment.kernels import feedback_host as host

pytestmark = [
    pytest.mark.skipif(not decode_on_cpu.has_compiler(), reason="no C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernel itself runs"),
]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were run."""
    names: list[str] = []

    def run(kernel: str, *rest: object) -> None:
        names.append(kernel)
        feedback_on_cpu.run(kernel, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(host, "takes", host.fits)
    monkeypatch.setattr(host, "_runner", lambda _sides: run)
    return names


def store(kind: str, bits: int, chunks: list[Tensor], sinks: int = 1, share: float = 0.05) -> None:
    pads = [[0] * len(chunks[0])] * len(chunks)
    append_both(kind, bits, chunks[0].shape[-1], chunks, pads, sinks, share, feedback=True)


@pytest.mark.parametrize(
    ("kind", "bits", "share", "dim"),
    [
        ("channel", 3, 0.05, 64),
        ("channel", 2, 0.0, 128),
        ("token", 4, 0.05, 64),
        ("token", 3, 0.0, 96),
        ("token", 2, 0.01, 128),
        ("mixed", 3, 0.05, 64),
    ],
)
def test_single_tokens(kind: str, bits: int, share: float, dim: int, launches: list[str]) -> None:
    store(kind, bits, make_chunks(dim, [1] * 4), share=share)
    assert launches == ["append_token"] * 4


@pytest.mark.parametrize(
    ("kind", "bits", "share", "dim", "sizes"),
    [
        ("channel", 3, 0.05, 64, [70, 3, 1]),
        ("channel", 2, 0.0, 64, [33, 40]),
        ("token", 4, 0.05, 64, [66, 2]),
        ("token", 3, 0.0, 96, [3, 5]),
        ("mixed", 3, 0.05, 64, [10, 1, 9]),
        ("channel", 4, 0.05, 128, [5]),
    ],
)
def test_chunks(kind: str, bits: int, share: float, dim: int, sizes: list[int], launches: list[str]) -> None:
    store(kind, bits, make_chunks(dim, sizes), share=share)
    assert launches == ["append_token" if size == 1 else "feed_back" for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["channel", "token"])
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
    for shape in (host.Shape(64, 2, 16), host.Shape(96, 3, 64), host.Shape(128, 2, 4)):
        assert feedback_on_cpu.sizes(shape) == [shape.token_bytes, shape.tile_bytes, ctypes.sizeof(host.Params)]
