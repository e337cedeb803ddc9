"""Fit quantizers to records: ranges, then a codebook per layer for keys and one for values.

    python -m quant.fit --records records/ --scheme nuq3-1% --output nuq3.safetensors
    python -m quant.fit --records records/ --scheme nuq2-1% --q-norm --sink-tokens 5 --jobs 2 --output nuq2.safetensors

Needs no model: activations and Fisher information come from the records, one layer at a time. What is fitted to a
layer's keys or values says `quant/side.py`; how rdnuq divides its bits among all of them, `quant/allocate.py`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gradients.checked import require_own_place
from gradients.cli import UserError, command_parser, note, positive_int, run_command
from gradients.fingerprint import Fingerprint
from gradients.models import KINDS, Kind
from gradients.progress import progress
from gradients.records import Records
from quant.allocate import ChannelHistograms, Ints, Options, allocate, bind, form_all_groups, price
from quant.artefact import FILE, Quantizers, axis_of
from quant.compensate import (
    ElementQuantizer,
    priced_share,
    stretched,
    targeted,
    thinned,
    with_feedback,
    without_feedback,
)
from quant.grouping import units_of
from quant.mixed import MixedQuantizer
from quant.options import add_scheme_arguments, scheme_from
from quant.quantizer import Quantizer, TokenQuantizer
from quant.scheme import Scheme
from quant.side import Side, fit_side, read_side
from quant.storage import BLOCK_TOKENS, OUTLIER_BITS, OUTLIER_LIST_BITS

_PRICING_TOKENS = 8192
_UNSPENT = 0.5  # bits of a budget that groups may leave
_KEY_WEIGHT = 0.7

Layers = dict[int, dict[Kind, Quantizer]]
Mapper = Callable[[str, Callable[[Any], Any], Sequence[Any]], list[Any]]


def fit(records: Records, scheme: Scheme, jobs: int = 1) -> Quantizers:
    """Fit every cached layer; `jobs` > 1 spreads the layers over processes. Raises `UserError` for unusable records."""
    with _mapper(jobs) as spread:
        fitted = _fit_allocated(records, scheme, spread) if scheme.allocated else _fit_uniform(records, scheme, spread)
    return Quantizers(
        scheme=scheme,
        fingerprint=records.manifest.fingerprint,
        records_digest=records.manifest.digest,
        layers=fitted,
        weights=records.manifest.weights,
        bos=records.manifest.bos if records.manifest.schema > 1 else None,
    )


def _fit_uniform(records: Records, scheme: Scheme, spread: Mapper) -> Layers:
    layers = records.manifest.fingerprint.cached_layers
    return dict(zip(layers, spread(f"fitting {scheme}", partial(_fit_layer, records, scheme), layers), strict=True))


def _fit_allocated(records: Records, scheme: Scheme, spread: Mapper) -> Layers:
    """Price all options of all layers, allocate the budget among them, and fit what was chosen."""
    fingerprint = records.manifest.fingerprint
    layers = fingerprint.cached_layers
    # if there are outliers, every block of every head has a list, with or without entries
    lists = OUTLIER_LIST_BITS / (BLOCK_TOKENS * fingerprint.head_dim) if scheme.outliers else 0
    units = _units(scheme, fingerprint)

    def allocated(priced: Sequence[Sequence[Options]]) -> list[tuple[int, Sequence[Any]]]:
        """Every layer, with (choices, groups) of its keys and values."""
        options = [side for layer in priced for side in layer]
        places = form_all_groups(options, scheme.bits - lists, units)
        chosen = allocate(options, scheme.bits - lists, places)
        return list(zip(layers, _pairs(list(zip(chosen, places, strict=True))), strict=True))

    work = allocated(spread(f"pricing {scheme}", partial(_price_layer, records, scheme), layers))
    if scheme.groups > 1 and scheme.feedback:
        work = allocated(spread(f"pricing {scheme} again", partial(_reprice_layer, records, scheme), work))
    fitted = spread(f"fitting {scheme}", partial(_bind_layer, records, scheme), work)
    _note_unspent(scheme, fitted)
    return dict(zip(layers, fitted, strict=True))


def _note_unspent(scheme: Scheme, fitted: Sequence[Mapping[Kind, Quantizer]]) -> None:
    """Say so if codes take much less than was asked for: a budget is the most, and it is spent only where errors are seen."""
    widths = torch.cat([side.tables["widths"].float() for layer in fitted for side in layer.values()])
    spent, exact = float(widths.mean()), OUTLIER_BITS * scheme.outliers
    if spent + exact < scheme.bits - _UNSPENT:
        note(
            f"{scheme} has codes of {spent:.2f} bits on average, since the records show nothing that more would mend, or no "
            "channel takes more; record more windows, or ask for fewer bits"
        )


def _units(scheme: Scheme, fingerprint: Fingerprint) -> list[Ints | None]:
    """What is grouped, of every layer's keys and values; None where each channel has its own width."""
    shape = fingerprint.heads, fingerprint.head_dim, fingerprint.rotary_half
    kinds = [None if scheme.groups == 1 else units_of(kind, *shape) for kind in KINDS]
    return kinds * len(fingerprint.cached_layers)


def _pairs(items: Sequence[Any]) -> list[tuple[Any, Any]]:
    """`[a, b, c, d]` as `[(a, b), (c, d)]`."""
    return list(zip(items[::2], items[1::2], strict=True))


@contextmanager
def _mapper(jobs: int) -> Iterator[Mapper]:
    """A map with a progress bar, in this process or in several, which raises `UserError` if one of them is killed."""

    def spread(what: str, task: Callable[[Any], Any], work: Sequence[Any]) -> list[Any]:
        try:
            results = pool.map(task, work) if pool else map(task, work)
            return list(progress(results, desc=what, unit="layer", total=len(work)))
        except BrokenProcessPool as error:
            raise UserError(
                f"one of the {jobs} processes was killed while {what}, for want of memory maybe; give fewer --jobs"
            ) from error

    pool = ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) if jobs > 1 else None
    try:
        yield spread
    finally:
        if pool:
            pool.shutdown()


def _fit_layer(records: Records, scheme: Scheme, layer: int) -> dict[Kind, Quantizer]:
    fitted = {}
    for kind in KINDS:
        side = read_side(records, scheme, layer, kind)
        quantizer = fit_side(side, scheme, axis_of(scheme, kind) == "channel")
        fitted[kind] = _compensated(quantizer, records, side, layer, kind)
    return fitted


def _price_layer(records: Records, scheme: Scheme, layer: int) -> list[Options]:
    options = []
    for kind in KINDS:
        side = _sample(read_side(records, scheme, layer, kind), scheme)
        fisher = side.fisher
        if scheme.feedback:
            deviation = side.thinned(_PRICING_TOKENS).activation.float().std(0, correction=0)
            fisher = fisher.float() * priced_share(records.read_moment(layer, kind), deviation)
        options.append(_weighted(price(ChannelHistograms.of(side.activation, fisher), scheme), scheme, kind))
    return options


def _sample(side: Side, scheme: Scheme) -> Side:
    """What is counted: all tokens if they say which elements are kept exactly; else every range is fitted once more, and fewer do."""
    return side if scheme.outliers else thinned(side)


def _reprice_layer(records: Records, scheme: Scheme, work: tuple[int, Sequence[Any]]) -> list[Options]:
    """Options as the targets of the quantizers chosen so far have them, which know what feedback hands on."""
    layer, chosen = work
    options = []
    for kind, choice in zip(KINDS, chosen, strict=True):
        side = thinned(read_side(records, scheme, layer, kind))
        quantizer = bind(ChannelHistograms.of(side.activation, side.fisher), choice[0], scheme, choice[1])
        targets, fisher = targeted(quantizer, side, records.read_moment(layer, kind))
        options.append(_weighted(price(ChannelHistograms.of(targets, fisher), scheme), scheme, kind))
    return options


def _weighted(options: Options, scheme: Scheme, kind: Kind) -> Options:
    """Options as groups are allocated by: the square of an error of keys says too much of what softmax makes of it."""
    if kind == "value" or scheme.groups == 1:
        return options
    return replace(options, error=_KEY_WEIGHT * options.error)


def _bind_layer(records: Records, scheme: Scheme, work: tuple[int, Sequence[Any]]) -> dict[Kind, Quantizer]:
    layer, chosen = work
    fitted = {}
    for kind, choice in zip(KINDS, chosen, strict=True):
        side = read_side(records, scheme, layer, kind)
        sample = _sample(side, scheme)
        quantizer = bind(ChannelHistograms.of(sample.activation, sample.fisher), choice[0], scheme, choice[1])
        fitted[kind] = _compensated(quantizer, records, side, layer, kind)
    return fitted


def _compensated(quantizer: Quantizer, records: Records, side: Side, layer: int, kind: Kind) -> Quantizer:
    """The quantizer with feedback, if its scheme has it, and with all that is fitted once codes are known."""
    if not quantizer.scheme.feedback:
        return without_feedback(quantizer, side) if isinstance(quantizer, MixedQuantizer) else quantizer
    assert isinstance(quantizer, ElementQuantizer)
    fed_back = with_feedback(quantizer, side, records.read_moment(layer, kind), f"layer {layer} {kind}")
    if kind == "value" and isinstance(fed_back, TokenQuantizer) and quantizer.scheme.datatype == "nuq":
        return stretched(fed_back, side)
    return fed_back


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("quant.fit", __doc__)
    parser.add_argument("--records", required=True, help="folder written by `python -m gradients`")
    add_scheme_arguments(parser)
    parser.add_argument("--windows", type=positive_int, help="use only the first windows of the records")
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes to fit layers in")
    parser.add_argument("--output", required=True, help="the quantizers.safetensors to write")
    arguments = parser.parse_args(argv)

    scheme = scheme_from(arguments.scheme, arguments)
    require_own_place(arguments.output, FILE)
    if Path(arguments.output).resolve().is_relative_to(Path(arguments.records).resolve()):
        raise UserError(
            f"cannot write quantizers {arguments.output!r}: that is in the folder of records; give another place"
        )
    records = Records.open(arguments.records).first(arguments.windows)
    started = time.perf_counter()
    quantizers = fit(records, scheme, arguments.jobs)
    quantizers.save(arguments.output)
    seconds = time.perf_counter() - started
    print(f"{scheme.describe()}: {len(quantizers.layers)} layers fitted in {seconds:.1f} s to {arguments.output}")
    return {
        "quantizers": arguments.output,
        "scheme": scheme.describe(),
        "layers": len(quantizers.layers),
        "records": records.manifest.digest,
        "calibration_windows": records.manifest.windows,
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    run_command(main)
