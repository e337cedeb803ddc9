r"""Held-out error under the whole Fisher matrix of ways to feed errors back, relative to none; needs no model.

    python -m scripts.experiments.ablate_feedback --records records/ --layers 1 5 9 13 17 21 25 29 \
        --results scripts/results/feedback.jsonl

Quantizers are fitted to the first half of the calibration windows, and d^T F d is summed over the tokens of the second half
with F of the second half's gradients. Windows that hold moments only take part in "more windows of moments". Ideas are
chosen by this figure and only confirmed by perplexity.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradients.cli import UserError, command_parser, format_table, run_command
from gradients.models import KINDS
from gradients.progress import progress
from gradients.records import Records
from quant.artefact import axis_of
from quant.compensate import ElementQuantizer, fit_feedback, fitted_to_targets, steps
from quant.results import append_row, results_file
from quant.scheme import Scheme
from quant.side import Side, fit_side
from scripts.experiments.ablate_allocation import Halves, Place, read_halves

Moments = dict[Place, tuple[Tensor, Tensor, Tensor]]  # of the first half, of the second, of all but the second
Idea = Callable[[ElementQuantizer, Side, tuple[Tensor, Tensor, Tensor]], ElementQuantizer]


def read_moments(records: Records, places: Sequence[Place]) -> Moments:
    """E[g g^T] of each head, `[G, D, D]` float64."""
    windows, moments = records.manifest.windows, {}
    middle = windows // 2
    parts = range(middle), range(middle, windows), [*range(middle), *range(windows, records.manifest.moment_windows)]
    for place in progress(places, desc="reading moments"):
        each = [records.read_tensor(window, *place, "moment") for window in range(records.manifest.moment_windows)]
        first, second, all_but = (torch.stack([each[window] for window in part]).double().mean(0) for part in parts)
        moments[place] = (first, second, all_but)
    return moments


def fed_back(refit: bool = True, more: bool = False, natural: bool = False, damping: float = 0.03) -> Idea:
    """Feedback from the first half's moments, with a thing or two changed."""

    def fit(quantizer: ElementQuantizer, side: Side, moments: tuple[Tensor, Tensor, Tensor]) -> ElementQuantizer:
        moment = moments[2 if more else 0]
        heads, dim, _ = moment.shape
        order = torch.arange(dim).expand(heads, dim) if natural else None
        feedback, left = fit_feedback(moment, steps(quantizer, moment), "", damping, order)
        quantizer = replace(quantizer, feedback=feedback)
        return fitted_to_targets(quantizer, side, left) if refit else quantizer

    return fit


IDEAS: dict[str, Idea] = {
    "none": lambda quantizer, _side, _moments: quantizer,
    "feedback, levels and ranges as they were": fed_back(refit=False),
    "... and levels, dense keys' ranges too, fitted to the targets": fed_back(),
    "... and more windows of moments": fed_back(more=True),
    "channels in their natural order": fed_back(natural=True),
    "damping 0.003": fed_back(damping=0.003),
    "damping 0.3": fed_back(damping=0.3),
}


def held_out(quantizer: ElementQuantizer, side: Side, moment: Tensor) -> float:
    """Sum of d^T F d over tokens and heads."""
    total = 0.0
    for x, _ in side.chunks():
        error = (quantizer.decode(quantizer.encode(x)) - x).double().unflatten(-1, moment.shape[:2])
        total += float(torch.einsum("tgi,gij,tgj->", error, moment, error))
    return total


def errors(halves: Halves, moments: Moments, scheme: Scheme) -> dict[str, float]:
    """The held-out error of every idea, keys and values of all layers together."""
    totals = dict.fromkeys(IDEAS, 0.0)
    for place, (first, second) in progress(list(halves.items()), desc=str(scheme)):
        plain = fit_side(first, scheme, axis_of(scheme, place[1]) == "channel")
        assert isinstance(plain, ElementQuantizer)
        for name, idea in IDEAS.items():
            totals[name] += held_out(idea(plain, first, moments[place]), second, moments[place][1])
    return totals


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.experiments.ablate_feedback", __doc__)
    parser.add_argument("--records", required=True, help="folder written by `python -m gradients`")
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    parser.add_argument("--schemes", nargs="+", default=["nuq2-1%", "nuq2", "nuq3-1%", "nuq3", "nuq4"])
    parser.add_argument("--results", type=results_file, help="append the rows to this JSONL file")
    arguments = parser.parse_args(argv)

    records = Records.open(arguments.records)
    manifest = records.manifest
    if manifest.moment_windows <= manifest.windows or manifest.windows < 2:
        raise UserError(
            f"records {arguments.records!r} hold {manifest.windows} windows, {manifest.moment_windows} of moments; record at "
            "least 2, and --moment-windows beyond them"
        )
    halves = read_halves(records, records.chosen_layers(arguments.layers))
    moments = read_moments(records, [(layer, kind) for layer, _ in list(halves)[::2] for kind in KINDS])
    rows = []
    for name in arguments.schemes:
        found = errors(halves, moments, Scheme.parse(name))
        rows += [{"scheme": name, "idea": idea, "error_ratio": error / found["none"]} for idea, error in found.items()]
    for row in rows:
        append_row(arguments.results, {**row, "model": Path(manifest.model).name, "layers": len(halves) // 2})
    print(format_table(rows))
    return {"rows": len(rows), "results": str(arguments.results)}


if __name__ == "__main__":
    run_command(main)
