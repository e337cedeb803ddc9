"""What the plot commands draw: their lines, bars, levels and labels, not only that a file appears."""

import json
import struct
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from gradients.cli import UserError
from gradients.models import KINDS
from gradients.records import Records
from gradients.rope import rotate
from quant.fit import fit
from quant.scheme import Scheme
from scripts.report import figures, plot_fisher, plot_key_ranges, plot_levels, plot_methods, plot_needle, plot_speed

Draw = Callable[..., tuple[Any, dict[str, Any]]]


@pytest.fixture
def draw(monkeypatch, tmp_path) -> Draw:
    """`draw(command, *arguments)` runs a command and returns (its figure, its JSON summary); the PNG was looked at."""
    pytest.importorskip("matplotlib")
    drawn = []

    def keep(figure: Any, path: Path) -> None:
        drawn.append(figure)
        save(figure, path)

    save = figures.save
    monkeypatch.setattr(figures, "save", keep)

    def run(command: Any, *arguments: str) -> tuple[Any, dict[str, Any]]:
        path = tmp_path / "plots" / "drawn.png"
        summary = command.main([*arguments, "--output", str(path)])
        figure = drawn.pop()
        check_png(path, figure)
        assert summary["output"] == str(path) and json.dumps(summary)
        return figure, summary

    return run


def check_png(path: Path, figure: Any) -> None:
    from PIL import Image

    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and 5_000 < len(data) < 120_000
    size = struct.unpack(">II", data[16:24])
    assert size == tuple((figure.get_size_inches() * figures.DPI + 1e-6).astype(int)) and min(size) > 300
    assert len(Image.open(path).convert("RGB").getcolors(1 << 20)) > 50, "hardly anything was drawn"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "a temporary file was left"


def texts(place: Any) -> list[str]:
    return [text.get_text() for text in place.texts]


# methods


def row(scheme: str, bits: float, increase: float, **changes: Any) -> dict[str, Any]:
    evaluation = {"model": "tiny", "text": "words.txt", "seqlen": 65, "tokens": 64, "baseline_nll": 3.0}
    return {**evaluation, "scheme": scheme, "bits_per_element": bits, "nll": 3 + increase, **changes}


ROWS = [
    row("nuq3-1%", 3.46, 0.06),
    row("nuq2-1%", 2.47, 0.31),
    row("nuq2", 2.11, 0.60),
    row("rdnuq2.4", 2.44, 0.08),
    row("rdnuq2.4+fb", 2.44, 0.06),
    row("nuq3+fb", 3.11, 0.04),
    row("rdnuq3", 3.04, 0.028),
    row("kivi2", 6.7, 0.04),
    row("kivi4", 8.2, -0.0004),
    row("kivi2 residual_tokens=0", 3.03, 0.44),
    row("int2-1%", 2.46, 0.32),
    row("novel3 group=8", 3.2, 0.31),
]


@pytest.fixture
def rows_file(tmp_path) -> Callable[[Sequence[dict[str, Any]]], Path]:
    def write(rows: Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        return path

    return write


def test_a_line_joins_the_widths_of_a_method(draw, rows_file) -> None:
    figure, summary = draw(plot_methods, "--results", str(rows_file(ROWS)))
    (place,) = figure.axes
    lines = {line.get_label(): line for line in place.lines}
    assert summary["methods"] == len(lines) == 9 and summary["rows"] == len(ROWS)
    paper = lines["nuq-1% (KVQuant)"]
    assert paper.get_xdata() == pytest.approx([2.47, 3.46]) and paper.get_ydata() == pytest.approx([0.31, 0.06])
    assert lines["rdnuq (ours)"].get_xdata() == pytest.approx([2.44, 3.04])
    assert lines["KIVI"].get_xdata() == pytest.approx([6.7]), "what loses nothing has no place on a logarithm"
    assert "kivi4: -0.0004" in texts(place)
    assert lines["novel group=8"].get_color() == figures.GREY
    others = [line.get_linewidth() for label, line in lines.items() if label != "rdnuq+fb (ours)"]
    assert lines["rdnuq+fb (ours)"].get_linewidth() > 2 * max(others)
    assert lines["nuq+fb (ours)"].get_xdata() == pytest.approx([3.11])
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines.values()]
    assert len(set(looks)) == len(looks)


def test_the_committed_rows_can_be_drawn() -> None:
    methods, evaluation = plot_methods.read_methods(plot_methods.RESULTS)
    assert {"rdnuqg1-4%", "nuq-1%", "nuq", "nf-1%", "int-1%"} <= methods.keys() and evaluation["seqlen"] == 512
    assert all(one.bits < other.bits for points in methods.values() for one, other in pairwise(points))


# speed


def layer_row(scheme: str, context: int, us: float, fp16_us: float, **other: Any) -> dict[str, Any]:
    step = {"op": "decode", "us": us, "fp16_us": fp16_us, "speedup": fp16_us / us, "percent_of_copy": 50.0}
    sizes = {"copy_gb_per_s": 2.0, "bytes_per_token": 100.0, "fp16_bytes_per_token": 400.0}
    row = {"shape": "llama-7b", "scheme": scheme, "context": context, "batch": 1, "path": "triton", "device": "H200"}
    return row | sizes | {"ops": [{"op": "append", "us": 1.0}, step]} | other


def test_speed_shows_times_and_limits(draw, rows_file) -> None:
    rows = [
        layer_row("nuq3-1%", 1 << 20, 1, 1, device="another"),
        layer_row("nuq3-1%", 1 << 20, 1, 1, batch=8),
        layer_row("nuq2-1%", 4096, 300, 900),
        layer_row("nuq3-1%", 2048, 200, 500),
        layer_row("nuq3-1%", 4096, 400, 800),
    ]
    figure, summary = draw(plot_speed, "--results", str(rows_file(rows)))
    assert summary["points"] == 4 and summary["shapes"] == ["llama-7b"]
    (place,) = figure.axes
    lines = {line.get_label(): line for line in place.lines}
    assert lines["fp16"].get_xydata().tolist() == [[2048, 500], [4096, 800]]  # the quicker of the two at 4096
    assert lines["nuq3-1%"].get_xydata().tolist() == [[2048, 200], [4096, 400]]
    limits = [line.get_ydata()[-1] for line in place.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    assert limits == pytest.approx([400 * 4096 / 2e3, 100 * 4096 / 2e3])
    assert "nuq2-1%" not in lines  # one context makes no line
    assert place.get_xscale() == place.get_yscale() == "log"
    assert [label.get_text() for label in place.get_xticklabels()] == ["2K", "4K"]


# needle


def needle_row(scheme: str, bits: float, context: int, depth: float, found: float, **changes: Any) -> dict[str, Any]:
    evaluation = {"model": "tiny", "text": "generated", "samples": 2, "seed": 0, "mode": "simulated"}
    cell = {"scheme": scheme, "bits_per_element": bits, "context": context, "depth": depth}
    return {**evaluation, **cell, "found": found, "nll_per_token": 1 - found / 2, **changes}


NEEDLES = [
    needle_row(scheme, bits, context, depth, worth * (1 - depth / 2))
    for scheme, bits, worth in (("nuq2-1%", 2.5, 0.5), ("unquantized", 32, 1), ("nuq4-1%", 4.5, 0.9), ("rdnuq2", 2, 0))
    for context in (2048, 1024)
    for depth in (0.5, 0, 1)
]


def test_a_heat_map_shows_every_cell(draw, rows_file) -> None:
    packed = needle_row("nuq4-1%", 4.6, 2048, 0.5, 0.3, mode="packed")
    figure, summary = draw(plot_needle, "--results", str(rows_file([*NEEDLES, packed])))
    assert summary["rows"] == len(NEEDLES) + 1 and summary["schemes"] == 5
    shown = [place for place in figure.axes if place.texts]
    titles = [place.get_title(loc="left") for place in shown]
    assert titles[:2] == ["unquantized, 32 bits", "nuq4-1%, packed, 4.6 bits"]
    assert titles[2:] == ["nuq4-1%, 4.5 bits", "nuq2-1%, 2.5 bits", "rdnuq2, 2 bits"]
    assert [text.get_text() for text in shown.pop(1).texts] == ["30%\n0.85"], "packed rows have a panel of their own"
    for place in shown:
        scheme = place.get_title(loc="left").split(",")[0]
        cells = {text.get_position(): text.get_text() for text in place.texts}
        for one in (one for one in NEEDLES if one["scheme"] == scheme):
            where = ([1024, 2048].index(one["context"]), [0, 0.5, 1].index(one["depth"]))
            assert cells[where] == f"{one['found']:.0%}\n{one['nll_per_token']:.2f}"
        assert place.get_ylim()[0] > place.get_ylim()[1], "depth 0 is on top"


@pytest.mark.parametrize(
    ("plot", "rows", "message"),
    [
        (plot_methods, [], "holds no rows; run `python -m scripts.sweep_schemes"),
        (plot_needle, [], "holds no rows; run `python -m scripts.retrieval.needle"),
        (plot_speed, [], "holds no rows; run `python -m deployment.benchmark"),
        (plot_methods, [row("nuq2", 2.1, 0.6), row("nuq3", 3.1, 0.1, seqlen=512)], "mixes evaluations"),
        (plot_needle, [NEEDLES[0], NEEDLES[0] | {"model": "other"}], "mixes evaluations"),
        (plot_methods, [{"scheme": "nuq2"}], "lacks 'model'"),
        (
            plot_needle,
            [NEEDLES[0], {name: NEEDLES[0][name] for name in NEEDLES[0] if name != "found"}],
            "lacks 'found'",
        ),
        (plot_speed, [{"shape": "llama-7b"}], "lacks 'device'"),
        (plot_methods, [row("two bits", 2.0, 0.1)], "two bits"),
        (plot_speed, [layer_row("nuq3", 2048, 200, 500, batch=3)], "no row holds decode steps .* batch 1"),
    ],
)
def test_rows_that_cannot_be_drawn(plot: Any, rows: list[dict[str, Any]], message: str, rows_file, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=message):
        plot.main(["--results", str(rows_file(rows)), "--output", str(tmp_path / "none.png")])
    assert not (tmp_path / "none.png").exists()


# records


def keys_after_rope(records: Records, layer: int) -> torch.Tensor:
    """`[N, C]` without first tokens, turned window by window with nothing of `quant.side`."""
    cos, sin = records.read_rope()
    turned = []
    for window in range(records.manifest.windows):
        x = records.read(window, layer, "key")[0].float()
        heads = x.unflatten(-1, (-1, records.manifest.fingerprint.head_dim)).transpose(0, 1)[None]
        turned.append(rotate(heads, cos[None], sin[None])[0].transpose(0, 1).flatten(1)[1:])
    return torch.cat(turned)


def test_key_ranges_are_those_of_the_channels(draw, records) -> None:
    figure, summary = draw(plot_key_ranges, "--records", str(records.folder), "--layer", "1")
    before, after = figure.axes
    assert before.get_ylim() == after.get_ylim()
    sides = (records.read_layer(1, "key", skip_tokens=1)[0].float().numpy(), keys_after_rope(records, 1).numpy())
    for place, x, shown in zip((before, after), sides, summary["rows"], strict=True):
        low, high = np.quantile(x, [0.005, 0.995], axis=0)
        for bars, bottom, top in zip(place.containers, (x.min(0), low), (x.max(0), high), strict=True):
            # keys after the rotary embedding are rounded to fp16
            assert [bar.get_y() for bar in bars] == pytest.approx(list(bottom), abs=0.02)
            assert [bar.get_y() + bar.get_height() for bar in bars] == pytest.approx(list(top), abs=0.02)
        assert shown["mean_width"] == pytest.approx((high - low).mean(), abs=0.02)
        assert f"{shown['keys']}: mean width {shown['mean_width']:.1f}" in place.get_title(loc="left")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["minimum to maximum", "0.5 % to 99.5 % of the tokens, centre in white"]


def test_fisher_is_drawn_by_layer(draw, records) -> None:
    figure, summary = draw(plot_fisher, "--records", str(records.folder), "--sink-tokens", "2")
    (place,) = figure.axes
    assert place.get_yscale() == "log"
    assert [text.get_text() for text in place.get_legend().get_texts()] == ["keys", "values"]
    bands = place.collections
    for kind, line, band, shown in zip(KINDS, place.lines, bands, summary["rows"], strict=True):
        channels = [records.read_layer(layer, kind, skip_tokens=2)[1].double().mean(0).numpy() for layer in (0, 1)]
        assert line.get_xdata().tolist() == [0, 1]
        assert line.get_ydata() == pytest.approx([one.mean() for one in channels])
        ends = band.get_paths()[0].get_extents()
        quantiles = np.quantile(channels, [0.1, 0.9], axis=1)
        assert (ends.y0, ends.y1) == pytest.approx((quantiles[0].min(), quantiles[1].max()))
        assert shown["greatest_mean"] == pytest.approx(max(one.mean() for one in channels))


def tick_rows(place: Any) -> dict[str, list[float]]:
    """Levels by the name beside them."""
    rows = {line.get_label(): line.get_xdata().tolist() for line in place.lines if line.get_marker() == "|"}
    assert list(rows) == [label.get_text() for label in place.get_yticklabels()]
    return rows


def test_levels_are_the_fitted_ones(draw, records) -> None:
    figure, summary = draw(
        plot_levels, "--records", str(records.folder), "--layer", "1", "--schemes", "nuq3-1%", "rdnuq3.4"
    )
    assert len(figure.axes) == 8 and len(summary["rows"]) == 4
    keys, values, key_ticks, value_ticks, *_, key_widths, _ = figure.axes
    fitted = fit(records, Scheme.parse("nuq3-1%")).layers[1]
    for kind, place in zip(KINDS, (key_ticks, value_ticks), strict=True):
        rows = tick_rows(place)
        assert list(rows) == ["nuq3-1%", "int3", "nf3"]
        assert rows["nuq3-1%"] == pytest.approx(fitted[kind].tables["levels"].tolist())
        assert rows["int3"] == pytest.approx(np.linspace(-1, 1, 8), abs=1e-6)
    mixed = fit(records, Scheme.parse("rdnuq3.4")).layers[1]["key"]
    names = [f"{len(channels)} ch. of {width} bits" for width, channels in sorted(mixed.channels.items(), reverse=True)]
    rows = tick_rows(key_widths)
    assert list(rows) == names and [len(row) for row in rows.values()] == sorted(map(len, rows.values()), reverse=True)
    for place, kind in ((keys, "keys per channel"), (values, "values per token")):
        assert place.get_title(loc="left").startswith(f"{kind}, nuq3-1%: ")
        assert [line.get_xdata()[0] for line in place.lines] == [-1, 1]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (plot_key_ranges, ["--layer", "7"], "--layer 7: .* hold 0, 1"),
        (plot_key_ranges, ["--layer", "0", "--sink-tokens", "65"], "leaves nothing"),
        (plot_fisher, ["--sink-tokens", "65"], "leaves nothing"),
        (plot_levels, ["--layer", "0", "--schemes", "kivi2"], "kivi2: ranges of groups"),
        (plot_levels, ["--layer", "0", "--schemes", "turbo2"], "turbo2: ranges of groups"),
    ],
)
def test_bad_arguments_are_refused_and_write_nothing(
    command: Any, arguments: list[str], message: str, records, tmp_path
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=message):
        command.main(["--records", str(records.folder), *arguments, "--output", str(tmp_path / "none.png")])
    assert not (tmp_path / "none.png").exists()


# what all share


def test_missing_matplotlib_names_its_extra(monkeypatch, rows_file, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"plots need matplotlib.*\[plots\]"):
        plot_methods.main(["--results", str(rows_file(ROWS)), "--output", str(tmp_path / "none.png")])
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("plot", ["speed", "methods", "needle", "levels", "fisher", "key_ranges"])
def test_the_committed_pictures_are_not_overwritten_unasked(plot: str) -> None:
    default = figures.plot_parser(plot, None).get_default("output")
    assert default == Path(f"{plot}.png") and not default.is_absolute()
    committed = REPOSITORY / "scripts" / "results" / "plots" / default
    assert committed.exists() and committed.resolve() != default.resolve()
