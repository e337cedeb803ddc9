"""The quicker interpreter of the tests computes what Triton's own does."""

import pytest
import torch
from test_kernels_attention import run_case
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled for the GPU")


@triton.jit
def of_pairs(a, b, c, d):
    """Of two pairs, and neither part commutes."""
    return a * 0.75 + c, b - d


@triton.jit
def reduced(x, y, axis: tl.constexpr):
    return tl.reduce((x, y), axis, of_pairs)


@triton.jit
def reducing_kernel(x, y, of_columns, of_rows, of_all, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    at = row[:, None] * COLUMNS + column[None, :]
    first, second = tl.load(x + at), tl.load(y + at)
    a, b = reduced(first, second, 0)
    tl.store(of_columns + column, a)
    tl.store(of_columns + COLUMNS + column, b)
    c, d = reduced(first, second, 1)
    tl.store(of_rows + row, c)
    tl.store(of_rows + ROWS + row, d)
    e, f = reduced(a, b, 0)
    tl.store(of_all, e + tl.sum(c, 0) + tl.max(d, 0))
    tl.store(of_all + 1, f.to(tl.int32).to(tl.float32))


def stock(patch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter as it comes."""
    from triton.runtime import interpreter

    for place, name in (
        (interpreter, "_patch_lang"),
        (interpreter, "_get_np_dtype"),
        (interpreter.ReduceOps, "generic_reduce"),
        (tl.block_type, "__init__"),
        (tl.tensor, "__init__"),
    ):
        patch.setattr(place, name, getattr(place, name).__wrapped__)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_reductions_in_one_go_equal_triton_s_own(dtype: torch.dtype) -> None:
    def run() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        inputs = [torch.randn(4, 16, generator=generator).to(dtype) for _ in range(2)]
        outputs = [torch.zeros(2, 16), torch.zeros(2, 4), torch.zeros(2)]
        reducing_kernel[(1,)](*inputs, *outputs, 4, 16)
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        stock(patch)
        expected = run()
    for found, wanted in zip(run(), expected, strict=True):
        assert wanted.count_nonzero() == wanted.numel() and torch.equal(found, wanted)


def test_a_step_of_attention() -> None:
    """Errors are relative and not rounded, so that any difference shows."""
    case = {"heads": (2, 1), "lengths": (70, 3), "share": 0.05}
    with pytest.MonkeyPatch.context() as patch:
        stock(patch)
        expected = run_case(**case)
    assert run_case(**case) == expected > 0
