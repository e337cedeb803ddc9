"""`python -m deployment.benchmark`, through its `main`."""

from pathlib import Path

import pytest
import torch

from deployment.benchmark import Shape, main, synthetic_quantizers
from gradients.cli import UserError
from quant.scheme import Scheme


@pytest.mark.parametrize("scheme", ["nuq3-1%", "rdnuq2.4"])
def test_everything_is_timed_and_bytes_are_counted(
    llama_folder: Path, capsys: pytest.CaptureFixture[str], scheme: str
) -> None:
    result = main(["--shape", str(llama_folder), "--scheme", scheme, "--context", "128", "--device", "cpu"])
    assert [row["op"] for row in result["ops"]] == ["append", "decode", "prefill"]
    assert all(row["us"] > 0 and row["fp16_us"] > 0 for row in result["ops"])
    assert result["path"] == "torch" and "torch path, no kernels" in capsys.readouterr().out
    assert result["fp16_bytes_per_token"] == 2 * 2 * 24  # keys and values, two bytes, C
    assert 2 < result["bits_per_element"] < 6


def test_synthetic_quantizers_keep_the_share_of_outliers_they_are_asked_for() -> None:
    key, value = synthetic_quantizers(Scheme.parse("nuq3-2%"), Shape(4, 4, 64))
    x = torch.randn(1, 2000, 256, generator=torch.Generator().manual_seed(0))
    for quantizer in (key, value):
        assert quantizer.encode(x).outlier_count / x.numel() == pytest.approx(0.02, rel=0.2)


def test_an_unknown_shape_says_what_there_is() -> None:
    with pytest.raises(UserError, match="llama-7b, llama-3-8b"):
        Shape.named("no/such-model-anywhere")
