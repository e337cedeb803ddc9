"""Time our codebook fit against scikit-learn's k-means, and compare how well the codebooks fit.

    python -m scripts.bench.fit --records records/
    python -m scripts.bench.fit --records records/ --scheme nuq2-1% --layers 0 15 29 --results scripts/results/fit.jsonl

For the keys and the values of every layer, in one process, on the same records, three things are timed:

    fit      `quant.fit.fit_side`, all of it: quantiles of every channel or ranges of every token, normalisation,
             selection of outliers, Fisher weights, histogram, dynamic programming
    search   its last two steps alone, from normalised inliers and their weights to levels: what k-means does
    sklearn  `KMeans(n_clusters=L, n_init="auto", max_iter=50, random_state=0).fit`, with sample weights, on the
             same normalised inliers and weights, float32 as they are; their preparation is not counted

Reading the records is in none of them. The error is the weighted squared error over all inliers, in float64 and
with every point at its own place; the histogram that our search looks at does not enter.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from gradients.cli import UserError, command_parser, format_table, run_command
from gradients.models import KINDS
from gradients.progress import progress
from gradients.records import Records
from quant.artefact import axis_of
from quant.codebook import nuq_codebook
from quant.kmeans import Histogram, weighted_error
from quant.quantizer import FedBack, normalise
from quant.results import append_row, results_file
from quant.scheme import Scheme
from quant.side import Side, fit_side, kmeans_weights

Points = NDArray[np.float32]
Result = TypeVar("Result")


def compare(side: Side, scheme: Scheme, per_channel: bool) -> dict[str, float]:
    """Fit one layer's keys or values both ways: seconds, and our weighted squared error in units of scikit-learn's."""

    def search() -> None:
        histogram = Histogram.empty(-1, 1)
        histogram.add(points, weights)
        nuq_codebook(histogram, scheme.levels)

    def sklearn() -> Points:
        kmeans = KMeans(n_clusters=scheme.levels, n_init="auto", max_iter=50, random_state=0)
        return kmeans.fit(points[:, None], sample_weight=weights).cluster_centers_[:, 0]

    quantizer, fit_seconds = timed(lambda: fit_side(side, scheme, per_channel))
    assert isinstance(quantizer, FedBack)
    points, weights = inliers(side, quantizer)
    _, search_seconds = timed(search)
    centres, sklearn_seconds = timed(sklearn)
    ours, theirs = (
        weighted_error(points.astype(np.float64), weights.astype(np.float64), np.sort(levels.astype(np.float64)))
        for levels in (quantizer.codebook.levels.numpy(), centres)
    )
    seconds = {"fit": fit_seconds, "search": search_seconds, "sklearn": sklearn_seconds}
    return {"points": len(points), **seconds, "error": ours / theirs}


def timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """What `work` returns, and the seconds it took."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def inliers(side: Side, quantizer: FedBack) -> tuple[Points, Points]:
    """(points, weights), each `[n]`: the normalised elements that `quantizer` has to code, and what their errors cost."""
    x = side.activation.float()
    encoded = quantizer.encode(x)
    scale, zero = quantizer.ranges(encoded)
    coded = torch.ones_like(x, dtype=torch.bool) if encoded.outliers is None else ~encoded.outliers
    # a range rounded to fp16 may end just short of its extreme elements
    points = normalise(x, scale, zero).clamp(-1, 1)
    weights = kmeans_weights(quantizer.scheme, side.fisher.float(), scale)
    return points[coded].numpy(), weights[coded].numpy()


def summarise(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Totals over layers, keys and values."""
    fit, search, sklearn = (sum(row[name] for row in rows) for name in ("fit", "search", "sklearn"))
    errors = [row["error"] for row in rows]
    return {
        "layer_sides": len(rows),
        "inliers": sum(row["points"] for row in rows),
        "fit_seconds": round(fit, 3),
        "search_seconds": round(search, 3),
        "sklearn_seconds": round(sklearn, 3),
        "sklearn_over_fit": round(sklearn / fit, 2),
        "sklearn_over_search": round(sklearn / search, 2),
        "larger_error_than_sklearn": sum(error > 1 for error in errors),
        "worst_error_ratio": max(errors),
        "median_error_ratio": float(np.median(errors)),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.bench.fit", __doc__)
    parser.add_argument("--records", required=True, help="folder written by `python -m gradients`")
    parser.add_argument("--scheme", default="nuq3-1%", help="nuqBITS[-P%%]")
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    parser.add_argument("--results", type=results_file, help="append the summary as a row to this JSONL file")
    arguments = parser.parse_args(argv)
    scheme = Scheme.parse(arguments.scheme)
    if scheme.datatype != "nuq":
        raise UserError(f"--scheme {arguments.scheme} fits no codebook; give a nuq scheme, such as nuq3-1%")
    records = Records.open(arguments.records)
    rows = []
    sides = [(layer, kind) for layer in records.chosen_layers(arguments.layers) for kind in KINDS]
    # the first is for threads, caches and imports of both ways, and does not count
    for layer, kind in progress([sides[0], *sides], desc=f"fitting {scheme} twice"):
        side = Side(*records.read_layer(layer, kind, skip_tokens=scheme.sink_tokens))
        rows.append({"layer": layer, "kind": kind, **compare(side, scheme, axis_of(scheme, kind) == "channel")})
    print(format_table(rows[1:]))
    result = {"benchmark": "fit", "scheme": scheme.describe(), **summarise(rows[1:])}
    manifest = records.manifest
    identity = {"model": Path(manifest.model).name, "text": Path(manifest.text).name, "seqlen": manifest.seqlen}
    identity |= {"windows": manifest.windows, "records": manifest.digest}
    append_row(arguments.results, {**result, **identity}, packages=("torch", "numpy", "scikit-learn"))
    return result


if __name__ == "__main__":
    run_command(main)
