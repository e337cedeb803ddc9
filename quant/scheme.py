"""A `Scheme` is what we ask for: `"nuq3-1%"` and a few named fields, every default being the paper's.

`{int|nf|nuq}{bits}` names the datatype, `-P%` the share of elements kept exactly (dense-and-sparse). Ours is
`rdnuq{budget}`, such as `rdnuq2.4`: nuq whose bits are allocated (`quant/allocate.py`) to groups of 16 channels, so that
an element takes 2.4 bits on average. With `-P%` each channel may keep up to that share of its elements exactly, which
the average includes; `rdnuq2.4g1` allocates to every channel on its own. `+fb` behind any of these chooses codes with
error feedback (`quant/feedback.py`). The methods of others, `kivi2` or `flexgen4`, are
names for such fields too (`quant/presets.py`). A fitted quantizer (`quant/quantizer.py`) is what calibration made of
a scheme; `quant/fit.py` is the only bridge.
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from gradients.cli import UserError
from gradients.fields import from_fields
from quant.presets import PRESETS

Datatype = Literal["int", "nf", "nuq", "rdnuq", "lloyd"]
Axis = Literal["channel", "token"]
Weights = Literal["fisher*s^2", "fisher", "none"]
Rope = Literal["pre", "post"]
Range = Literal["offline", "online"]
Thresholds = Literal["vector", "matrix"]
Form = Literal["static", "token", "grouped", "allocated", "rotated"]

_NAMED = ("datatype", "bits", "outliers", "groups", "feedback")  # the fields that a name gives
_ELEMENTWISE = {"static", "token", "allocated"}  # forms whose codes are chosen element by element

MAX_BITS = 8  # codes are bytes before they are packed
MAX_OUTLIER_SHARE = 0.1

GROUP_CHANNELS = 16  # channels that the decode kernel reads as one

_NAME = re.compile(
    r"(?P<datatype>[a-z]+)(?P<bits>\d+(?:\.\d+)?)(?:g(?P<groups>\d+))?(?:-(?P<percent>\d+(?:\.\d+)?)%)?(?P<feedback>\+fb)?"
)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A quantization recipe for the keys and values of a model, or of one of its layers.

    Fields:
        datatype: evenly spaced (int), NormalFloat (nf) or fitted (nuq) levels; rdnuq allocates; lloyd are the best levels
            of a Gaussian, which a random rotation makes of every head vector.
        bits: per code, a whole number; for rdnuq the mean bits stored per element.
        outliers: share of elements stored exactly; thresholds per channel or token, half at each end (section 3.4). For
            rdnuq the most of a channel's, which allocation chooses.
        sink_tokens: first tokens of a sequence kept in fp16 (attention sinks, section 3.5).
        q_norm: shift and stretch the levels to keep mean and deviation (Q-Norm of the paper's first versions).
        weights: of the k-means behind nuq. `fisher*s^2` is Eq. 7; `fisher` is what the original's code does.
        key_axis, value_axis: whether one static scale serves a channel, or one dynamic scale a token (section 3.1).
        channel_range: of a channel-wise axis; `online` takes it from the sequence itself instead of calibration.
        group: elements that share one dynamic range: tokens of a channel, or channels of a token; None for all.
        key_rope: the side of the rotary embedding on which keys are quantized (section 3.2).
        thresholds: beyond which elements are outliers: one pair per channel or token, or one for a layer's matrix.
        outlier_cap: most outliers per token on a channel-wise axis, None for no limit.
        residual_tokens: size of the recent window, the last tokens up to its own that a query sees exactly (KIVI).
        feedback: errors are handed on within a head, by the Fisher matrix that the records hold (quant/feedback.py).
        groups: channels of a KV head that share a width, for rdnuq: 16, or 1.
    """

    datatype: Datatype
    bits: float
    outliers: float = 0.0
    sink_tokens: int = 1
    q_norm: bool = False
    weights: Weights = "fisher*s^2"
    key_axis: Axis = "channel"
    value_axis: Axis = "token"
    channel_range: Range = "offline"
    group: int | None = None
    key_rope: Rope = "pre"
    thresholds: Thresholds = "vector"
    outlier_cap: int | None = None
    residual_tokens: int = 0
    feedback: bool = False
    groups: int = GROUP_CHANNELS

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    def _check_choices(self) -> None:
        for name, literal in _CHOICES.items():
            if getattr(self, name) not in get_args(literal):
                raise UserError(
                    f"scheme {name} {getattr(self, name)!r} is unknown; use one of {', '.join(get_args(literal))}"
                )

    def _check_numbers(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise UserError(f"scheme bits {self.bits:g} is not within 1-{MAX_BITS}")
        if not self.allocated and self.bits != int(self.bits):
            raise UserError(
                f"scheme bits {self.bits:g} is not a whole number, as {self.datatype} needs; rdnuq takes fractions"
            )
        if not 0 <= self.outliers <= MAX_OUTLIER_SHARE:
            raise UserError(f"scheme outlier share {self.outliers:.2%} is not within 0-{MAX_OUTLIER_SHARE:.0%}")
        for name, remedy in (("sink_tokens", "0 for none"), ("residual_tokens", "0 for none")):
            if getattr(self, name) < 0:
                raise UserError(f"scheme {name} {getattr(self, name)} is negative; use {remedy}")
        if self.outlier_cap is not None and self.outlier_cap < 0:
            raise UserError(f"scheme outlier_cap {self.outlier_cap} is negative; use None for no limit")
        if self.groups not in ((1, GROUP_CHANNELS) if self.allocated else (GROUP_CHANNELS,)):
            raise UserError(
                f"scheme groups {self.groups}: rdnuq allocates to groups of {GROUP_CHANNELS} channels, or with g1 to each; "
                "other datatypes have none"
            )
        if self.group is not None and self.group < 2:
            raise UserError(f"scheme group {self.group} is less than 2 elements; use None for one range per vector")

    def _check_combinations(self) -> None:
        dynamic = self.group is not None or self.channel_range == "online"
        if self.allocated and (self.q_norm or self.outlier_cap is not None):
            raise UserError(f"scheme {self} allocates its bits and outliers itself: drop q_norm and outlier_cap")
        if self.allocated and (dynamic or self.thresholds == "matrix" or self.key_axis == "token"):
            raise UserError(
                f"scheme {self} has calibrated ranges per channel: drop group, channel_range, thresholds and key_axis"
            )
        if self.datatype == "lloyd" and (self.outliers or self.q_norm or self.group):
            raise UserError(f"scheme {self} scales whole head vectors: drop -P%, q_norm and group")
        forms = {self.form(self.key_axis), self.form(self.value_axis)}
        if self.feedback and (not forms <= _ELEMENTWISE or self.key_rope == "post"):
            raise UserError(
                f"scheme {self}: error feedback needs codes chosen element by element, and keys before RoPE; drop +fb, or group, "
                "channel_range=online and key_rope=post"
            )
        if self.feedback and self.q_norm:
            raise UserError(f"scheme {self}: error feedback fits its own levels; drop q_norm, or +fb")
        if self.thresholds == "matrix" and (dynamic or not self.outliers):
            raise UserError(
                "scheme thresholds=matrix are calibrated, of outliers: add -P%, drop group and channel_range=online"
            )
        if self.outlier_cap is not None and not self._any_static:
            raise UserError(
                f"scheme outlier_cap {self.outlier_cap} is for calibrated ranges per channel, of which it has none; drop it"
            )

    @property
    def _any_static(self) -> bool:
        return "static" in (self.form(self.key_axis), self.form(self.value_axis))

    @classmethod
    def parse(cls, name: str, **options: Any) -> "Scheme":
        """`Scheme.parse("nuq3-1%", sink_tokens=5)`, `Scheme.parse("kivi2")`.

        Raises `UserError` for a name of another form.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"scheme {name!r} is not of the form {{int|nf|nuq}}BITS[-P%][+fb], such as nuq3-1% or int4+fb, nor "
                f"rdnuqBUDGET[g1][-P%][+fb], such as rdnuq2.4, nor {{{'|'.join(PRESETS)}}}BITS"
            )
        content: dict[str, Any] = {"datatype": match["datatype"], "bits": float(match["bits"])}
        content |= PRESETS.get(match["datatype"], {})
        if match["percent"]:
            content["outliers"] = float(match["percent"]) / 100
        if match["groups"]:
            content["groups"] = int(match["groups"])
        if match["feedback"]:
            content["feedback"] = True
        return cls(**content | options)

    def __str__(self) -> str:
        share = f"-{self.outliers * 100:g}%" if self.outliers else ""
        groups = f"g{self.groups}" if self.groups != GROUP_CHANNELS else ""
        return f"{self.datatype}{self.bits:g}{groups}{share}{'+fb' if self.feedback else ''}"

    @property
    def allocated(self) -> bool:
        """Whether bits are allocated to channels or groups of them."""
        return self.datatype == "rdnuq"

    @property
    def exact_tokens(self) -> int:
        """Of a long text: sinks and recent window, which no code stands for."""
        return self.sink_tokens + self.residual_tokens

    @property
    def levels(self) -> int:
        """L = 2^bits."""
        return 2 ** int(self.bits)

    def form(self, axis: Axis) -> Form:
        """The kind of quantizer this scheme needs on an axis; each has its class."""
        if self.allocated:
            return "allocated"
        if self.datatype == "lloyd":
            return "rotated"
        if axis == "channel" and self.channel_range == "offline":
            return "static"
        return "token" if axis == "token" and self.group is None else "grouped"

    @property
    def simulated_only(self) -> bool:
        """Whether the packed cache cannot hold it: ranges that change with the sequence, or keys after RoPE."""
        forms = {self.form(self.key_axis), self.form(self.value_axis)}
        return bool(forms & {"grouped", "rotated"}) or self.key_rope == "post" or self.thresholds == "matrix"

    def check_packable(self) -> None:
        """Raise `UserError` for one that exists in simulation only."""
        if self.simulated_only:
            raise UserError(
                f"scheme {self.describe()} exists in simulation only, to be compared with; deploy one with keys "
                "before RoPE and ranges per channel (calibrated) or per token, such as rdnuq3.4 or nuq3-1%"
            )

    def residual_step(self, axis: Axis) -> int:
        """How many tokens leave the residual window together: a whole group of them, where groups lie along tokens."""
        return self.group or 1 if axis == "channel" else 1

    def describe(self) -> str:
        """The name, then every field that departs from it: `nuq2-1% sink_tokens=5 q_norm=True`, `kivi2`."""
        described = [[str(self), *self._departures(Scheme(**{name: getattr(self, name) for name in _NAMED}))]]
        for name, preset in PRESETS.items():
            if preset["datatype"] == self.datatype:
                departures = self._departures(Scheme.parse(f"{name}{self.bits:g}"))
                described.append([f"{name}{self.bits:g}", *departures])
        # a preset without its groups is something else: it goes by the plain name
        described = [words for words in described if "group=None" not in words]
        fewest = min(len(words) for words in described)
        return " ".join(next(words for words in described if len(words) == fewest))

    def _departures(self, other: "Scheme") -> list[str]:
        names = [field.name for field in fields(self)]
        changed = [name for name in names if getattr(self, name) != getattr(other, name)]
        return [f"{name}={getattr(self, name)}" for name in changed]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: object, old: bool = False) -> "Scheme":
        """Inverse of `to_json`: every field is there and none is unknown; `old` files lack those that came later.

        Raises ValueError for other content, `UserError` for a scheme that cannot be.
        """
        if isinstance(content, dict) and "groups" not in content:
            content = content | (_BEFORE_GROUPS if content.get("datatype") == "rdnuq" else {"groups": GROUP_CHANNELS})
        return from_fields(cls, content, _LATER_FIELDS if old else ())

    def with_changes(self, **changes: Any) -> "Scheme":
        """A copy with some fields replaced, for layers that depart from the rest."""
        return replace(self, **changes)


# of files without a digest; what they lack of these was the default
_LATER_FIELDS = ("channel_range", "group", "thresholds", "residual_tokens", "feedback")

# what rdnuq was before it had groups: widths of channels, and shares that were its own affair
_BEFORE_GROUPS = {"groups": 1, "outliers": 0.04}

_CHOICES = {
    "datatype": Datatype,
    "weights": Weights,
    "key_axis": Axis,
    "value_axis": Axis,
    "channel_range": Range,
    "key_rope": Rope,
    "thresholds": Thresholds,
}
