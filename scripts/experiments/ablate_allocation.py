r"""Held-out Fisher-weighted error of ways to spend the same bits, relative to the paper's scheme; needs no model.

    python -m scripts.experiments.ablate_allocation --records records/ --layers 1 5 9 13 17 21 25 29 \
        --results scripts/results/allocation.jsonl

Quantizers are fitted to the first half of the calibration windows, errors are summed over the second half: keys and
values of all chosen layers together. Ideas are chosen by this figure and only confirmed by perplexity.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from gradients.models import KINDS, Kind
from gradients.progress import progress
from gradients.records import Records
from quant.allocate import ChannelHistograms, Options, allocate, bind, price
from quant.artefact import axis_of
from quant.quantizer import Quantizer, code_bits
from quant.results import append_row, results_file
from quant.scheme import Scheme
from quant.side import Side, fit_side
from quant.storage import OUTLIER_BITS, TOKEN_SCALE_BITS

Place = tuple[int, Kind]
Fitted = dict[Place, Quantizer]
Halves = dict[Place, tuple[Side, Side]]


def read_halves(records: Records, layers: Sequence[int]) -> Halves:
    """Every chosen layer's keys and values: the first half of the windows, and the second, without the first token."""
    middle = records.manifest.windows // 2
    read: Halves = {}
    for place in progress([(layer, kind) for layer in layers for kind in KINDS], desc="reading"):
        windows = [records.read(window, *place) for window in range(records.manifest.windows)]
        parts = (windows[:middle], windows[middle:])
        first, second = (Side(*(torch.cat([w[i][1:] for w in part]) for i in range(2))) for part in parts)
        read[place] = (first, second)
    return read


def uniform(halves: Halves, scheme: Scheme) -> Fitted:
    """The paper's recipe, or another of its axes."""
    return {
        place: fit_side(first, scheme, axis_of(scheme, place[1]) == "channel") for place, (first, _) in halves.items()
    }


def allocated(histograms: dict[Place, ChannelHistograms], budget: float, per_channel: bool) -> Fitted:
    """Allocation of `budget` bits, to channels or to whole layers' keys and values."""
    scheme = Scheme.parse(f"rdnuq{budget:g}g1-4%")
    options = [price(one, scheme) for one in histograms.values()]
    if not per_channel:
        options = [Options(o.error.sum(-1, keepdims=True), o.bits.mean(-1, keepdims=True)) for o in options]
    chosen = allocate(options, budget)
    fitted: Fitted = {}
    for (place, one), choice in zip(histograms.items(), chosen, strict=True):
        fitted[place] = bind(one, np.broadcast_to(choice, (len(one.low),)).copy(), scheme)
    return fitted


def held_out(halves: Halves, fitted: Fitted) -> tuple[float, float]:
    """(Fisher-weighted squared error, bits per element without list ends and padding) on the second halves."""
    error = bits = elements = 0.0
    for place, quantizer in fitted.items():
        for x, fisher in halves[place][1].chunks():
            encoded = quantizer.encode(x)
            error += float(((quantizer.decode(encoded) - x).square() * fisher).sum())
            scales = 0 if encoded.scale is None else TOKEN_SCALE_BITS
            bits += len(x) * (code_bits(quantizer, x.shape[1]) + scales) + OUTLIER_BITS * encoded.outlier_count
            elements += x.numel()
    return error, bits / elements


def ideas(halves: Halves, bits: int) -> Iterator[tuple[str, Callable[[float], Fitted]]]:
    """(name, fit at a budget) of everything compared; the first is the paper's scheme, which sets the budget."""
    histograms = {place: ChannelHistograms.of(first.activation, first.fisher) for place, (first, _) in halves.items()}
    name = f"nuq{bits}-1%"
    yield "paper (nuq, 1 %)", lambda _: uniform(halves, Scheme.parse(name))
    yield "fisher without s^2", lambda _: uniform(halves, Scheme.parse(name, weights="fisher"))
    yield "values per channel, static", lambda _: uniform(halves, Scheme.parse(name, value_axis="channel"))
    yield "allocated to layers", lambda budget: allocated(histograms, budget, per_channel=False)
    yield "allocated to channels", lambda budget: allocated(histograms, budget, per_channel=True)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.experiments.ablate_allocation", __doc__)
    parser.add_argument("--records", required=True, help="folder written by `python -m gradients`")
    parser.add_argument("--layers", type=int, nargs="+", help="default: all")
    parser.add_argument("--bits", type=positive_int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--results", type=results_file, help="append the rows to this JSONL file")
    arguments = parser.parse_args(argv)

    records = Records.open(arguments.records)
    if records.manifest.windows < 2:
        raise UserError(f"records {arguments.records!r} hold 1 window; record at least 2, for a fit and for its error")
    halves = read_halves(records, records.chosen_layers(arguments.layers))
    rows = []
    for bits in arguments.bits:
        reference, budget = 0.0, 0.0
        for idea, fit_at in progress(list(ideas(halves, bits)), desc=f"{bits} bits"):
            error, spent = held_out(halves, fit_at(budget))
            if not reference:
                reference, budget = error, spent
            rows.append({"bits": bits, "idea": idea, "error_ratio": error / reference, "bits_per_element": spent})
    for row in rows:
        append_row(arguments.results, {**row, "model": Path(records.manifest.model).name, "layers": len(halves) // 2})
    print(format_table(rows))
    return {"rows": len(rows), "results": str(arguments.results)}


if __name__ == "__main__":
    run_command(main)
