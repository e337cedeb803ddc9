"""Microseconds of a decode step's attention against context, from packed caches and from fp16, with what memory allows.

    python -m scripts.report.plot_speed                       # from scripts/results/gpu-benchmark.jsonl
    python -m scripts.report.plot_speed --results results/h200/benchmark.jsonl --batch 8 --output speed.png

Reads rows of `python -m deployment.benchmark`: a panel for each shape, a line for fp16 (the fastest of the ways that
were tried) and for each scheme. The dotted line of the same colour is the bandwidth limit, the bytes stored over the
rate of a large copy on the same device in the same run. Both axes are logarithmic. Rows of the device that was
measured last; of equal ones the last counts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gradients.cli import UserError, format_table, positive_int, run_command
from scripts.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu-benchmark.jsonl"
FP16 = "fp16"
LOOKS = {
    FP16: (figures.INK, "o"),
    "nuq4": (figures.BLUE, "s"),
    "nuq3": (figures.GREEN, "D"),
    "nuq2": (figures.ORANGE, "v"),
    "nuq4-1%": (figures.PURPLE, "P"),
    "nuq2-1%": (figures.VERMILLION, "^"),
}
_FIELDS = ("device", "path", "shape", "scheme", "batch", "context", "copy_gb_per_s", "ops")
_OTHERS = ((figures.SKY, "X"), (figures.GREY, "*"))

Row = dict[str, Any]


class Point(NamedTuple):
    """One measured step."""

    context: int
    us: float
    limit: float  # microseconds that the bytes stored take at the rate of a copy


def read_lines(rows: Sequence[Row], batch: int) -> dict[str, dict[str, list[Point]]]:
    """Points by shape and by scheme (fp16 first), in order of contexts; single ones only if there are no lines. Raises `UserError` without any."""
    cells: dict[tuple[str, str, int], Point] = {}
    for row in rows:
        steps = [op for op in row["ops"] if op["op"] == "decode"]
        if (row["batch"], row["device"], row["path"]) != (batch, rows[-1]["device"], "triton") or not steps:
            continue
        shape, context, tokens = row["shape"], row["context"], row["context"] * batch
        rate = row["copy_gb_per_s"] * 1e3  # bytes per microsecond
        point = Point(context, steps[-1]["us"], row["bytes_per_token"] * tokens / rate)
        stock = Point(context, steps[-1]["fp16_us"], row["fp16_bytes_per_token"] * tokens / rate)
        cells[shape, row["scheme"], context] = point
        # measured beside every scheme; the quickest counts
        cells[shape, FP16, context] = min(stock, cells.get((shape, FP16, context), stock), key=lambda each: each.us)
    if not cells:
        raise UserError(
            f"no row holds decode steps of the kernels for batch {batch}; run deployment.benchmark with --results"
        )
    lines: dict[str, dict[str, list[Point]]] = {}
    for (shape, scheme, _), point in sorted(
        cells.items(), key=lambda cell: (cell[0][0], _order(cell[0][1]), cell[0][2])
    ):
        lines.setdefault(shape, {}).setdefault(scheme, []).append(point)
    longer = {shape: {scheme: each for scheme, each in of.items() if len(each) > 1} for shape, of in lines.items()}
    return {shape: of for shape, of in longer.items() if of} or lines


def _order(scheme: str) -> tuple[int, str]:
    return (list(LOOKS).index(scheme) if scheme in LOOKS else len(LOOKS)), scheme


def draw(shapes: Mapping[str, Mapping[str, Sequence[Point]]], title: str) -> "Figure":
    """All panels, side by side."""
    figure, [places] = figures.panels(1, len(shapes), (0.6 + 4.7 * len(shapes), 4.6), sharey=True)
    for place, (shape, lines) in zip(places, shapes.items(), strict=True):
        draw_shape(place, lines)
        place.set_title(f"{shape}, {title}" if place is places[0] else shape)
    places[0].set_ylabel("attention of one layer and token, µs")
    return figure


def draw_shape(place: "Axes", lines: Mapping[str, Sequence[Point]]) -> None:
    """Measured lines and their limits."""
    others = [scheme for scheme in lines if scheme not in LOOKS]
    for scheme, points in lines.items():
        colour, marker = LOOKS[scheme] if scheme in LOOKS else _OTHERS[others.index(scheme) % len(_OTHERS)]
        contexts, times, limits = zip(*points, strict=True)
        (drawn,) = place.plot(contexts, times, color=colour, lw=1.8, zorder=3, label=scheme)
        drawn.set(marker=marker, markersize=6, markeredgecolor="white", markeredgewidth=0.6)
        place.plot(contexts, limits, color=colour, lw=1.2, ls=":", zorder=2)
    place.plot([], [], color=figures.GREY, lw=1.2, ls=":", label="its bytes at copy bandwidth")
    place.set_xscale("log", base=2)
    place.set_yscale("log")
    place.yaxis.set_major_formatter("{x:g}")
    contexts = sorted({point.context for points in lines.values() for point in points})
    place.set_xticks(contexts, [_short(context) for context in contexts])
    place.set_xticks([], minor=True)
    place.set_xlabel("tokens in the cache")
    place.legend(loc="upper left", labelspacing=0.3)


def _short(tokens: int) -> str:
    for size, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % size == 0:
            return f"{tokens // size}{letter}"
    return str(tokens)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = figures.plot_parser("speed", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the rows (scripts/results/gpu-benchmark.jsonl)")
    parser.add_argument("--batch", type=positive_int, default=1, help="rows of this batch size (1)")
    arguments = parser.parse_args(argv)
    rows = figures.rows_of_one(arguments.results, "deployment.benchmark", (), _FIELDS)
    shapes = read_lines(rows, arguments.batch)
    sequences = "one sequence" if arguments.batch == 1 else f"{arguments.batch} sequences"
    with figures.style():
        figures.save(draw(shapes, f"{rows[-1]['device'].removeprefix('NVIDIA ')}, {sequences}"), arguments.output)
    points = [
        {"shape": shape, "cache": scheme, **point._asdict()}
        for shape, lines in shapes.items()
        for scheme, line in lines.items()
        for point in line
    ]
    print(format_table(points))
    return {"output": str(arguments.output), "shapes": list(shapes), "points": len(points)}


if __name__ == "__main__":
    run_command(main)
