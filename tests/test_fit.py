"""Fitting: quantiles, sink tokens, the objective that nuq minimises, parallel and streamed fits, refusals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quant.side
from gradients.cli import UserError
from gradients.models import KINDS, Kind
from gradients.records import Records
from quant.artefact import Quantizers, axis_of
from quant.fit import fit
from quant.quantizer import ChannelQuantizer, Quantizer, normalise
from quant.scheme import Scheme
from quant.side import Side, channel_quantiles, fit_side

Window = dict[tuple[int, Kind], tuple[Tensor, Tensor]]


def tables_of(quantizers: Quantizers) -> dict[tuple[int, str, str], Tensor]:
    return {
        (layer, kind, name): table
        for layer, sides in quantizers.layers.items()
        for kind, quantizer in sides.items()
        for name, table in quantizer.tables.items()
    }


def assert_equal_tables(one: Quantizers, other: Quantizers) -> None:
    mine, theirs = tables_of(one), tables_of(other)
    assert mine.keys() == theirs.keys()
    for key, table in mine.items():
        assert torch.equal(table, theirs[key]), key


def random_window(tokens: int, seed: int, channels: int = 24) -> Window:
    """Heavy-tailed activations whose channels differ in size, with Fisher information of a wide range."""
    generator = torch.Generator().manual_seed(seed)

    def side() -> tuple[Tensor, Tensor]:
        normal = torch.randn(tokens, channels, generator=generator)
        sizes = torch.exp2(torch.arange(channels) % 5 - 2.0)
        fisher = torch.randn(tokens, channels, generator=generator).mul(2).exp() * 1e-6
        return normal * normal.abs() * sizes, fisher

    return {(layer, kind): side() for layer in (0, 1) for kind in KINDS}


def weighted_normalised_error(quantizer: Quantizer, side: Side, weighting: str) -> float:
    """The objective of a weighting, over the inliers: the sum of w * (x^ - Q(x^))^2 in float64."""
    x, fisher = side.activation.float(), side.fisher.double()
    encoded = quantizer.encode(x)
    if isinstance(quantizer, ChannelQuantizer):
        scale, zero = quantizer.scale.expand_as(x), quantizer.zero
    else:
        scale, zero = encoded.scale.float().expand_as(x), encoded.zero.float()
    weights = {"fisher*s^2": fisher * scale.double() ** 2, "fisher": fisher, "none": torch.ones_like(fisher)}[weighting]
    error = normalise(x, scale, zero).double() - quantizer.codebook.decode(encoded.codes).double()
    inliers = torch.ones_like(x, dtype=torch.bool) if encoded.outliers is None else ~encoded.outliers
    return float((weights * error**2)[inliers].sum())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.03, 0.1])
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 257, 1000])
def test_quantiles_are_torchs(tokens: int, share: float) -> None:
    x = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(tokens)).half()
    low, high = channel_quantiles(x, share)
    ends = torch.tensor([share / 2, 1 - share / 2], dtype=torch.float64)
    expected = torch.quantile(x.double(), ends, dim=0)
    assert low.dtype == high.dtype == torch.float32
    assert torch.allclose(torch.stack([low, high]).double(), expected, rtol=1e-6, atol=1e-6)
    if not share:
        assert torch.equal(low, x.float().amin(0))
        assert torch.equal(high, x.float().amax(0))


def test_the_range_spans_the_quantiles(records: Records) -> None:
    scheme = Scheme.parse("int4-2%", sink_tokens=3)
    quantizer = fit(records, scheme).layers[1]["key"]
    windows = [records.read(window, 1, "key")[0] for window in range(records.manifest.windows)]
    calibration = torch.cat([window[3:] for window in windows]).double()
    low, high = torch.quantile(calibration, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    assert torch.allclose(quantizer.scale.double(), (high - low) / 2, rtol=1e-5)
    assert torch.allclose(quantizer.zero.double(), (high + low) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sinks", [1, 5])
def test_sink_tokens_do_not_take_part(sinks: int, make_records: Callable[..., Records], tmp_path: Path) -> None:
    clean = [random_window(33, seed) for seed in range(3)]
    poisoned = [{side: (x.clone(), fisher.clone()) for side, (x, fisher) in window.items()} for window in clean]
    for window in poisoned:
        for activation, fisher in window.values():
            activation[:sinks], fisher[:sinks] = 6e4, 1e3
    scheme = Scheme.parse("nuq3-1%", sink_tokens=sinks)
    clean_records = make_records(tmp_path / "clean", clean)
    poisoned_records = make_records(tmp_path / "poisoned", poisoned)
    assert_equal_tables(fit(clean_records, scheme), fit(poisoned_records, scheme))
    one_too_few = fit(poisoned_records, scheme.with_changes(sink_tokens=sinks - 1))
    assert one_too_few.layers[0]["key"].scale.min() > 1e3  # the poison works


@pytest.mark.parametrize("name", ["nuq3-1%", "nf2"])
def test_parallel_fit_is_the_serial_one(name: str, records: Records) -> None:
    scheme = Scheme.parse(name, q_norm=True)
    assert_equal_tables(fit(records, scheme, jobs=2), fit(records, scheme, jobs=1))


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "token"])
def test_streamed_fit_is_the_whole_one(per_channel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    side = Side(
        *(x.to(dtype) for x, dtype in zip(random_window(257, 0)[0, "key"], (torch.half, torch.bfloat16), strict=True))
    )
    scheme = Scheme.parse("nuq3-2%", q_norm=True)
    whole = fit_side(side, scheme, per_channel)
    monkeypatch.setattr(quant.side, "_CHUNK_ELEMENTS", 31 * 24)
    assert sum(1 for _ in side.chunks()) == 9
    streamed = fit_side(side, scheme, per_channel)
    for name, table in whole.tables.items():
        assert torch.allclose(table, streamed.tables[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", ["", "-1%"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nuq_has_the_least_weighted_error(bits: int, share: str, kind: Kind, records: Records) -> None:
    for layer in records.manifest.fingerprint.cached_layers:
        side = Side(*records.read_layer(layer, kind, skip_tokens=1))
        error = {}
        for datatype in ("int", "nf", "nuq"):
            scheme = Scheme.parse(f"{datatype}{bits}{share}")
            quantizer = fit_side(side, scheme, axis_of(scheme, kind) == "channel")
            error[datatype] = weighted_normalised_error(quantizer, side, "fisher*s^2")
        assert 0 < error["nuq"] < min(error["int"], error["nf"])


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "token"])
def test_each_weighting_minimises_its_own_objective(per_channel: bool) -> None:
    activation, fisher = random_window(400, 3)[0, "value"]
    sizes = torch.exp2(torch.arange(400) % 6 - 3.0)[:, None]
    side = Side((activation * sizes).half(), fisher.bfloat16())
    weightings = ["fisher*s^2", "fisher", "none"]
    fitted = {
        weighting: fit_side(side, Scheme.parse("nuq2-1%", weights=weighting), per_channel) for weighting in weightings
    }
    for objective in weightings:
        errors = {weighting: weighted_normalised_error(fitted[weighting], side, objective) for weighting in weightings}
        others = [error for weighting, error in errors.items() if weighting != objective]
        assert errors[objective] < 0.999 * min(others), (objective, errors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["int2", "nf2-1%", "nuq2-1%"])
def test_q_norm_matches_the_calibration_moments(name: str, kind: Kind, records: Records) -> None:
    side = Side(*records.read_layer(0, kind))
    quantizer = fit_side(side, Scheme.parse(name, q_norm=True), kind == "key")
    plain = fit_side(side, Scheme.parse(name), kind == "key")
    x = side.activation.float()
    encoded = quantizer.encode(x)
    if isinstance(quantizer, ChannelQuantizer):
        normalised = normalise(x, quantizer.scale, quantizer.zero)
    else:
        normalised = normalise(x, encoded.scale.float(), encoded.zero.float()).clamp(-1, 1)
    inliers = torch.ones_like(x, dtype=torch.bool) if encoded.outliers is None else ~encoded.outliers
    dequantized = quantizer.codebook.decode(encoded.codes)[inliers].double().numpy()
    wanted = normalised[inliers].double().numpy()
    assert dequantized.mean() == pytest.approx(wanted.mean(), abs=1e-4)
    assert dequantized.std() == pytest.approx(wanted.std(), abs=1e-4)
    assert torch.equal(quantizer.codebook.boundaries, plain.codebook.boundaries)
    assert not np.allclose(plain.codebook.decode(encoded.codes)[inliers].numpy().std(), wanted.std(), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "channel_sides"),
    [({}, {"key"}), ({"key_axis": "token"}, set()), ({"value_axis": "channel"}, {"key", "value"})],
    ids=["default", "keys per token", "values per channel"],
)
def test_axes_decide_the_kind_of_range(options: dict[str, Any], channel_sides: set[str], records: Records) -> None:
    fitted = fit(records, Scheme.parse("nuq3-1%", **options))
    assert sorted(fitted.layers) == [0, 1]
    for sides in fitted.layers.values():
        assert {kind for kind, quantizer in sides.items() if isinstance(quantizer, ChannelQuantizer)} == channel_sides
    assert fitted.fingerprint == records.manifest.fingerprint
    assert fitted.records_digest == records.manifest.digest


@pytest.mark.parametrize("what", [0, 1], ids=["activation", "fisher"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_refuses_records_that_are_not_finite(
    poison: float, what: int, make_records: Callable[..., Records], tmp_path: Path
) -> None:
    windows = [random_window(31, seed) for seed in range(2)]
    windows[1][1, "value"][what][30, 23] = poison
    with pytest.raises(UserError, match="layer 1 value has NaN or infinite"):
        fit(make_records(tmp_path, windows), Scheme.parse("nuq3-1%"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_refuses_records_without_a_window(jobs: int, make_records: Callable[..., Records], tmp_path: Path) -> None:
    made = make_records(tmp_path, [random_window(31, seed) for seed in range(2)])
    made.path(1).unlink()
    with pytest.raises(UserError, match="window-00001.safetensors' is missing; run"):
        fit(made, Scheme.parse("nuq3-1%"), jobs)


def test_refuses_more_sinks_than_tokens(records: Records) -> None:
    with pytest.raises(UserError, match="--sink-tokens 65 leaves nothing of windows of 65 tokens"):
        fit(records, Scheme.parse("nuq3-1%", sink_tokens=65))


def test_one_calibration_token_is_enough(make_records: Callable[..., Records], tmp_path: Path) -> None:
    window = random_window(2, 0)
    fitted = fit(make_records(tmp_path, [window]), Scheme.parse("nuq3-1%"))
    token = window[0, "key"][0][1:].half().float()
    quantizer = fitted.layers[0]["key"]
    assert torch.equal(quantizer.decode(quantizer.encode(token)), token)
