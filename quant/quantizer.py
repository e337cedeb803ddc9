"""The arithmetic of quantization, written once: `encode(x) -> Encoded`, `decode(Encoded) -> x'`.

The simulation is `decode(encode(x))`; the packed cache packs the same `Encoded`. Two quantizers differ in where
their range comes from: a `ChannelQuantizer` calibrated one range per channel (the paper's keys), a
`TokenQuantizer` takes one per token as it comes (the paper's values). With levels q on [-1, 1]:

    x^ = (x - z) / s        code = bucketize(x^)        x' = s * q[code] + z,  or x itself (fp16) for an outlier

With `feedback` (quant/feedback.py) codes are those of targets: x, and the errors that channels before have handed on.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from gradients.parallel import WHOLE, Part, gathered_heads
from quant.arithmetic import as_stored, denormalise, normalise
from quant.codebook import Codebook
from quant.feedback import ChannelBooks, Feedback
from quant.outliers import cap_outliers, extreme_elements, outliers_per_end
from quant.scheme import Scheme


@dataclass(frozen=True)
class Encoded:
    """Tokens as they will be stored: `codes` `[..., T, C]`, and whatever codes cannot say.

    `outliers` masks the elements kept exactly, whose fp16 values are `exact`, `[N]` in row-major order of the
    mask. `scale` and `zero` `[..., T, 1]` fp16 exist where the range is dynamic.
    """

    codes: Tensor  # [..., T, C] uint8
    outliers: Tensor | None  # [..., T, C] bool
    exact: Tensor | None  # [N] fp16
    scale: Tensor | None = None  # [..., T, 1] fp16
    zero: Tensor | None = None  # [..., T, 1] fp16

    @property
    def outlier_count(self) -> int:
        """Number of elements kept exactly."""
        return 0 if self.exact is None else self.exact.numel()


@dataclass(frozen=True)
class Quantizer(ABC):
    """What every quantizer can do; `tables` are its fitted tensors, by the name they have in the artefact."""

    scheme: Scheme

    @property
    @abstractmethod
    def tables(self) -> dict[str, Tensor]: ...  # noqa: D102
    @abstractmethod
    def encode(self, x: Tensor) -> Encoded:
        """Quantize `x`, `[..., T, C]`, in float32."""

    @abstractmethod
    def dense(self, encoded: Encoded) -> Tensor:
        """Float32 values `[..., T, C]`, outliers not yet put in their place."""

    def decode(self, encoded: Encoded) -> Tensor:
        """Float32 values, `[..., T, C]`."""
        dense = self.dense(encoded)
        if encoded.outliers is not None:
            assert encoded.exact is not None
            dense[encoded.outliers] = encoded.exact.float()
        return dense

    @property
    def channels(self) -> Mapping[int, slice | Tensor]:
        """The channels whose codes have each number of bits: usually all have the same."""
        return {int(self.scheme.bits): slice(None)}

    @cached_property
    def _copies(self) -> dict[torch.device, Self]:
        return {}

    def to(self, device: torch.device | str) -> Self:
        """The same quantizer on a device: one copy, with what it has worked out, for all who ask."""
        if (device := torch.device(device)) not in self._copies:
            with torch.inference_mode(False):  # others may ask for it outside of it
                moved = {field.name: _moved(getattr(self, field.name), device) for field in fields(self)}
                self._copies[device] = replace(self, **moved)
        return self._copies[device]


def _moved(thing: Any, device: torch.device | str) -> Any:
    if isinstance(thing, dict):
        return {name: _moved(part, device) for name, part in thing.items()}
    return thing.to(device) if isinstance(thing, Tensor | Codebook | Feedback) else thing


class FedBack(Quantizer):
    """A quantizer that may hand errors on, whose codes are then those of targets."""

    @abstractmethod
    def coded(self, x: Tensor) -> tuple[Encoded, Tensor]:
        """`encode(x)`, and the targets float32 `[..., T, C]` whose codes these are."""

    @abstractmethod
    def levels(self, codes: Tensor) -> Tensor:
        """What codes `[..., C]` stand for on the normalised axis, float32."""

    @abstractmethod
    def ranges(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """(scale, zero) float32 of that axis: the channels' `[C]`, or the tokens' `[..., T, 1]` as stored."""

    def encode(self, x: Tensor) -> Encoded:
        """Quantize `x`, `[..., T, C]`, in float32."""
        return self.coded(x)[0]

    def dense(self, encoded: Encoded) -> Tensor:
        """Float32 values `[..., T, C]`, outliers not yet put in their place."""
        return denormalise(self.levels(encoded.codes), *self.ranges(encoded))


@dataclass(frozen=True)
class ChannelQuantizer(FedBack):
    """Static ranges, one per channel: `scale` and `zero`, `[C]` float32; beyond them lie the outliers."""

    codebook: Codebook
    scale: Tensor
    zero: Tensor
    feedback: Feedback | None = None

    def coded(self, x: Tensor) -> tuple[Encoded, Tensor]:
        """See `FedBack`; outliers are what lies beyond the channel's range."""
        x = x.float()
        normalised = normalise(x, self.scale, self.zero)
        outliers = self._outliers(normalised)
        if self.feedback is None:
            codes, targets = self.codebook.encode(normalised), x
        else:
            codes, targets = self.feedback.encode(x, outliers, self.scale, self.zero, self._books)
        return Encoded(codes, outliers, kept_exactly(targets, outliers)), targets

    def _outliers(self, normalised: Tensor) -> Tensor | None:
        if not self.scheme.outliers:
            return None
        distance = normalised.abs()
        outliers = distance > 1
        if self.scheme.outlier_cap is None:
            return outliers
        return cap_outliers(outliers, distance, self.scheme.outlier_cap)

    @cached_property
    def _books(self) -> ChannelBooks:
        return ChannelBooks.shared(self.codebook, len(self.scale))

    def levels(self, codes: Tensor) -> Tensor:
        """See `FedBack`."""
        return self.codebook.decode(codes)

    def ranges(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """See `FedBack`."""
        return self.scale, self.zero

    @property
    def tables(self) -> dict[str, Tensor]:
        """The fitted tensors, by the name they have in the artefact."""
        ranges = {"scale": self.scale, "zero": self.zero}
        return {**codebook_tables(self.codebook), **ranges, **feedback_tables(self.feedback)}


@dataclass(frozen=True)
class TokenQuantizer(FedBack):
    """Dynamic ranges: each token's own, from the elements that are left when its outliers are set aside.

    `thresholds` `[2]` float32 are those of a layer's whole matrix, where the scheme wants such. With a `part` of the heads,
    C are the channels of these; ranges and outliers are those of the token in all heads, which is gathered.
    """

    codebook: Codebook
    thresholds: Tensor | None = None
    feedback: Feedback | None = None
    part: Part = WHOLE

    def coded(self, x: Tensor) -> tuple[Encoded, Tensor]:
        """`encode(x)`, and the targets float32 `[..., T, C]` whose codes these are."""
        whole = x if self.part.is_whole else gathered_heads(x, self.part, -1)
        outliers, scale, zero = token_range(whole.float(), self.scheme.outliers, self.thresholds)
        x = x.float()
        if outliers is not None:
            outliers = outliers[..., self.part.of(whole.shape[-1])]
        # the fp16 numbers as stored, so that encoding and decoding divide and multiply by the same
        ranges = scale.float(), zero.float()
        if self.feedback is None:
            codes, targets = self.codebook.encode(normalise(x, *ranges)), x
        else:
            codes, targets = self.feedback.encode(x, outliers, *ranges, self._books)
        return Encoded(codes, outliers, kept_exactly(targets, outliers), scale, zero), targets

    @cached_property
    def _books(self) -> ChannelBooks:
        assert self.feedback is not None
        return ChannelBooks.shared(self.codebook, self.feedback.order.numel())

    def levels(self, codes: Tensor) -> Tensor:
        """See `FedBack`."""
        return self.codebook.decode(codes)

    def ranges(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """See `FedBack`."""
        assert encoded.scale is not None and encoded.zero is not None
        return encoded.scale.float(), encoded.zero.float()

    @property
    def tables(self) -> dict[str, Tensor]:
        """The fitted tensors, by the name they have in the artefact."""
        matrix = {} if self.thresholds is None else {"thresholds": self.thresholds}
        return {**codebook_tables(self.codebook), **matrix, **feedback_tables(self.feedback)}


def keeps_outliers(quantizer: Quantizer) -> bool:
    """Whether lists of outliers exist at all."""
    return bool(quantizer.scheme.outliers)


def code_bits(quantizer: Quantizer, channels: int) -> int:
    """Bits of the codes of one token of C channels."""
    return sum(
        width * (channels if isinstance(chosen, slice) else len(chosen)) for width, chosen in quantizer.channels.items()
    )


def token_range(x: Tensor, share: float, thresholds: Tensor | None = None) -> tuple[Tensor | None, Tensor, Tensor]:
    """(outlier mask or None, scale, zero) of each token of float32 `x`, `[..., T, C]`.

    Scale and zero are fp16 `[..., T, 1]`: half the width and the centre of what remains without the outliers, which
    lie beyond the `thresholds` (low, high) if there are any, else are the share's most extreme.
    """
    outliers = None
    highest = lowest = x
    if thresholds is not None:
        outliers = (x < thresholds[0]) | (x > thresholds[1])
    elif share:
        outliers = extreme_elements(x, outliers_per_end(x.shape[-1], share))
    if outliers is not None:
        highest, lowest = x.masked_fill(outliers, -torch.inf), x.masked_fill(outliers, torch.inf)
    high, low = highest.amax(-1, keepdim=True), lowest.amin(-1, keepdim=True)
    nothing_left = high < low
    high, low = high.masked_fill(nothing_left, 0.0), low.masked_fill(nothing_left, 0.0)
    return outliers, as_stored((high - low) / 2), as_stored((high + low) / 2)


def kept_exactly(targets: Tensor, outliers: Tensor | None) -> Tensor | None:
    """What is stored of outliers, `[N]` fp16 in row-major order of their mask; None if there is none."""
    return None if outliers is None else as_stored(targets[outliers])


def feedback_tables(feedback: Feedback | None) -> dict[str, Tensor]:
    """The tensors of a feedback, if there is one, by the name they have in the artefact."""
    return {} if feedback is None else feedback.tables


def codebook_tables(codebook: Codebook) -> dict[str, Tensor]:
    """The tensors of a codebook, by the name they have in the artefact."""
    return {"levels": codebook.levels, "boundaries": codebook.boundaries}
