"""What every method loses against what it stores: a line for each method, a point for each of its widths.

    python -m scripts.report.plot_methods                       # from scripts/results/schemes.jsonl
    python -m scripts.report.plot_methods --results rows.jsonl --output methods.png

Reads rows of `python -m scripts.sweep_schemes`, all of one evaluation. The loss is the increase of the mean next-token
NLL; bits are those counted, with scales, outliers, sink tokens and exact recent tokens.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradients.cli import UserError, format_table, run_command
from scripts.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[1] / "results" / "schemes.jsonl"
OURS = "rdnuq+fb"
_NAME = re.compile(r"(?P<name>[a-z]+)\d+(?:\.\d+)?(?P<rest>.*)")
_EVALUATION = ("model", "text", "seqlen", "tokens")
_LABEL_GAP = 0.042  # of the axis' height: a line of text
_COLUMN = 1.9  # bits, where the column of labels ends; lines that begin beyond _NEAR are labelled where they begin
_NEAR = 3.6

Look = tuple[str, str, str, str]  # label, colour, marker, line
LOOKS: dict[str, Look] = {
    OURS: ("rdnuq+fb (ours)", figures.VERMILLION, "o", "-"),
    "rdnuq": ("rdnuq (ours)", figures.VERMILLION, "o", "--"),
    "rdnuqg1-4%+fb": ("rdnuq+fb, channels", figures.VERMILLION, "o", ":"),
    "rdnuqg1-4%": ("rdnuq, channels", figures.VERMILLION, "o", ":"),
    "nuq-1%+fb": ("nuq-1%+fb (ours)", figures.INK, "s", "-"),
    "nuq+fb": ("nuq+fb (ours)", figures.INK, "s", "--"),
    "nuq-1%": ("nuq-1% (KVQuant)", figures.BLUE, "s", "-"),
    "nuq": ("nuq", figures.BLUE, "s", "--"),
    "nf-1%": ("nf-1%", figures.SKY, "D", "-"),
    "int-1%": ("int-1%", figures.SKY, "v", "--"),
    "nf-1%+fb": ("nf-1%+fb", figures.SKY, "D", ":"),
    "int-1%+fb": ("int-1%+fb", figures.SKY, "v", ":"),
    "kivi": ("KIVI", figures.GREEN, "^", "-"),
    "kivi residual_tokens=0": ("KIVI without window", figures.GREEN, "^", "--"),
    "atom": ("Atom", figures.ORANGE, "P", "-"),
    "flexgen": ("FlexGen", figures.ORANGE, "X", "--"),
    "turbo": ("TurboQuant", figures.PURPLE, "p", "-"),
    "datafree": ("datafree", figures.GREY, "h", "--"),
}


class Point(NamedTuple):
    """One row: stored bits per element, NLL increase in nats per token."""

    bits: float
    increase: float
    scheme: str


def method_of(scheme: str) -> str:
    """The scheme's name without its bits: `nuq-1%` of `nuq3-1%`, `kivi residual_tokens=0` of `kivi2 residual_tokens=0`."""
    match = _NAME.fullmatch(scheme)
    if match is None:
        raise UserError(f"row of scheme {scheme!r}: not a name and its bits; remove the row")
    return match["name"] + match["rest"]


def read_methods(path: Path) -> tuple[dict[str, list[Point]], dict[str, Any]]:
    """(every method's points by bits, one row). Raises `UserError` as `rows_of_one` does."""
    fields = ("scheme", "bits_per_element", "nll", "baseline_nll")
    rows = figures.rows_of_one(path, "scripts.sweep_schemes", _EVALUATION, fields)
    methods: dict[str, list[Point]] = {}
    for row in rows:
        point = Point(row["bits_per_element"], row["nll"] - row["baseline_nll"], row["scheme"])
        methods.setdefault(method_of(point.scheme), []).append(point)
    return {method: sorted(points) for method, points in methods.items()}, rows[0]


def draw(methods: Mapping[str, Sequence[Point]], evaluation: Mapping[str, Any]) -> "Figure":
    """All methods on a logarithmic axis; points that lose nothing lie below it, and arrows lead there."""
    figure, [[place]] = figures.panels(1, 1, (9.5, 5.8))
    lossy: dict[str, Sequence[Point]] = {}
    for method, points in methods.items():
        if drawable := [point for point in points if point.increase > 0]:
            lossy[method] = drawable
    for method, points in lossy.items():
        draw_method(place, method, points)
    place.set_yscale("log")
    place.set_ylim(place.get_ylim())  # the labels are placed on it
    place.yaxis.set_major_formatter("{x:g}")
    most = math.ceil(max(point.bits for points in methods.values() for point in points))
    place.set_xlim(0.6, most)
    place.set_xticks(range(2, most + 1))
    place.set_xlabel("bits stored per element")
    place.set_ylabel("increase of the NLL (nats per token)")
    what = "{model}, {text}, windows of {seqlen} tokens; NLL {baseline_nll:.3f} unquantized"
    place.set_title(what.format_map(evaluation))
    label_lines(place, lossy)
    for method, points in methods.items():
        for point in set(points).difference(lossy.get(method, [])):
            draw_lossless(place, method, point)
    return figure


def look_of(method: str) -> Look:
    """The listed look of a method; any other is grey and goes by its name."""
    return LOOKS.get(method, (method, figures.GREY, ".", "-"))


def draw_method(place: "Axes", method: str, points: Sequence[Point]) -> None:
    """One method's line; ours stands out."""
    label, colour, marker, line = look_of(method)
    width, size, order = (3.2, 8, 5) if method == OURS else (1.5, 6.5, 3)
    bits, increases, _ = zip(*points, strict=True)
    (drawn,) = place.plot(bits, increases, color=colour, ls=line, lw=width, zorder=order, label=label)
    drawn.set(marker=marker, markersize=size, markeredgecolor="white", markeredgewidth=0.6)


def draw_lossless(place: "Axes", method: str, point: Point) -> None:
    """An arrow that points out of the axis below."""
    colour = look_of(method)[1]
    where: dict[str, Any] = {"xycoords": place.get_xaxis_transform(), "textcoords": "offset points", "ha": "center"}
    text = f"{point.scheme}: {point.increase:+.4f}"
    place.annotate(
        text, (point.bits, 0), (0, 24), color=colour, arrowprops={"arrowstyle": "->", "color": colour}, **where
    )


def label_lines(place: "Axes", methods: Mapping[str, Sequence[Point]]) -> None:
    """Labels in a column to the left, joined to where the lines begin; lines that begin far away have theirs there."""
    to_axis = (place.transData + place.transAxes.inverted()).transform
    column = {method: points[0] for method, points in methods.items() if points[0].bits < _NEAR}
    wanted = [float(to_axis((point.bits, point.increase))[1]) for point in column.values()]
    heights = dict(zip(column, figures.spread_out(wanted, _LABEL_GAP), strict=True))
    for method, points in methods.items():
        label, colour, *_ = look_of(method)
        leader = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 3, "relpos": (1, 0.5)}
        where: dict[str, Any] = {"xytext": (6, 8), "textcoords": "offset points", "va": "bottom"}
        if method in heights:
            at = {"xytext": (_COLUMN, heights[method]), "textcoords": place.get_xaxis_transform()}
            where = {**at, "va": "center", "ha": "right", "arrowprops": leader}
        weight = "bold" if method == OURS else "normal"
        place.annotate(label, points[0][:2], color=colour, weight=weight, **where)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = figures.plot_parser("methods", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the rows (scripts/results/schemes.jsonl)")
    arguments = parser.parse_args(argv)
    with figures.style():
        methods, evaluation = read_methods(arguments.results)
        figures.save(draw(methods, evaluation), arguments.output)
    rows = [{"method": method, **point._asdict()} for method, points in methods.items() for point in points]
    print(format_table(rows))
    return {"output": str(arguments.output), "methods": len(methods), "rows": len(rows)}


if __name__ == "__main__":
    run_command(main)
