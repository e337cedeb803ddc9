"""Fit error feedback: each head's order and matrix, and its codebooks once more, to what they will be asked for.

A channel that is quantized early leaves its error to those behind it; what the loss still feels of it is its conditional
Fisher information D_i, of A = U^-1 diag(D) U^-T. So codebooks are fitted to the targets that feedback makes of the
calibration tokens, and an error's weight is the paper's (Eq. 7) times D_i / A_ii. Where no element is kept exactly, the
range of a calibrated channel need not hold every element either: scale and zero are then those of the least weighted error,
in turns with the codebook. Least squares shrink what they quantize, and an average of values, which is what attention takes,
does not average that out: levels of values whose range is the token's are stretched in the end.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quant.arithmetic import denormalise, normalise
from quant.codebook import Codebook, nuq_codebook
from quant.feedback import Feedback
from quant.kmeans import Histogram
from quant.mixed import MixedQuantizer
from quant.quantizer import ChannelQuantizer, Encoded, TokenQuantizer
from quant.side import Side, kmeans_weights, without

ElementQuantizer = ChannelQuantizer | TokenQuantizer | MixedQuantizer
RangedQuantizer = ChannelQuantizer | MixedQuantizer

DAMPING = 0.03  # of the mean diagonal; 0.003 to 0.3 differ little
_TOKENS = 8192  # of the calibration that targets are made of
_ELEMENTS = 1 << 23  # and their channels
_ROUNDS = 3  # of ranges and codebook
_STRETCHES = 2  # of a token's levels, since codes follow them
_PRICING_FLOOR = 0.7
_TARGETED_FLOOR = 0.3  # lower, since targets show what feedback hands on
_REACH = 2.0  # targets leave the calibrated range by as much as errors are handed on
_BINS = 8192


def with_feedback(quantizer: ElementQuantizer, side: Side, moment: Tensor, name: str) -> ElementQuantizer:
    """The same quantizer with feedback, its codebooks fitted to the targets.

    Args:
        moment: E[g g^T] of every head, `[G, D, D]` float64.
        name: of the layer and kind, for a warning.
    """
    feedback, left = fit_feedback(moment, steps(quantizer, moment), name)
    quantizer = replace(quantizer, feedback=feedback)
    repeated = isinstance(quantizer, MixedQuantizer) and not quantizer.scheme.outliers
    return fitted_to_targets(quantizer, thinned(side) if repeated else side.thinned(_TOKENS), left)


def stretched(quantizer: TokenQuantizer, side: Side) -> TokenQuantizer:
    """The same quantizer with its levels further apart, so that decoded numbers follow their targets with a slope near one.

    The slope is that of all channels together, each about its mean; elements kept exactly have no part in it.
    """
    side = side.thinned(_TOKENS)
    for _ in range(_STRETCHES):
        sums = torch.zeros(5, side.activation.shape[1], dtype=torch.float64)
        for encoded, targets, scale, zero, _ in _coded(quantizer, side, torch.ones(())):
            m = without(encoded.outliers, torch.ones_like(targets)).double()
            y, v = targets.double(), denormalise(quantizer.levels(encoded.codes), scale, zero).double()
            sums += torch.stack([m.sum(0), (m * y).sum(0), (m * v).sum(0), (m * y * y).sum(0), (m * y * v).sum(0)])
        count, target, decoded, square, product = sums
        count = count.clamp(min=1)
        variance = (square - target.square() / count).sum()
        covariance = (product - target * decoded / count).sum()
        if not covariance > 1e-9 * square.sum():  # numbers that do not vary, or all of them on one level
            return quantizer
        slope = float(variance / covariance)
        quantizer = replace(quantizer, codebook=Codebook.from_levels(quantizer.codebook.levels * slope))
    return quantizer


def thinned(side: Side) -> Side:
    """The tokens that are encoded again and again: fewer where they are long."""
    return side.thinned(min(_TOKENS, max(_TOKENS // 4, _ELEMENTS // side.activation.shape[1])))


def without_feedback(quantizer: MixedQuantizer, side: Side) -> ElementQuantizer:
    """The same quantizer, its ranges and codebooks fitted once more if it keeps no element exactly."""
    if quantizer.scheme.outliers:
        return quantizer
    return fitted_to_targets(quantizer, thinned(side), torch.ones(len(quantizer.widths)))


def fitted_to_targets(quantizer: ElementQuantizer, side: Side, left: Tensor) -> ElementQuantizer:
    """A quantizer whose levels, where they are fitted at all, are those of what feedback, if it has it, asks for."""
    if quantizer.scheme.datatype not in ("nuq", "rdnuq"):
        return quantizer
    if isinstance(quantizer, TokenQuantizer) or quantizer.scheme.outliers:
        return _with_codebooks(quantizer, side, left)
    for _ in range(_ROUNDS):
        assert isinstance(quantizer, RangedQuantizer)
        quantizer = _with_codebooks(_with_ranges(quantizer, side, left), side, left)
    return quantizer


def _with_codebooks(quantizer: ElementQuantizer, side: Side, left: Tensor) -> ElementQuantizer:
    codebooks = _fit_to_targets(quantizer, side, left)
    if isinstance(quantizer, MixedQuantizer):
        return replace(quantizer, codebooks=dict(zip(quantizer.codebooks, codebooks, strict=True)))
    return replace(quantizer, codebook=codebooks[0])


def priced_share(moment: Tensor, deviation: Tensor) -> Tensor:
    """What allocation multiplies a channel's Fisher information by, `[C]` float32, since feedback will leave less of it.

    `deviation` `[C]` is that of its numbers. It is not believed below a floor: what 16 windows promise, others do not keep.
    """
    _, left = fit_feedback(moment, deviation.view(moment.shape[:2]), "")
    return left.clamp(min=_PRICING_FLOOR)


def targeted(quantizer: MixedQuantizer, side: Side, moment: Tensor) -> tuple[Tensor, Tensor]:
    """(targets that feedback would make of a side, Fisher information that it would leave), both `[N, C]` float32."""
    feedback, left = fit_feedback(moment, steps(quantizer, moment), "")
    _, targets = replace(quantizer, feedback=feedback).coded(side.activation)
    return targets, side.fisher.float() * left.clamp(min=_TARGETED_FLOOR)


def fit_feedback(
    moment: Tensor, step: Tensor, name: str, damping: float = DAMPING, order: Tensor | None = None
) -> tuple[Feedback, Tensor]:
    """(feedback, share of each channel's Fisher information that the channels behind it leave, `[C]` float32).

    Channels come in the order of what an error of one `step` `[G, D]` costs, or in the `order` `[G, D]` given. A moment that is
    not positive semi-definite is damped until it is, which is said in a warning.
    """
    heads, dim, _ = moment.shape
    if order is None:
        order = (step.double().square() * moment.diagonal(dim1=1, dim2=2)).argsort(dim=1, descending=True, stable=True)
    matrices, left = [], torch.ones(heads, dim, dtype=torch.float64)
    for head in range(heads):
        damped, lower = _factored(moment[head][order[head]][:, order[head]], damping, f"{name} head {head}")
        inverse = lower.flip(0, 1)  # upper triangular R with A = R R^T, so that U = R^-1
        upper = torch.linalg.solve_triangular(inverse, torch.eye(dim, dtype=torch.float64), upper=True)
        matrices.append((upper * inverse.diagonal()[:, None]).triu(1))
        left[head, order[head]] = inverse.diagonal().square() / damped.diagonal()
    return Feedback(order, torch.stack(matrices).half()), left.flatten().float()


def _factored(ordered: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor]:
    """(A = the moment and its damping, lower Cholesky factor of A with rows and columns reversed)."""
    mean = ordered.diagonal().mean()
    if not mean:  # no gradient ever came here: nothing to hand on
        return torch.eye(len(ordered), dtype=torch.float64), torch.eye(len(ordered), dtype=torch.float64)
    strength = damping
    while True:
        damped = ordered + strength * mean.abs() * torch.eye(len(ordered), dtype=torch.float64)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        strength *= 10
    if strength > damping:
        warnings.warn(
            f"{name}: moments of gradients are not positive semi-definite; damped by {strength:g} of their mean instead of "
            f"{damping:g}",
            stacklevel=2,
        )
    return damped, lower


def steps(quantizer: ElementQuantizer, moment: Tensor) -> Tensor:
    """How far apart levels lie, up to a factor that all channels share, `[G, D]`."""
    if isinstance(quantizer, TokenQuantizer):
        return torch.ones(moment.shape[:2])
    step = quantizer.scale
    if isinstance(quantizer, MixedQuantizer):
        step = step * 0.5 ** quantizer.widths.float()
    return step.view(moment.shape[:2])


def _coded(
    quantizer: ElementQuantizer, side: Side, left: Tensor
) -> Iterator[tuple[Encoded, Tensor, Tensor, Tensor, Tensor]]:
    """(encoded, targets, scale, zero, weight of a squared error of the normalised axis) of some tokens at a time."""
    for activation, fisher in side.chunks():
        encoded, targets = quantizer.coded(activation)
        scale, zero = quantizer.ranges(encoded)
        weights = without(encoded.outliers, kmeans_weights(quantizer.scheme, fisher, scale) * left)
        yield encoded, targets, scale, zero, weights


def _fit_to_targets(quantizer: ElementQuantizer, side: Side, left: Tensor) -> list[Codebook]:
    """A codebook for each width that occurs."""
    widths = quantizer.channels
    histograms = [Histogram.empty(-_REACH, _REACH, _BINS) for _ in widths]
    for _, targets, scale, zero, weights in _coded(quantizer, side, left):
        points = normalise(targets, scale, zero).clamp_(-_REACH, _REACH)
        for chosen, histogram in zip(widths.values(), histograms, strict=True):
            histogram.add(points[:, chosen].numpy().ravel(), weights[:, chosen].numpy().ravel())
    return [nuq_codebook(histogram, 2**width) for width, histogram in zip(widths, histograms, strict=True)]


def _with_ranges(quantizer: RangedQuantizer, side: Side, left: Tensor) -> RangedQuantizer:
    """Scale and zero of every channel as a weighted regression of its targets on the levels they are given."""
    sums = torch.zeros(5, len(quantizer.scale), dtype=torch.float64)
    for encoded, targets, _, _, weights in _coded(quantizer, side, left):
        w, y, q = weights.double(), targets.double(), quantizer.levels(encoded.codes).double()
        sums += torch.stack([w.sum(0), (w * q).sum(0), (w * q * q).sum(0), (w * y).sum(0), (w * y * q).sum(0)])
    mass, level, square, target, product = sums
    spread = mass * square - level * level
    scale = (mass * product - level * target) / spread
    zero = (target - scale * level) / mass
    # a channel on one level, or without weight, tells nothing
    told = (spread > 1e-9 * mass * square) & (mass > 0) & (scale > 0)
    if isinstance(quantizer, MixedQuantizer):  # one level for all that is: where it lies is the channel's own affair
        alone = (quantizer.widths == 0) & (mass > 0)
        scale = torch.where(alone, quantizer.scale.double(), scale)
        zero = torch.where(alone, (target - scale * level) / mass, zero)
        told |= alone
    return replace(
        quantizer,
        scale=torch.where(told, scale.float(), quantizer.scale),
        zero=torch.where(told, zero.float(), quantizer.zero),
    )
