"""Fit the quantizer of one layer's keys or values: its ranges, then its codebook.

- static ranges per channel: `hi`, `lo` = the (1 - p/2) and p/2 quantiles over the calibration tokens, sink tokens left
  out; `s = (hi - lo) / 2`, `z = (hi + lo) / 2` (sections 3.1 and 3.4); dynamic ones as encoding will take them;
- the codebook minimises `sum_i F_i s_i^2 (x^_i - Q(x^_i))^2` over the inliers (section 3.3, Eq. 7).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gradients.cli import UserError
from gradients.models import Kind
from gradients.records import Records
from gradients.rope import rotate, rotate_squares
from quant.codebook import Codebook, fit_codebook, match_moments
from quant.grouped import GroupQuantizer, group_ranges, spread
from quant.kmeans import Histogram
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer, normalise, token_range
from quant.rotated import RotatedQuantizer, gaussian_codebook, random_rotation
from quant.scheme import Axis, Scheme

_CHUNK_CHANNELS = 256  # sorted at a time
_CHUNK_ELEMENTS = 1 << 22  # elements handled at a time: 16 MB of float32 for each intermediate


@dataclass(frozen=True)
class Side:
    """Calibration data of one layer's keys or values: `activation` and `fisher`, `[N, C]` in their stored dtypes.

    `window` consecutive tokens belong to one sequence (None: all), `head_dim` channels to one head.
    """

    activation: Tensor
    fisher: Tensor
    window: int | None = None
    head_dim: int | None = None

    @property
    def sequence(self) -> int:
        """Tokens of one sequence."""
        return self.window or len(self.activation)

    def chunks(self, whole_sequences: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Float32 (activation, Fisher) of some tokens at a time."""
        tokens = max(1, _CHUNK_ELEMENTS // self.activation.shape[1])
        if whole_sequences:
            tokens = max(1, tokens // self.sequence) * self.sequence
        for activation, fisher in zip(self.activation.split(tokens), self.fisher.split(tokens), strict=True):
            yield activation.float(), fisher.float()

    def thinned(self, tokens: int) -> "Side":
        """About `tokens` tokens, evenly spaced, if there are more; each is then a sequence of its own."""
        step = len(self.activation) // tokens
        if step < 2:
            return self
        return replace(self, activation=self.activation[::step], fisher=self.fisher[::step], window=1)


def read_side(records: Records, scheme: Scheme, layer: int, kind: Kind) -> Side:
    """The calibration data of one layer's keys or values, on the side of the rotary embedding that the scheme wants.

    Raises `UserError` for records that cannot be used.
    """
    activation, fisher = records.read_layer(layer, kind, skip_tokens=scheme.sink_tokens)
    if not len(activation):
        raise UserError(
            f"--sink-tokens {scheme.sink_tokens} leaves nothing of windows of {records.manifest.seqlen} tokens"
        )
    # least and greatest hand on a NaN, need no mask, and are found 10 to 40 times as fast as isfinite goes through half precision
    if not all(torch.stack(x.aminmax()).isfinite().all() for x in (activation, fisher)):
        raise UserError(f"records: layer {layer} {kind} has NaN or infinite elements; record again")
    window = records.manifest.seqlen - scheme.sink_tokens
    side = Side(activation, fisher, window, records.manifest.fingerprint.head_dim)
    if kind == "key" and scheme.key_rope == "post":
        return _rotated(side, *(table[scheme.sink_tokens :] for table in records.read_rope()))
    return side


def _rotated(side: Side, cos: Tensor, sin: Tensor) -> Side:
    """Keys as they are after the rotary embedding; of their Fisher information the diagonal, which is all there is."""
    turned = []
    for x, turn in ((side.activation, rotate), (side.fisher, rotate_squares)):
        heads = x.float().unflatten(0, (-1, side.sequence)).unflatten(-1, (-1, side.head_dim)).transpose(1, 2)
        turned.append(turn(heads, cos[None], sin[None]).transpose(1, 2).flatten(2).flatten(0, 1).to(x.dtype))
    return replace(side, activation=turned[0], fisher=turned[1])


def fit_side(side: Side, scheme: Scheme, per_channel: bool) -> Quantizer:
    """The quantizer of one layer's keys or values."""
    axis: Axis = "channel" if per_channel else "token"
    form = scheme.form(axis)
    if form == "static":
        low, high = _channel_ends(side, scheme)
        scale, zero = (high - low) / 2, (high + low) / 2
        codebook = _fit_codebook(side, scheme, partial(normalise_channels, scale=scale, zero=zero))
        return ChannelQuantizer(scheme, codebook, scale, zero)
    if form == "token":
        thresholds = torch.stack(matrix_quantiles(side.activation, scheme.outliers)) if _by_matrix(scheme) else None
        normalised = partial(normalise_tokens, share=scheme.outliers, thresholds=thresholds)
        return TokenQuantizer(scheme, _fit_codebook(side, scheme, normalised), thresholds)
    if form == "grouped":
        normalised = partial(normalise_groups, scheme=scheme, axis=axis, window=side.sequence)
        return GroupQuantizer(scheme, _fit_codebook(side, scheme, normalised), axis)
    return RotatedQuantizer(
        scheme, gaussian_codebook(scheme.levels), random_rotation(side.head_dim or side.activation.shape[1])
    )


def _by_matrix(scheme: Scheme) -> bool:
    return scheme.thresholds == "matrix" and scheme.outliers > 0


def _channel_ends(side: Side, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(low, high) of every channel; what lies beyond is an outlier."""
    if not _by_matrix(scheme):
        return channel_quantiles(side.activation, scheme.outliers)
    low, high = matrix_quantiles(side.activation, scheme.outliers)
    lowest, highest = channel_quantiles(side.activation, 0.0)
    # a channel that lies beyond the thresholds altogether has an empty range: all of it is outliers
    return lowest.clamp(low, high), highest.clamp(low, high)


def matrix_quantiles(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The p/2 and 1 - p/2 quantiles of all of `[N, C]`, scalars: thresholds per matrix, which the paper compares with."""
    flat = x.float().flatten().numpy()
    low, high = np.quantile(flat, [share / 2, 1 - share / 2])
    return torch.tensor(float(low)), torch.tensor(float(high))


def channel_quantiles(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The p/2 and 1 - p/2 quantiles of each column of `[N, C]`, float32, linearly interpolated.

    They are the minimum and the maximum for a share of 0. Only the ends are sorted.
    """
    tokens = len(x)
    position = share / 2 * (tokens - 1)
    index, weight = int(position), position - int(position)
    ends = min(index + 2, tokens)
    after = min(index + 1, ends - 1)
    quantiles = []
    for columns in (some.T.contiguous().float() for some in x.split(_CHUNK_CHANNELS, dim=1)):
        extremes = (columns.topk(ends, dim=1, largest=largest).values for largest in (False, True))
        quantiles.append([torch.lerp(extreme[:, index], extreme[:, after], weight) for extreme in extremes])
    low, high = (torch.cat(parts) for parts in zip(*quantiles, strict=True))
    return low, high


def normalise_channels(x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x^, outlier mask, scale that broadcasts against x) of a channel-wise axis."""
    normalised = normalise(x, scale, zero)
    return normalised, normalised.abs() > 1, scale


def normalise_tokens(x: Tensor, share: float, thresholds: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x^, outlier mask, scale that broadcasts against x) of a token-wise axis."""
    outliers, scale, zero = token_range(x, share, thresholds)
    return normalise(x, scale.float(), zero.float()), outliers, scale.float()


def normalise_groups(x: Tensor, scheme: Scheme, axis: Axis, window: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x^, outlier mask, scale of every element) of `x` `[N, C]` in groups, `window` tokens being one sequence."""
    sequences = x.unflatten(0, (-1, window))
    outliers, *tables = group_ranges(sequences, axis, scheme.group, scheme.outliers)
    scale, zero = (
        spread(table.float(), sequences.shape, axis, scheme.group).expand(sequences.shape).flatten(0, 1)
        for table in tables
    )
    return normalise(x, scale, zero), None if outliers is None else outliers.flatten(0, 1), scale


def _fit_codebook(side: Side, scheme: Scheme, normalised: partial) -> Codebook:
    weighted, counted, squares = Histogram.empty(-1, 1), Histogram.empty(-1, 1), 0.0
    for activation, fisher in side.chunks(whole_sequences=normalised.func is normalise_groups):
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
