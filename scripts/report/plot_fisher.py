"""Fisher information of keys and values by layer, and how widely it differs between the channels of one.

    python -m scripts.report.plot_fisher --records records/

What rdnuq lives on: were the lines level and the bands narrow, equal bits for all channels would be right.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradients.cli import UserError, format_table, run_command
from gradients.models import KINDS, Kind
from gradients.progress import progress
from gradients.records import Records
from scripts.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPREAD = (0.1, 0.9)  # quantiles over the channels that the band shows

Spectrum = dict[Kind, NDArray[np.float64]]  # [layers, C] mean over the tokens


def read_fisher(records: Records, sink_tokens: int) -> Spectrum:
    """The mean Fisher information of every channel of every layer. Raises `UserError` for unusable records."""
    if sink_tokens >= records.manifest.seqlen:
        raise UserError(f"--sink-tokens {sink_tokens} leaves nothing of windows of {records.manifest.seqlen} tokens")
    means: dict[Kind, list[NDArray[np.float64]]] = {kind: [] for kind in KINDS}
    for layer in progress(records.manifest.fingerprint.cached_layers, desc="reading", unit="layer"):
        for kind in KINDS:
            _, fisher = records.read_layer(layer, kind, skip_tokens=sink_tokens)
            means[kind].append(fisher.double().mean(0).numpy())
    return {kind: np.array(rows) for kind, rows in means.items()}


def draw(spectrum: Spectrum, layers: Sequence[int], title: str) -> "Figure":
    """A line for the keys' mean over channels and one for the values', each in its band."""
    figure, [[place]] = figures.panels(1, 1, (7, 4))
    for kind, channels in spectrum.items():
        low, high = np.quantile(channels, SPREAD, axis=1)
        colour, marker = figures.KIND_COLOURS[kind], "o" if kind == "key" else "s"
        place.fill_between(layers, low, high, color=colour, alpha=0.15, lw=0)
        place.plot(layers, channels.mean(1), color=colour, marker=marker, ms=4, lw=1.8, label=f"{kind}s")
    place.set_yscale("log")
    place.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    place.set_xlabel("layer")
    place.set_ylabel("Fisher information (mean squared gradient)")
    least, most = (f"{quantile * 100:g} %" for quantile in SPREAD)
    place.set_title(f"{title}: mean over channels, and the band of {least} to {most} of them")
    place.legend()
    return figure


def summary(spectrum: Spectrum) -> list[dict[str, Any]]:
    """What can be read off: how far the layers' means lie apart, and how far the channels within a layer."""
    rows = []
    for kind, channels in spectrum.items():
        means = channels.mean(1)
        low, high = np.quantile(channels, SPREAD, axis=1)
        rows.append(
            {
                "kind": kind,
                "least_mean": float(means.min()),
                "greatest_mean": float(means.max()),
                "median_spread": float(np.median(high / np.maximum(low, np.finfo(float).tiny))),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = figures.plot_parser("fisher", __doc__)
    figures.add_records_arguments(parser, layer=False)
    arguments = parser.parse_args(argv)
    with figures.style():
        records = Records.open(arguments.records)
        spectrum = read_fisher(records, arguments.sink_tokens)
        figure = draw(spectrum, records.manifest.fingerprint.cached_layers, figures.model_name(records))
        figures.save(figure, arguments.output)
    rows = summary(spectrum)
    print(format_table(rows))
    return {"output": str(arguments.output), "rows": rows}


if __name__ == "__main__":
    run_command(main)
