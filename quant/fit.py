"""Fit quantizers to records: ranges, then a codebook per layer for keys and one for values.

    python -m quant.fit --records records/ --scheme nuq3-1% --output nuq3.safetensors
    python -m quant.fit --records records/ --scheme nuq2-1% --q-norm --sink-tokens 5 --jobs 2 --output nuq2.safetensors

Needs no model: activations and Fisher information come from the records, one layer at a time. What it fits:

- per channel: `hi`, `lo` = the (1 - p/2) and p/2 quantiles over the calibration tokens, sink tokens left out;
  `s = (hi - lo) / 2`, `z = (hi + lo) / 2` (sections 3.1 and 3.4);
- the codebook minimises `sum_i F_i s_i^2 (x^_i - Q(x^_i))^2` over the inliers (section 3.3, Eq. 7).
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gradients.cli import UserError, command_parser, non_negative_int, positive_int, run_command
from gradients.models import KINDS, Kind
from gradients.records import Records
from quant.allocate import ChannelHistograms, Options, allocate, bind, price
from quant.artefact import Quantizers, axis_of
from quant.codebook import Codebook, fit_codebook, match_moments
from quant.kmeans import Histogram
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer, normalise, token_range
from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS, OUTLIER_LIST_BITS

Layers = dict[int, dict[Kind, Quantizer]]
Mapper = Callable[[str, Callable[[Any], Any], Sequence[Any]], list[Any]]

_CHUNK_ELEMENTS = 1 << 22  # elements handled at a time: 16 MB of float32 for each intermediate


@dataclass(frozen=True)
class Side:
    """Calibration data of one layer's keys or values: `activation` and `fisher`, `[N, C]` in their stored dtypes."""

    activation: Tensor
    fisher: Tensor

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Float32 (activation, Fisher) of some tokens at a time."""
        tokens = max(1, _CHUNK_ELEMENTS // self.activation.shape[1])
        for activation, fisher in zip(self.activation.split(tokens), self.fisher.split(tokens), strict=True):
            yield activation.float(), fisher.float()


def fit(records: Records, scheme: Scheme, jobs: int = 1) -> Quantizers:
    """Fit every cached layer; `jobs` > 1 spreads the layers over processes. Raises `UserError` for unusable records."""
    with _mapper(jobs) as spread:
        fitted = _fit_allocated(records, scheme, spread) if scheme.allocated else _fit_uniform(records, scheme, spread)
    return Quantizers(
        scheme=scheme,
        fingerprint=records.manifest.fingerprint,
        records_digest=records.manifest.digest,
        layers=fitted,
    )


def _fit_uniform(records: Records, scheme: Scheme, spread: Mapper) -> Layers:
    layers = records.manifest.fingerprint.cached_layers
    return dict(zip(layers, spread(f"fitting {scheme}", partial(_fit_layer, records, scheme), layers), strict=True))


def _fit_allocated(records: Records, scheme: Scheme, spread: Mapper) -> Layers:
    """Price all options of all layers, allocate the budget among them, and fit what was chosen."""
    fingerprint = records.manifest.fingerprint
    layers = fingerprint.cached_layers
    options = spread(f"pricing {scheme}", partial(_price_layer, records, scheme), layers)
    # every block of every head has a list of outliers, with or without entries
    budget = scheme.bits - OUTLIER_LIST_BITS / (BLOCK_TOKENS * fingerprint.head_dim)
    chosen = allocate([side for layer in options for side in layer], budget)
    work = list(zip(layers, _pairs(chosen), strict=True))
    fitted = spread(f"fitting {scheme}", partial(_bind_layer, records, scheme), work)
    return dict(zip(layers, fitted, strict=True))


def _pairs(items: Sequence[Any]) -> list[tuple[Any, Any]]:
    """`[a, b, c, d]` as `[(a, b), (c, d)]`."""
    return list(zip(items[::2], items[1::2], strict=True))


@contextmanager
def _mapper(jobs: int) -> Iterator[Mapper]:
    """A map with a progress bar, in this process or in several."""

    def spread(what: str, task: Callable[[Any], Any], work: Sequence[Any]) -> list[Any]:
        results = pool.map(task, work) if pool else map(task, work)
        return list(tqdm(results, desc=what, unit="layer", total=len(work)))

    pool = ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) if jobs > 1 else None
    try:
        yield spread
    finally:
        if pool:
            pool.shutdown()


def _read_side(records: Records, scheme: Scheme, layer: int, kind: Kind) -> Side:
    side = Side(*records.read_layer(layer, kind, skip_tokens=scheme.sink_tokens))
    if not len(side.activation):
        raise UserError(
            f"--sink-tokens {scheme.sink_tokens} leaves nothing of windows of {records.manifest.seqlen} tokens"
        )
    if not side.activation.isfinite().all() or not side.fisher.isfinite().all():
        raise UserError(f"records: layer {layer} {kind} has NaN or infinite elements; record again")
    return side


def _fit_layer(records: Records, scheme: Scheme, layer: int) -> dict[Kind, Quantizer]:
    return {
        kind: fit_side(_read_side(records, scheme, layer, kind), scheme, axis_of(scheme, kind) == "channel")
        for kind in KINDS
    }


def _histograms(records: Records, scheme: Scheme, layer: int) -> Iterator[ChannelHistograms]:
    for kind in KINDS:
        side = _read_side(records, scheme, layer, kind)
        yield ChannelHistograms.of(side.activation, side.fisher)


def _price_layer(records: Records, scheme: Scheme, layer: int) -> list[Options]:
    return [price(histograms) for histograms in _histograms(records, scheme, layer)]


def _bind_layer(records: Records, scheme: Scheme, work: tuple[int, Sequence[Any]]) -> dict[Kind, Quantizer]:
    layer, chosen = work
    both = zip(KINDS, _histograms(records, scheme, layer), chosen, strict=True)
    return {kind: bind(histograms, choice, scheme) for kind, histograms, choice in both}


def fit_side(side: Side, scheme: Scheme, per_channel: bool) -> Quantizer:
    """The quantizer of one layer's keys or values."""
    if per_channel:
        low, high = channel_quantiles(side.activation, scheme.outliers)
        scale, zero = (high - low) / 2, (high + low) / 2
        codebook = _fit_codebook(side, scheme, partial(normalise_channels, scale=scale, zero=zero))
        return ChannelQuantizer(scheme, codebook, scale, zero)
    return TokenQuantizer(scheme, _fit_codebook(side, scheme, partial(normalise_tokens, share=scheme.outliers)))


def channel_quantiles(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The p/2 and 1 - p/2 quantiles of each column of `[N, C]`, float32, linearly interpolated.

    They are the minimum and the maximum for a share of 0. Only the ends are sorted.
    """
    tokens = len(x)
    position = share / 2 * (tokens - 1)
    index, weight = int(position), position - int(position)
    ends = min(index + 2, tokens)
    columns = x.T.contiguous().float()
    lowest = columns.topk(ends, dim=1, largest=False).values
    highest = columns.topk(ends, dim=1).values
    after = min(index + 1, ends - 1)
    low, high = (torch.lerp(extreme[:, index], extreme[:, after], weight) for extreme in (lowest, highest))
    return low, high


def normalise_channels(x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x^, outlier mask, scale that broadcasts against x) of a channel-wise axis."""
    normalised = normalise(x, scale, zero)
    return normalised, normalised.abs() > 1, scale


def normalise_tokens(x: Tensor, share: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x^, outlier mask, scale that broadcasts against x) of a token-wise axis."""
    outliers, scale, zero = token_range(x, share)
    return normalise(x, scale.float(), zero.float()), outliers, scale.float()


def _fit_codebook(side: Side, scheme: Scheme, normalised: partial) -> Codebook:
    weighted, counted, squares = Histogram.empty(-1, 1), Histogram.empty(-1, 1), 0.0
    for activation, fisher in side.chunks():
        x, outliers, scale = normalised(activation)
        # outliers count for nothing; inliers end within the range, but for the rounding of an fp16 scale
        points = x.clamp_(-1, 1).numpy().ravel()
        if scheme.datatype == "nuq":
            weighted.add(points, without(outliers, kmeans_weights(scheme, fisher, scale)).numpy().ravel())
        if scheme.q_norm:
            inliers = without(outliers, torch.ones_like(x)).numpy().ravel()
            counted.add(points, inliers)
            squares += float(np.sum(inliers * np.square(points, dtype=np.float64)))
    codebook = fit_codebook(scheme.datatype, scheme.levels, weighted)
    return match_moments(codebook, counted, squares) if scheme.q_norm else codebook


def without(outliers: Tensor | None, weights: Tensor) -> Tensor:
    """The weights with those of outliers set to zero, in place."""
    return weights if outliers is None else weights.masked_fill_(outliers, 0.0)


def kmeans_weights(scheme: Scheme, fisher: Tensor, scale: Tensor) -> Tensor:
    """Eq. 7: an error of the normalised x^ is an error s times as large of x, hence Fisher * s^2. A new tensor."""
    if scheme.weights == "none":
        return torch.ones_like(fisher)
    return fisher * scale.square() if scheme.weights == "fisher*s^2" else fisher.clone()


def add_scheme_arguments(parser: argparse.ArgumentParser, named: bool = True) -> None:
    """The fields of a `Scheme` as options; `--scheme` itself unless told that it is not `named`."""
    default = Scheme(datatype="nuq", bits=4)
    if named:
        parser.add_argument(
            "--scheme", required=True, help="{int|nf|nuq}BITS[-P%%], such as nuq3-1%%, or rdnuqBUDGET, such as rdnuq2.4"
        )
    parser.add_argument(
        "--sink-tokens", type=non_negative_int, default=default.sink_tokens, help="first tokens kept in fp16"
    )
    parser.add_argument("--q-norm", action=argparse.BooleanOptionalAction, default=default.q_norm)
    parser.add_argument("--weights", choices=["fisher*s^2", "fisher", "none"], default=default.weights)
    parser.add_argument("--key-axis", choices=["channel", "token"], default=default.key_axis)
    parser.add_argument("--value-axis", choices=["channel", "token"], default=default.value_axis)
    parser.add_argument(
        "--outlier-cap", type=non_negative_int, default=None, help="most outliers per token, channel-wise axes"
    )


def scheme_from(name: str, arguments: argparse.Namespace) -> Scheme:
    """The named scheme with the options of `add_scheme_arguments`. Raises `UserError` for an unknown name."""
    names = ("sink_tokens", "q_norm", "weights", "key_axis", "value_axis", "outlier_cap")
    return Scheme.parse(name, **{option: getattr(arguments, option) for option in names})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("quant.fit", __doc__)
    parser.add_argument("--records", required=True, help="folder written by `python -m gradients`")
    add_scheme_arguments(parser)
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes to fit layers in")
    parser.add_argument("--output", required=True, help="the quantizers.safetensors to write")
    arguments = parser.parse_args(argv)

    scheme = scheme_from(arguments.scheme, arguments)
    records = Records.open(arguments.records)
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
        "seconds": round(seconds, 2),
    }


if __name__ == "__main__":
    run_command(main)
