"""Where a layer's normalised keys and values lie, where their errors count, and which levels schemes choose there.

    python -m scripts.report.plot_levels --records records/ --layer 11 --schemes nuq3-1% rdnuq3.4

Grey: all elements alike. Coloured: weighted as the k-means behind nuq weights them (KVQuant, Eq. 7). Beyond the
thresholds elements are kept exactly. Rows of ticks: the scheme's levels; for nuq those of int and nf, to compare.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradients.cli import UserError, format_table, run_command
from gradients.models import KINDS, Kind
from gradients.records import Records
from quant.artefact import axis_of
from quant.codebook import int_codebook, nf_codebook
from quant.fit import fit
from quant.mixed import MixedQuantizer
from quant.quantizer import FedBack, Quantizer, normalise
from quant.scheme import Scheme
from quant.side import Side, fit_side, kmeans_weights, read_side
from scripts.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Levels = dict[str, Tensor]

REACH = 1.4  # of the axis; the elements beyond it are counted but not shown
EDGES: Floats = np.linspace(-REACH, REACH, 57).round(6)  # of the bins; -1 and 1 are among them
_BELOW_ONE = 1 - 1e-6


@dataclass(frozen=True)
class Panel:
    """One scheme's view of a layer's keys or values.

    `plain` and `weighted` are densities `[bins]`, `outliers` the share of elements kept exactly, `fitted` and `others`
    levels by the name of their row.
    """

    title: str
    kind: Kind
    plain: Floats
    weighted: Floats
    outliers: float
    fitted: Levels
    others: Levels


def read_panels(records: Records, layer: int, scheme: Scheme) -> list[Panel]:
    """Keys and values of a layer. Raises `UserError` for a scheme that has no range per channel or token."""
    if not {scheme.form(axis_of(scheme, kind)) for kind in KINDS} <= {"static", "token", "allocated"}:
        raise UserError(f"--schemes {scheme.describe()}: ranges of groups or rotated heads; give nuq, nf, int or rdnuq")
    # rdnuq divides its bits among all layers, so that all are fitted
    fitted: Mapping[Kind, Quantizer] = fit(records, scheme).layers[layer] if scheme.allocated else {}
    found = []
    for kind in KINDS:
        side, axis = read_side(records, scheme, layer, kind), "channel" if scheme.allocated else axis_of(scheme, kind)
        quantizer = fitted[kind] if fitted else fit_side(side, scheme, axis == "channel")
        assert isinstance(quantizer, FedBack)
        title, others = f"{kind}s per {axis}, {scheme.describe()}", levels_to_compare(scheme)
        found.append(Panel(title, kind, *measure(side, quantizer), fitted_levels(quantizer), others))
    return found


def measure(side: Side, quantizer: FedBack) -> tuple[Floats, Floats, float]:
    """(density, weighted density, share of outliers) of normalised elements."""
    sums, totals, outliers = np.zeros((2, len(EDGES) - 1)), np.zeros(2), 0
    for activation, fisher in side.chunks():
        encoded = quantizer.encode(activation)
        scale, zero = quantizer.ranges(encoded)
        x = normalise(activation, scale, zero)
        inliers = x.clamp(-1, _BELOW_ONE)  # an fp16 scale may leave them a rounding error beyond
        x = inliers if encoded.outliers is None else x.where(encoded.outliers, inliers)
        for index, weights in enumerate((torch.ones_like(x), kmeans_weights(quantizer.scheme, fisher, scale))):
            sums[index] += np.histogram(x.numpy(), EDGES, weights=weights.double().numpy())[0]
            totals[index] += weights.sum(dtype=torch.float64).item()
        outliers += encoded.outlier_count
    plain, weighted = sums / np.maximum(totals, np.finfo(float).tiny)[:, None] / np.diff(EDGES)
    return plain, weighted, float(outliers / totals[0])


def fitted_levels(quantizer: Quantizer) -> Levels:
    """The levels of every codebook."""
    if not isinstance(quantizer, MixedQuantizer):
        return {str(quantizer.scheme): quantizer.tables["levels"]}
    books, channels = sorted(quantizer.codebooks.items(), reverse=True), quantizer.channels
    return {f"{len(channels[width])} ch. of {width} bits": book.levels for width, book in books}


def levels_to_compare(scheme: Scheme) -> Levels:
    """Beside nuq, what int and nf have at as many bits."""
    if scheme.datatype != "nuq":
        return {}
    codebooks = {"int": int_codebook(scheme.levels), "nf": nf_codebook(scheme.levels)}
    return {f"{name}{scheme.bits:g}": codebook.levels for name, codebook in codebooks.items()}


def draw(rows: Sequence[Sequence[Panel]], title: str) -> "Figure":
    """A row for each scheme, keys on the left and values on the right; under each panel its levels."""
    lines = [max(len(panel.fitted) + len(panel.others) for panel in row) for row in rows]
    heights = [height for count in lines for height in (2.4, 0.1 + 0.23 * count)]
    figure, axes = figures.panels(len(heights), 2, (10, sum(heights) + 1.5), sharex=True, height_ratios=heights)
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            draw_density(axes[2 * number][column], panel)
            draw_levels(axes[2 * number + 1][column], panel, lines[number])
    for place in axes[-1]:
        place.set_xlabel("normalised value")
        place.set_xlim(-REACH, REACH)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure


def draw_density(place: "Axes", panel: Panel) -> None:
    """Both densities between and beyond the thresholds."""
    place.stairs(panel.plain, EDGES, fill=True, color=figures.PALE, label="elements")
    colour = figures.KIND_COLOURS[panel.kind]
    place.stairs(panel.weighted, EDGES, color=colour, lw=1.5, label="weighted by Fisher information")
    draw_thresholds(place, label="thresholds: beyond, kept exactly")
    place.set_title(f"{panel.title}: {panel.outliers * 100:.1f} % kept exactly")
    place.set_ylabel("density")
    place.tick_params(axis="x", length=0)


def draw_levels(place: "Axes", panel: Panel, lines: int) -> None:
    """A row of ticks for each codebook, on an axis with room for `lines` lines."""
    rows = {**panel.fitted, **panel.others}
    for row, (name, levels) in enumerate(rows.items()):
        colour = figures.KIND_COLOURS[panel.kind] if name in panel.fitted else figures.GREY
        (ticks,) = place.plot(levels.numpy(), np.full(len(levels), row), color=colour, ls="", label=name)
        ticks.set(marker="|", markersize=10, markeredgewidth=1.5)
    draw_thresholds(place)
    place.set_yticks(range(len(rows)), list(rows))
    place.set_ylim(lines - 0.4, -0.6)
    place.tick_params(axis="y", length=0)
    place.spines["left"].set_visible(False)


def draw_thresholds(place: "Axes", label: str | None = None) -> None:
    """Dashed lines at the ends of the range."""
    for end, name in ((-1, None), (1, label)):
        place.axvline(end, color=figures.INK, lw=0.9, ls=(0, (4, 3)), zorder=1.5, label=name)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = figures.plot_parser("levels", __doc__)
    figures.add_records_arguments(parser)
    parser.add_argument("--schemes", nargs="+", required=True, help="such as nuq3-1%% rdnuq3.4")
    arguments = parser.parse_args(argv)
    with figures.style():
        schemes = [Scheme.parse(name, sink_tokens=arguments.sink_tokens) for name in arguments.schemes]
        records = figures.open_layer(arguments)
        rows = [read_panels(records, arguments.layer, scheme) for scheme in schemes]
        figures.save(draw(rows, f"{figures.model_name(records)}, layer {arguments.layer}"), arguments.output)
    shown = [{"panel": p.title, "outliers": p.outliers, "codebooks": len(p.fitted)} for row in rows for p in row]
    print(format_table(shown))
    return {"output": str(arguments.output), "layer": arguments.layer, "rows": shown}


if __name__ == "__main__":
    run_command(main)
