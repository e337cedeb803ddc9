"""Fitting: quantiles, sink tokens, the objective that nuq minimises, parallel and streamed fits, refusals."""

import os
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quant.side
from gradients.__main__ import main as record_main
from gradients.cli import UserError
from gradients.models import KINDS, Kind
from gradients.records import Records
from quant.artefact import Quantizers, axis_of, load_quantizers
from quant.codebook import nf_codebook
from quant.fit import _mapper, fit
from quant.fit import main as fit_main
from quant.grouped import GroupQuantizer
from quant.quantizer import ChannelQuantizer, Encoded, Quantizer, TokenQuantizer, normalise, token_range
from quant.scheme import Axis, Scheme
from quant.side import Side, channel_quantiles, fit_side, matrix_quantiles, normalise_groups, read_side

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
    scale, zero = quantizer.ranges(encoded)
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


def test_the_range_spans_the_quantiles(records) -> None:
    scheme = Scheme.parse("int4-2%", sink_tokens=3)
    quantizer = fit(records, scheme).layers[1]["key"]
    windows = [records.read(window, 1, "key")[0] for window in range(records.manifest.windows)]
    calibration = torch.cat([window[3:] for window in windows]).double()
    low, high = torch.quantile(calibration, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    assert torch.allclose(quantizer.scale.double(), (high - low) / 2, rtol=1e-5)
    assert torch.allclose(quantizer.zero.double(), (high + low) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sinks", [1, 5])
def test_sink_tokens_do_not_take_part(sinks: int, make_records, tmp_path) -> None:
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


@pytest.mark.parametrize(("name", "q_norm"), [("nuq3-1%", True), ("nf2", True), ("rdnuq2.5-4%", False)])
def test_parallel_fit_is_the_serial_one(name: str, q_norm: bool, records) -> None:
    scheme = Scheme.parse(name, q_norm=q_norm)
    assert_equal_tables(fit(records, scheme, jobs=2), fit(records, scheme, jobs=1))


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "token"])
def test_streamed_fit_is_the_whole_one(per_channel: bool, monkeypatch) -> None:
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
def test_nuq_has_the_least_weighted_error(bits: int, share: str, kind: Kind, records) -> None:
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
def test_q_norm_matches_the_calibration_moments(name: str, kind: Kind, records) -> None:
    side = Side(*records.read_layer(0, kind))
    quantizer = fit_side(side, Scheme.parse(name, q_norm=True), kind == "key")
    plain = fit_side(side, Scheme.parse(name), kind == "key")
    x = side.activation.float()
    encoded = quantizer.encode(x)
    normalised = normalise(x, *quantizer.ranges(encoded)).clamp(-1, 1)
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
def test_axes_decide_the_kind_of_range(options: dict[str, Any], channel_sides: set[str], records) -> None:
    fitted = fit(records, Scheme.parse("nuq3-1%", **options))
    assert sorted(fitted.layers) == [0, 1]
    for sides in fitted.layers.values():
        assert {kind for kind, quantizer in sides.items() if isinstance(quantizer, ChannelQuantizer)} == channel_sides
    assert fitted.fingerprint == records.manifest.fingerprint
    assert fitted.records_digest == records.manifest.digest


def rotated_by_hand(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[S, C]` with the pairs (d, d + D/2) of every head as complex numbers, turned; D = 12."""
    first, second = x.double().unflatten(-1, (-1, 2, 6)).unbind(-2)
    whirl = torch.complex(first, second) * torch.complex(cos[:, :6], sin[:, :6]).to(torch.complex128)[:, None]
    return torch.stack([whirl.real, whirl.imag], -2).flatten(1)


def rotated_squares_by_hand(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[S, C]`, squares of pairs that are uncorrelated."""
    first, second = x.double().unflatten(-1, (-1, 2, 6)).unbind(-2)
    own, other = (table[:, None, :6].double().square() for table in (cos, sin))
    return torch.stack([first * own + second * other, second * own + first * other], -2).flatten(1)


@pytest.mark.parametrize("sinks", [0, 3])
def test_keys_after_the_rotary_embedding_are_turned_as_in_their_window(sinks: int, records) -> None:
    """Every window starts at position 0; sinks are left out after that, not before."""
    scheme = Scheme.parse("nuq3-2%", key_rope="post", sink_tokens=sinks)
    tables = records.read_rope()
    for layer in (0, 1):
        side = read_side(records, scheme, layer, "key")
        expected: list[list[Tensor]] = [[], []]
        for window in range(records.manifest.windows):
            for found, x, turn in zip(
                expected, records.read(window, layer, "key"), (rotated_by_hand, rotated_squares_by_hand), strict=True
            ):
                found.append(turn(x, *tables)[sinks:])
        activation, fisher = (torch.cat(found) for found in expected)
        assert side.activation.dtype == torch.float16 and side.fisher.dtype == torch.bfloat16
        assert torch.allclose(side.activation.double(), activation, rtol=1e-3, atol=1e-5)
        assert torch.allclose(side.fisher.double(), fisher, rtol=1e-2, atol=0)
        before = records.read_layer(layer, "key", skip_tokens=sinks)
        assert not torch.allclose(before[0].double(), activation, atol=0.1)
        assert not torch.allclose(before[1].double(), fisher, rtol=0.1)
        values = read_side(records, scheme, layer, "value")
        for mine, stored in zip(
            (values.activation, values.fisher), records.read_layer(layer, "value", sinks), strict=True
        ):
            assert torch.equal(mine, stored)


def test_keys_after_the_rotary_embedding_need_its_tables(make_records, tmp_path) -> None:
    made = make_records(tmp_path, [random_window(31, 0)])
    with pytest.raises(UserError, match=r"rope.safetensors' cannot be read .*run `python -m gradients` again"):
        fit(made, Scheme.parse("nuq3-1%", key_rope="post"))
    fit(made, Scheme.parse("nuq3-1%"))


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
def test_matrix_quantiles_are_numpys(share: float) -> None:
    x = random_window(257, 1)[0, "key"][0].half()
    low, high = matrix_quantiles(x, share)
    expected = np.quantile(x.double().numpy(), [share / 2, 1 - share / 2])
    assert [float(low), float(high)] == pytest.approx(list(expected), rel=1e-5)
    assert low.shape == high.shape == () and low.dtype == high.dtype == torch.float32


@pytest.mark.parametrize("key_axis", ["channel", "token"])
def test_matrix_thresholds_leave_the_share_to_the_matrix(key_axis: str, records) -> None:
    """The share holds for a layer's keys or values as a whole, and not for any channel or token."""
    scheme = Scheme.parse("nuq3-5%", thresholds="matrix", key_axis=key_axis)
    fitted = fit(records, scheme)
    for kind in KINDS:
        x = records.read_layer(0, kind, skip_tokens=1)[0].float()
        outliers = fitted.layers[0][kind].encode(x).outliers
        assert float(outliers.float().mean()) == pytest.approx(0.05, abs=0.005)
        low, high = matrix_quantiles(x, 0.05)
        if axis_of(scheme, kind) == "token":
            assert torch.equal(outliers, (x < low) | (x > high))
        else:
            assert outliers[(x < low) | (x > high)].all()
        per_channel = outliers.float().mean(0)
        assert per_channel.min() < 0.02 and per_channel.max() > 0.08


def matrix_side() -> Side:
    """Channel 3 lies beyond the rest altogether, channel 5 partly, the others hardly."""
    x = torch.randn(400, 24, generator=torch.Generator().manual_seed(2))
    x[:, 3] = 50 + torch.arange(400) / 10
    x[:, 5] *= 10
    return Side(x.half(), torch.ones(400, 24).bfloat16())


def test_a_channel_beyond_the_matrixs_thresholds_is_kept_exactly() -> None:
    side = matrix_side()
    quantizer = fit_side(side, Scheme.parse("nuq3-10%", thresholds="matrix"), True)
    low, high = matrix_quantiles(side.activation, 0.1)
    assert isinstance(quantizer, ChannelQuantizer)
    assert quantizer.scale[3] == 0 and quantizer.zero[3] == high
    assert (quantizer.scale[5], quantizer.zero[5]) == ((high - low) / 2, (high + low) / 2)
    x = side.activation.float()
    for channel in (0, 23):  # within the thresholds but for some elements
        ends = x[:, channel].clamp(low, high)
        assert float(quantizer.scale[channel]) == pytest.approx(float(ends.max() - ends.min()) / 2, rel=1e-6)
    decoded = quantizer.decode(quantizer.encode(x))
    assert torch.equal(decoded[:, 3], x[:, 3])
    assert decoded.isfinite().all() and not torch.equal(decoded[:, 0], x[:, 0])


def test_a_token_of_outliers_only_is_kept_exactly() -> None:
    quantizer = fit_side(matrix_side(), Scheme.parse("nuq3-10%", thresholds="matrix"), False)
    assert isinstance(quantizer, TokenQuantizer)
    x = matrix_side().activation.float()[:5]
    x[2] = torch.arange(24) - 500.25
    x[4, 1:] = 777.0
    encoded = quantizer.encode(x)
    decoded = quantizer.decode(encoded)
    assert encoded.outliers[2].all() and int(encoded.outliers[4].sum()) == 23
    assert (encoded.scale[2], encoded.zero[2]) == (0, 0)
    assert torch.equal(decoded[2], x[2]) and torch.equal(decoded[4, 1:], x[4, 1:])
    assert decoded[4, 0] == x[4, 0].half() and encoded.scale[4] == 0  # the only one left is its own range
    assert torch.equal(decoded[encoded.outliers], x[encoded.outliers])


def test_thresholds_of_a_matrix_replace_the_share_of_a_token() -> None:
    x = torch.tensor([[-9.0, 0.0, 1.0, 4.0, 5.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    outliers, scale, zero = token_range(x, 0.1, torch.tensor([-1.0, 4.0]))
    assert outliers.tolist() == [[True, False, False, False, True], [False] * 5]
    assert scale.tolist() == [[2.0], [2.0]] and zero.tolist() == [[2.0], [2.0]]
    by_share, *_ = token_range(x, 0.1)
    assert by_share.sum(-1).tolist() == [2, 2]


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize(("name", "group"), [("nuq3", 8), ("nuq3-10%", 8), ("nuq3-10%", None)])
def test_groups_are_normalised_in_the_fit_as_in_encoding(name: str, group: int | None, axis: Axis) -> None:
    """Three sequences of 40 tokens: their groups do not run on into one another."""
    scheme = Scheme.parse(name, group=group, channel_range="online", value_axis=axis)
    x = random_window(120, 4)[0, "value"][0]
    normalised, outliers, scale = normalise_groups(x, scheme, axis, 40)
    quantizer = GroupQuantizer(scheme, nf_codebook(scheme.levels), axis)
    for number in range(3):
        tokens = slice(40 * number, 40 * (number + 1))
        encoded = quantizer.encode(x[tokens])
        assert torch.equal(quantizer.codebook.encode(normalised[tokens]), encoded.codes)
        assert (outliers is None) == (encoded.outliers is None)
        assert outliers is None or torch.equal(outliers[tokens], encoded.outliers)
        dense = quantizer.codebook.decode(encoded.codes) * scale[tokens]
        assert torch.allclose(dense, quantizer.dense(encoded) - encoded_zero(encoded, axis, group), atol=1e-4)


def encoded_zero(encoded: Encoded, axis: Axis, group: int | None) -> Tensor:
    """The zero of every element."""
    dim = -2 if axis == "channel" else -1
    length = encoded.codes.shape[dim]
    return encoded.zero.float().repeat_interleave(group or length, dim).narrow(dim, 0, length)


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (Scheme.parse("nuq2", channel_range="online"), "key"),
        (Scheme.parse("nuq2-5%", channel_range="online", group=16), "key"),
        (Scheme.parse("nuq2", group=8), "value"),
        (Scheme.parse("nuq2-10%", group=8, key_axis="token", key_rope="post"), "key"),
    ],
    ids=lambda value: value.describe() if isinstance(value, Scheme) else value,
)
def test_nuq_has_the_least_error_in_groups_too(scheme: Scheme, kind: Kind, records) -> None:
    side = read_side(records, scheme, 1, kind)
    axis = axis_of(scheme, kind)
    x, error = side.activation.float().unflatten(0, (-1, side.sequence)), {}
    for datatype in ("int", "nf", "nuq"):
        quantizer = fit_side(side, scheme.with_changes(datatype=datatype), axis == "channel")
        assert isinstance(quantizer, GroupQuantizer)
        lost = (quantizer.decode(quantizer.encode(x)) - x).flatten(0, 1).double().square()
        error[datatype] = float((lost * side.fisher.double()).sum())
    assert 0 < error["nuq"] < min(error["int"], error["nf"])


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "token"])
@pytest.mark.parametrize("name", ["nuq3", "nuq3-10%", "atom3", "flexgen3"])
def test_a_streamed_fit_never_parts_a_sequence(name: str, per_channel: bool, monkeypatch) -> None:
    activation, fisher = random_window(7 * 40, 0)[0, "key"]
    side = Side(activation.half(), fisher.bfloat16(), window=40)
    options = (
        {"group": 8} if name in ("atom3", "flexgen3") else {"channel_range": "online", "group": 16, "q_norm": True}
    )
    scheme = Scheme.parse(name, **options)
    whole = fit_side(side, scheme, per_channel)
    for tokens in (1, 97):  # less than a sequence, and two of them and a bit
        monkeypatch.setattr(quant.side, "_CHUNK_ELEMENTS", tokens * 24)
        sizes = [len(x) for x, _ in side.chunks(whole_sequences=True)]
        assert sizes == ([40] * 7 if tokens == 1 else [80] * 3 + [40])
        streamed = fit_side(side, scheme, per_channel)
        for table, expected in whole.tables.items():
            assert torch.allclose(streamed.tables[table], expected, rtol=1e-5, atol=1e-6), table


def test_fewer_windows_fit_as_a_smaller_recording(records, record_arguments, tmp_path) -> None:
    output = ["--output", str(tmp_path / "q.safetensors")]
    result = fit_main(["--records", str(records.folder), "--scheme", "nuq3-1%", "--windows", "2", *output])
    record_main([*record_arguments, "--windows", "2", "--output", str(tmp_path / "small")])
    small = fit(Records.open(tmp_path / "small"), Scheme.parse("nuq3-1%"))
    assert result["scheme"] == "nuq3-1%" and result["layers"] == 2
    assert_equal_tables(load_quantizers(tmp_path / "q.safetensors"), small)
    all_of_them = tables_of(fit(records, Scheme.parse("nuq3-1%")))
    assert not torch.equal(all_of_them[0, "key", "scale"], tables_of(small)[0, "key", "scale"])


def test_more_windows_than_recorded_are_refused(records, tmp_path) -> None:
    output = tmp_path / "q.safetensors"
    with pytest.raises(UserError, match="5 calibration windows .* hold 4; record more, or ask for fewer"):
        fit_main(["--records", str(records.folder), "--scheme", "nuq3", "--windows", "5", "--output", str(output)])
    assert not output.exists()


def test_the_command_takes_presets_and_options(records, tmp_path) -> None:
    output = tmp_path / "q.safetensors"
    arguments = ["--records", str(records.folder), "--output", str(output), "--scheme", "kivi2"]
    assert fit_main(arguments)["scheme"] == "kivi2"
    assert load_quantizers(output).scheme == Scheme.parse("kivi2")
    assert (
        fit_main([*arguments, "--group", "8", "--residual-tokens", "16"])["scheme"]
        == "kivi2 group=8 residual_tokens=16"
    )
    assert load_quantizers(output).scheme == Scheme.parse("kivi2", group=8, residual_tokens=16)
    with pytest.raises(UserError, match="group 1 is less than 2"):
        fit_main([*arguments, "--group", "1"])


@pytest.mark.parametrize("what", [0, 1], ids=["activation", "fisher"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_refuses_records_that_are_not_finite(poison: float, what: int, make_records, tmp_path) -> None:
    windows = [random_window(31, seed) for seed in range(2)]
    windows[1][1, "value"][what][30, 23] = poison
    with pytest.raises(UserError, match="layer 1 value has NaN or infinite"):
        fit(make_records(tmp_path, windows), Scheme.parse("nuq3-1%"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_refuses_records_without_a_window(jobs: int, make_records, tmp_path) -> None:
    made = make_records(tmp_path, [random_window(31, seed) for seed in range(2)])
    made.path(1).unlink()
    with pytest.raises(UserError, match="window-00001.safetensors' is missing; run"):
        fit(made, Scheme.parse("nuq3-1%"), jobs)


def test_one_calibration_token_is_enough(make_records, tmp_path) -> None:
    window = random_window(2, 0)
    fitted = fit(make_records(tmp_path, [window]), Scheme.parse("nuq3-1%"))
    token = window[0, "key"][0][1:].half().float()
    quantizer = fitted.layers[0]["key"]
    assert torch.equal(quantizer.decode(quantizer.encode(token)), token)


def test_rotary_tables_of_another_length_are_refused(records, tmp_path) -> None:
    made = Records.open(shutil.copytree(records.folder, tmp_path / "copied"))
    cos, sin = records.read_rope()
    made.write_rope(cos[:40], sin[:40])
    with pytest.raises(UserError, match=r"rope.safetensors' has tensor cos .*run `python -m gradients` again"):
        fit(made, Scheme.parse("nuq3", key_rope="post"))


def test_a_process_that_is_killed_is_said() -> None:
    """As the operating system does when memory is short."""
    with (
        _mapper(2) as spread,
        pytest.raises(UserError, match="one of the 2 processes was killed while dying, .* fewer --jobs"),
    ):
        spread("dying", os._exit, [1, 1])
