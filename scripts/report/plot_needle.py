"""Heat map of a needle test: a panel for each scheme, depths over lengths, the better the darker.

    python -m scripts.report.plot_needle                       # from scripts/results/needle.jsonl
    python -m scripts.report.plot_needle --results rows.jsonl --output needle.png

Reads rows of `python -m scripts.retrieval.needle`, all of one model and haystack. Every cell shows the share of the needle's words
that greedy decoding found and, below it, the NLL of the true answer in nats per token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradients.cli import format_table, run_command
from scripts.report import figures
from scripts.report.retrieval_tables import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[1] / "results" / "needle.jsonl"
_EVALUATION = ("model", "text", "seed")  # cells may hold different numbers of needles
_FIELDS = ("scheme", "mode", "bits_per_element", "context", "depth", "samples", "found", "nll_per_token")
_COLUMNS = 3  # panels side by side
_WHITE_FROM = 0.7  # share found from which the ground is dark enough for white figures

Row = dict[str, Any]


def require_matplotlib() -> None:
    """Raise `UserError` when nothing can be drawn."""
    with figures.style():
        pass


def panels_of(rows: Sequence[Row]) -> dict[str, dict[tuple[int, float], Row]]:
    """Rows by scheme, length and depth, the scheme that stores most in its longest text first; of equal ones the last counts."""
    by_scheme: dict[str, dict[tuple[int, float], Row]] = {}
    for row in rows:
        name = brief(row["scheme"]) + (", packed" if row["mode"] == "packed" else "")
        by_scheme.setdefault(name, {})[row["context"], row["depth"]] = row
    stored = {name: min(row["bits_per_element"] for row in cells.values()) for name, cells in by_scheme.items()}
    return dict(sorted(by_scheme.items(), key=lambda panel: -stored[panel[0]]))


def draw(schemes: Mapping[str, Mapping[tuple[int, float], Row]]) -> "Figure":
    """All panels, with one bar of colours."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    places = {place for cells in schemes.values() for place in cells}
    lengths, depths = sorted({length for length, _ in places}), sorted({depth for _, depth in places})
    columns = min(_COLUMNS, len(schemes))
    lines = -(-len(schemes) // columns)
    size = (1.3 + columns * (0.7 + 0.72 * len(lengths)), lines * (0.9 + 0.42 * len(depths)))
    figure, axes = figures.panels(lines, columns, size, sharex=True, sharey=True)
    colours = LinearSegmentedColormap.from_list("found", ["#F1EEE9", figures.PALE_BLUE, figures.BLUE])
    flat = [place for line in axes for place in line]
    for place, (scheme, cells) in zip(flat, schemes.items(), strict=False):
        draw_panel(place, scheme, cells, lengths, depths, colours)
    for place in flat[len(schemes) :]:
        place.set_axis_off()
    for line in axes:
        line[0].set_ylabel("depth of the needle (%)")
    for place in flat[max(0, len(schemes) - columns) : len(schemes)]:  # the lowest of their columns
        place.set_xlabel("tokens")
        place.tick_params(labelbottom=True)
    bar = figure.colorbar(ScalarMappable(cmap=colours), ax=flat, shrink=0.8, pad=0.02, format="{x:.0%}")
    bar.set_label("words of the needle found")
    bar.outline.set_visible(False)
    rows = [row for cells in schemes.values() for row in cells.values()]
    counts = sorted({row["samples"] for row in rows})
    needles = f"{counts[0]} needle" if counts == [1] else f"{' or '.join(map(str, counts))} needles"
    title = f"{rows[0]['model']}, {needles} per cell; below, NLL of the answer per token"
    figure.suptitle(title, fontsize=9)
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr]
    return figure


def draw_panel(
    place: "Axes",
    scheme: str,
    cells: Mapping[tuple[int, float], Row],
    lengths: Sequence[int],
    depths: Sequence[float],
    colours: Any,
) -> None:
    """One scheme: a square for every cell that was measured."""
    bits = max(cells.items())[1]["bits_per_element"]
    place.set_title(f"{scheme}, {bits:.3g} bits")
    place.grid(False)
    for (length, depth), row in cells.items():
        x, y, found = lengths.index(length), depths.index(depth), row["found"]
        place.fill_between([x - 0.48, x + 0.48], y - 0.48, y + 0.48, color=colours(found), lw=0)
        ink = "white" if found > _WHITE_FROM else figures.INK
        place.text(x, y, f"{found:.0%}\n{row['nll_per_token']:.2f}", color=ink, ha="center", va="center", fontsize=8)
    place.set_xlim(-0.5, len(lengths) - 0.5)
    place.set_ylim(len(depths) - 0.5, -0.5)
    place.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    place.set_yticks(range(len(depths)), [f"{100 * depth:g}" for depth in depths])
    place.tick_params(length=0)
    place.spines[:].set_visible(False)


def draw_rows(rows: Sequence[Row], path: Path) -> None:
    """Write the heat map of these rows, all of one evaluation."""
    with figures.style():
        figures.save(draw(panels_of(rows)), path)


def main(argv: Sequence[str] | None = None) -> Row:
    """The command; returns its JSON summary."""
    parser = figures.plot_parser("needle", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the rows (scripts/results/needle.jsonl)")
    arguments = parser.parse_args(argv)
    rows = figures.rows_of_one(arguments.results, "scripts.retrieval.needle", _EVALUATION, _FIELDS)
    draw_rows(rows, arguments.output)
    shown = [
        {
            "scheme": scheme,
            "cells": len(cells),
            "found": sum(row["found"] for row in cells.values()) / len(cells),
            "nll_per_token": sum(row["nll_per_token"] for row in cells.values()) / len(cells),
        }
        for scheme, cells in panels_of(rows).items()
    ]
    print(format_table(shown))
    return {"output": str(arguments.output), "rows": len(rows), "schemes": len(shown)}


if __name__ == "__main__":
    run_command(main)
