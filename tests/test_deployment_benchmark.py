"""`python -m deployment.benchmark`, through its `main`."""

from collections.abc import Callable

import pytest
import torch

from deployment.benchmark import main
from deployment.measure.fp16 import decode_calls, prefill_calls
from deployment.measure.shapes import shape_config
from deployment.measure.synthetic import Shape, make_case, synthetic_quantizers
from deployment.measure.timing import copy_rate, fastest
from gradients.cli import UserError
from quant.results import read_rows
from quant.scheme import Scheme


@pytest.mark.parametrize("scheme", ["nuq3-1%", "rdnuq2.4+fb"])
def test_everything_is_timed_and_bytes_are_counted(llama_folder, capsys, scheme: str) -> None:
    (result,) = main(["--shape", str(llama_folder), "--scheme", scheme, "--context", "128", "--device", "cpu"])["rows"]
    assert [row["op"] for row in result["ops"]] == ["append", "chunk", "decode", "prefill"]
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
    with pytest.raises(UserError, match="llama-7b, .*llama-3-8b"):
        shape_config("no/such-model-anywhere")


def test_some_operations_at_some_contexts(llama_folder, tmp_path) -> None:
    results = tmp_path / "rows.jsonl"
    arguments = ["--shape", str(llama_folder), "--contexts", "64", "0.125K", "--ops", "prefill,decode", "--batch", "2"]
    rows = main([*arguments, "--device", "cpu", "--results", str(results)])["rows"]
    assert [(row["context"], [op["op"] for op in row["ops"]]) for row in rows] == [
        (64, ["decode", "prefill"]),
        (128, ["decode", "prefill"]),
    ]
    written = read_rows(results)
    assert [{name: row[name] for name in rows[0]} for row in written] == rows and "commit" in written[0]
    with pytest.raises(UserError, match="'sleep' is none of append, chunk, decode, prefill"):
        main([*arguments, "--ops", "decode,sleep"])
    with pytest.raises(UserError, match="scheme kivi2 exists in simulation only"):
        main([*arguments, "--device", "cpu", "--scheme", "kivi2"])


def test_the_rate_of_copies_is_that_of_the_faster_way(monkeypatch) -> None:
    monkeypatch.setattr("deployment.measure.timing._COPY_BYTES", {"cpu": 800})
    seconds = iter([4.0, 2.0])  # of a copy, and of a kernel

    def timed(calls: list[Callable[[], object]], _device: torch.device) -> tuple[float, float]:
        for call in calls:
            call()
        assert len(calls) == 4
        return next(seconds) * 1e6, 0.0

    monkeypatch.setattr("deployment.measure.timing.microseconds", timed)
    assert copy_rate(torch.device("cpu")) == pytest.approx(2 * 800 / 2)


def test_ways_to_attend_in_fp16_agree() -> None:
    shape, device = Shape(4, 2, 32), torch.device("cpu")
    case = make_case(shape, Scheme.parse("nuq3"), 70, 2, device, seed=0)
    torch.manual_seed(5)
    calls = decode_calls(case, shape)
    assert list(calls) == ["sdpa", "sdpa folded"]
    expected = calls["sdpa"]()
    assert torch.allclose(calls["sdpa folded"]().view_as(expected), expected, atol=2e-3)


def test_a_chunk_in_fp16_sees_all_before_it_and_itself_causally() -> None:
    shape, device, new = Shape(4, 2, 32), torch.device("cpu"), 5
    case = make_case(shape, Scheme.parse("nuq3"), 70, 1, device, seed=0)
    case.key.zero_(), case.value.zero_()
    case.value[:, :, -1] = 1  # and so are the chunk's: of equal weights, 2, 3, ... of 71, 72, ... count
    seen = prefill_calls(case, new, shape)["sdpa"]()
    assert seen.shape == (1, 4, new, 32)
    assert torch.allclose(seen[0, 3, :, 7].float(), torch.arange(2, 7) / torch.arange(71, 76), atol=1e-3)


def test_the_fastest_way_is_measured(monkeypatch, capsys) -> None:
    times = {"slow": 3.0, "quick": 1.0, "broken": 0.5}

    def timed(
        calls: list[str], _device: torch.device, _seconds: float = 1.0, recorded: bool = True
    ) -> tuple[float, float]:
        if calls == ["broken"]:
            raise RuntimeError("no such backend")
        return times[calls[0]], 0.0

    monkeypatch.setattr("deployment.measure.timing.microseconds", timed)
    ways = {name: [name] for name in times}
    assert fastest(ways, torch.device("cpu")) == ("quick", 1.0)  # type: ignore[arg-type]
    assert "broken is left out: no such backend" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="none of broken, broken too"):
        fastest({"broken": ["broken"], "broken too": ["broken"]}, torch.device("cpu"))  # type: ignore[dict-item]
