"""A `Scheme` is what we ask for: `"nuq3-1%"` and a few named fields, every default being the paper's.

`{int|nf|nuq}{bits}` names the datatype, `-P%` the share of elements kept exactly (dense-and-sparse). Ours is
`rdnuq{budget}`, such as `rdnuq2.4`: nuq whose bits and outliers are allocated channel by channel (`quant/allocate.py`)
so that an element takes 2.4 bits on average, outliers included. A fitted
quantizer (`quant/quantizer.py`) is what calibration made of it; `quant/fit.py` is the only bridge.
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from gradients.cli import UserError

Datatype = Literal["int", "nf", "nuq", "rdnuq"]
Axis = Literal["channel", "token"]
Weights = Literal["fisher*s^2", "fisher", "none"]
Rope = Literal["pre"]

MAX_BITS = 8  # codes are bytes before they are packed
MAX_OUTLIER_SHARE = 0.1

_NAME = re.compile(r"(?P<datatype>[a-z]+)(?P<bits>\d+(?:\.\d+)?)(?:-(?P<percent>\d+(?:\.\d+)?)%)?")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A quantization recipe for the keys and values of a model, or of one of its layers.

    Fields:
        datatype: evenly spaced (int), NormalFloat (nf) or fitted (nuq) levels; rdnuq allocates.
        bits: per code, a whole number; for rdnuq the mean bits stored per element.
        outliers: share of elements stored exactly; thresholds per channel or token, half at each end (section 3.4).
        sink_tokens: first tokens of a sequence kept in fp16 (attention sinks, section 3.5).
        q_norm: shift and stretch the levels to keep mean and deviation (Q-Norm of the paper's first versions).
        weights: of the k-means behind nuq. `fisher*s^2` is Eq. 7; `fisher` is what the original's code does.
        key_axis, value_axis: whether one static scale serves a channel, or one dynamic scale a token (section 3.1).
        key_rope: the side of the rotary embedding on which keys are quantized (section 3.2).
        outlier_cap: at most so many outliers per token on a channel-wise axis, None for no limit.
    """

    datatype: Datatype
    bits: float
    outliers: float = 0.0
    sink_tokens: int = 1
    q_norm: bool = False
    weights: Weights = "fisher*s^2"
    key_axis: Axis = "channel"
    value_axis: Axis = "token"
    key_rope: Rope = "pre"
    outlier_cap: int | None = None

    def __post_init__(self) -> None:
        allowed = {"datatype": Datatype, "weights": Weights, "key_axis": Axis, "value_axis": Axis, "key_rope": Rope}
        for name, literal in allowed.items():
            if getattr(self, name) not in get_args(literal):
                raise UserError(
                    f"scheme {name} {getattr(self, name)!r} is unknown; use one of {', '.join(get_args(literal))}"
                )
        if not 1 <= self.bits <= MAX_BITS:
            raise UserError(f"scheme bits {self.bits:g} is not within 1-{MAX_BITS}")
        if self.allocated and (self.outliers or self.q_norm or self.outlier_cap is not None):
            raise UserError(f"scheme {self} allocates its outliers itself: drop -P%, q_norm and outlier_cap")
        if not self.allocated and self.bits != int(self.bits):
            raise UserError(
                f"scheme bits {self.bits:g} is not a whole number, as {self.datatype} needs; rdnuq takes fractions"
            )
        if not 0 <= self.outliers <= MAX_OUTLIER_SHARE:
            raise UserError(f"scheme outlier share {self.outliers:.2%} is not within 0-{MAX_OUTLIER_SHARE:.0%}")
        if self.sink_tokens < 0:
            raise UserError(f"scheme sink_tokens {self.sink_tokens} is negative; use 0 for none")
        if self.outlier_cap is not None and self.outlier_cap < 0:
            raise UserError(f"scheme outlier_cap {self.outlier_cap} is negative; use None for no limit")

    @classmethod
    def parse(cls, name: str, **options: Any) -> "Scheme":
        """`Scheme.parse("nuq3-1%", sink_tokens=5)`. Raises `UserError` for a name of another form."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"scheme {name!r} is not of the form {{int|nf|nuq}}BITS[-P%], such as nuq3-1% or int4, nor rdnuqBUDGET, such as rdnuq2.4"
            )
        share = float(match["percent"] or 0) / 100
        return cls(datatype=match["datatype"], bits=float(match["bits"]), outliers=share, **options)  # type: ignore[arg-type]

    def __str__(self) -> str:
        share = f"-{self.outliers * 100:g}%" if self.outliers else ""
        return f"{self.datatype}{self.bits:g}{share}"

    @property
    def allocated(self) -> bool:
        """Whether bits and outliers are allocated channel by channel."""
        return self.datatype == "rdnuq"

    @property
    def levels(self) -> int:
        """L = 2^bits."""
        return 2 ** int(self.bits)

    def describe(self) -> str:
        """The name, then every field that departs from the default: `nuq2-1% sink_tokens=5 q_norm=True`."""
        named = {"datatype", "bits", "outliers"}
        departures = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if field.name not in named and getattr(self, field.name) != field.default
        ]
        return " ".join([str(self), *departures])

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Scheme":
        """Inverse of `to_json`. Raises `UserError` for a field this version does not know."""
        unknown = set(content) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"scheme field {sorted(unknown)[0]!r} is unknown to this version; update it, or fit again")
        return cls(**content)

    def with_changes(self, **changes: Any) -> "Scheme":
        """A copy with some fields replaced, for layers that depart from the rest."""
        return replace(self, **changes)
