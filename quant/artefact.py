"""`quantizers.safetensors`: everything evaluation and deployment need, and nothing to repeat on a command line.

Tensors: `layers.{i}.key.{levels,boundaries,scale,zero}`, `layers.{i}.value.{levels,boundaries}` (scale and zero
wherever the axis is channel-wise); for rdnuq `widths`, `scale`, `zero`, `levels.{b}`, `boundaries.{b}`, and `places`, the
channels of its groups; `thresholds` of a matrix; `rotation` of rotated head vectors; `order` and `feedback` where errors are handed on. Metadata, one JSON object: schema version, the scheme, the layers that
depart from it, the model's fingerprint, the digest of the records, package versions. Nothing is ever unpickled.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from gradients.checked import Artefact, CheckedFile, Expected, open_checked, require_own_place, write_checked
from gradients.cli import UserError, note
from gradients.fingerprint import Fingerprint
from gradients.loading import LoadedModel
from gradients.models import KINDS, Kind
from quant.codebook import Codebook
from quant.feedback import Feedback
from quant.grouped import GroupQuantizer
from quant.grouping import are_groups, units_of
from quant.mixed import MixedQuantizer
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.rotated import RotatedQuantizer
from quant.scheme import GROUP_CHANNELS, MAX_BITS, Axis, Scheme

SCHEMA = 2  # 1 had no digest, and knew neither the weights nor bos
FILE = Artefact("quantizers file", "kvquant", SCHEMA, "fit them again with `python -m quant.fit`")


@dataclass(frozen=True, kw_only=True)
class Quantizers:
    """The fitted quantizers of a model: `layers[i]["key" | "value"]` for every cached layer i."""

    scheme: Scheme
    fingerprint: Fingerprint
    records_digest: str
    layers: dict[int, dict[Kind, Quantizer]]
    weights: str = ""  # digest of the weights that were recorded; empty where it is not known
    bos: bool | None = None  # whether they were calibrated on windows that begin with <bos>; None where it is not known

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise `UserError` unless they were fitted for a model of this config."""
        difference = self.fingerprint.difference(Fingerprint.of(config))
        if difference:
            raise UserError(
                f"quantizers were fitted for another model: {difference}; record and fit for this model, or give --model the other (and the same --max-positions)"
            )

    def check_run(self, loaded: LoadedModel, bos: bool | None = None) -> None:
        """Raise `UserError` for another model; say what differs otherwise: its weights, and whether texts begin with <bos>."""
        self.check_model(loaded.model.config)
        if self.weights and self.weights != loaded.weights:
            note(
                f"{self.scheme.describe()} was fitted to other weights (digest {self.weights}) than those of model "
                f"{loaded.name!r} ({loaded.weights}); record and fit for these, unless that is what you want to measure"
            )
        if None not in (bos, self.bos) and self.bos != bos:
            recorded, evaluated = ("with" if has else "without" for has in (self.bos, bos))
            note(
                f"{self.scheme.describe()} was calibrated on windows {recorded} <bos>, and is evaluated {evaluated} it; "
                f"give {'--bos' if self.bos else '--no-bos'}, or record again"
            )

    def check_packable(self) -> None:
        """Raise `UserError` when a scheme of theirs exists in simulation only."""
        self.scheme.check_packable()
        for sides in self.layers.values():
            for quantizer in sides.values():
                quantizer.scheme.check_packable()

    def with_exact(self, sink_tokens: int | None = None, residual_tokens: int | None = None) -> "Quantizers":
        """The same for other sinks and another recent window; None leaves them as they are.

        Nothing is fitted to a window, and sinks are merely left out when quantizers are fitted. Raises `UserError` for a
        negative number.
        """
        asked = {"sink_tokens": sink_tokens, "residual_tokens": residual_tokens}
        changes = {name: tokens for name, tokens in asked.items() if tokens not in (None, getattr(self.scheme, name))}
        if not changes:
            return self
        layers: dict[int, dict[Kind, Quantizer]] = {
            layer: {
                kind: replace(quantizer, scheme=quantizer.scheme.with_changes(**changes))
                for kind, quantizer in sides.items()
            }
            for layer, sides in self.layers.items()
        }
        return replace(self, scheme=self.scheme.with_changes(**changes), layers=layers)

    def save(self, path: str | Path) -> None:
        """Write the artefact atomically. Raises `UserError` where it cannot be, or would take the place of another file."""
        require_own_place(path, FILE)
        tensors = {
            f"layers.{layer}.{kind}.{name}": table.clone(
                memory_format=torch.contiguous_format
            )  # layers may share a table, files may not
            for layer, sides in self.layers.items()
            for kind, quantizer in sides.items()
            for name, table in quantizer.tables.items()
        }
        departures = {
            f"{layer}.{kind}": quantizer.scheme.to_json()
            for layer, sides in self.layers.items()
            for kind, quantizer in sides.items()
            if quantizer.scheme != self.scheme
        }
        content = {
            "scheme": self.scheme.to_json(),
            "layer_schemes": departures,
            "fingerprint": self.fingerprint.to_json(),
            "records": self.records_digest,
            "weights": self.weights,
            "bos": self.bos,
            "versions": {package: version(package) for package in ("torch", "transformers")},
        }
        write_checked(path, FILE, content, tensors)


def load_quantizers(path: str | Path) -> Quantizers:
    """Read an artefact.

    Raises `UserError` when it is missing, not safetensors (a pickle, say), damaged, altered, of another schema, or when
    layers or tensors are missing, too many, or do not fit its scheme.
    """
    with open_checked(path, FILE) as file:
        content, old = file.content, not file.has_digest
        scheme = Scheme.from_json(content["scheme"], old)
        fingerprint = Fingerprint.from_json(content["fingerprint"])
        places = [(layer, kind) for layer in fingerprint.cached_layers for kind in KINDS]
        schemes = {place: _scheme_of(content, scheme, *place, old) for place in places}
        tables = _read_tables(file, schemes, fingerprint)
        layers: dict[int, dict[Kind, Quantizer]] = {layer: {} for layer in fingerprint.cached_layers}
        for (layer, kind), own in schemes.items():
            layers[layer][kind] = assemble(own, axis_of(own, kind), tables[layer, kind])
            check_groups(layers[layer][kind], kind, fingerprint, f"layers.{layer}.{kind}.places")
        weights, bos = ("", None) if old else (content["weights"], content["bos"])
        if not isinstance(weights, str) or bos not in (None, False, True) or not isinstance(content["records"], str):
            raise ValueError("fields weights, bos and records are not a text, a boolean and a text")
    if old:
        note(
            f"quantizers file {str(path)!r} is of an older version: it has no digest, and does not say of which weights it is"
        )
    return Quantizers(
        scheme=scheme,
        fingerprint=fingerprint,
        records_digest=content["records"],
        layers=layers,
        weights=weights,
        bos=bos,
    )


def axis_of(scheme: Scheme, kind: Kind) -> Axis:
    """The axis along which a scheme quantizes keys or values."""
    return scheme.key_axis if kind == "key" else scheme.value_axis


def check_groups(quantizer: Quantizer, kind: Kind, fingerprint: Fingerprint, name: str) -> None:
    """Raise ValueError unless the groups of rdnuq, if it has any, hold every channel once, rotary pairs together, and one width each."""
    places = getattr(quantizer, "places", None)
    if places is None:
        return
    assert isinstance(quantizer, MixedQuantizer)
    units = units_of(kind, fingerprint.heads, fingerprint.head_dim, fingerprint.rotary_half)
    if units is None or not are_groups(places.numpy(), units[0]):
        raise ValueError(
            f"{name} is no permutation of each head's channels with the two of a rotary pair of keys together"
        )
    widths = quantizer.widths.view(places.shape).gather(1, places.long()).unflatten(1, (-1, GROUP_CHANNELS))
    if (widths != widths[..., :1]).any():
        raise ValueError(f"{name} has groups whose channels differ in width")


def _scheme_of(content: dict[str, Any], default: Scheme, layer: int, kind: Kind, old: bool) -> Scheme:
    departure = content["layer_schemes"].get(f"{layer}.{kind}")
    scheme = Scheme.from_json(departure, old) if departure is not None else default
    for name in ("sink_tokens", "residual_tokens", "key_rope"):  # what is exact, and where, does not vary by layer
        if getattr(scheme, name) != getattr(default, name):
            raise ValueError(
                f"layer {layer} {kind} has {name} {getattr(scheme, name)}, the model {getattr(default, name)}"
            )
    return scheme


def expected_tables(scheme: Scheme, kind: Kind, fingerprint: Fingerprint, widths: Iterable[int]) -> dict[str, Expected]:
    """The tensors of a layer's keys or values; `widths` are those rdnuq has chosen."""
    heads, dim = fingerprint.heads, fingerprint.head_dim
    form, channel = scheme.form(axis_of(scheme, kind)), Expected((heads * dim,), torch.float32)
    codebooks = {f".{width}": 2**width for width in widths} if form == "allocated" else {"": scheme.levels}
    tables = {}
    for suffix, levels in codebooks.items():
        tables[f"levels{suffix}"] = Expected((levels,), torch.float32)
        tables[f"boundaries{suffix}"] = Expected((levels - 1,), torch.float32)
    if form in ("static", "allocated"):
        tables |= {"scale": channel, "zero": channel}
    if form == "allocated":
        tables["widths"] = Expected((heads * dim,), torch.uint8)
        if scheme.groups > 1 and units_of(kind, heads, dim, fingerprint.rotary_half) is not None:
            tables["places"] = Expected((heads, dim), torch.uint8)
    if form == "rotated":
        tables["rotation"] = Expected((dim, dim), torch.float32)
    if form == "token" and scheme.thresholds == "matrix":
        tables["thresholds"] = Expected((2,), torch.float32)
    if scheme.feedback:
        tables["order"] = Expected((heads, dim), torch.uint8)
        tables["feedback"] = Expected((heads, dim, dim), torch.float16)
    return tables


def _read_tables(
    file: CheckedFile, schemes: dict[tuple[int, Kind], Scheme], fingerprint: Fingerprint
) -> dict[tuple[int, Kind], dict[str, Tensor]]:
    """Every table by layer and kind. Raises `UserError` for others than the schemes need, and for numbers not finite."""
    expected: dict[str, Expected] = {}
    named: dict[tuple[int, Kind], list[str]] = {}
    for (layer, kind), scheme in schemes.items():
        prefix, widths = f"layers.{layer}.{kind}.", []
        if scheme.allocated:
            channels = Expected((fingerprint.heads * fingerprint.head_dim,), torch.uint8)
            widths = sorted(set(file.read(f"{prefix}widths", channels).tolist()))
        if widths and widths[-1] > MAX_BITS:
            raise file.error(f"has a channel of {widths[-1]} bits in {prefix}widths, more than {MAX_BITS}")
        tables = expected_tables(scheme, kind, fingerprint, widths)
        named[layer, kind] = list(tables)
        expected |= {prefix + name: table for name, table in tables.items()}
    file.require(expected)
    read = {name: file.read(name, wanted) for name, wanted in expected.items()}
    for name, table in read.items():
        if not table.isfinite().all():
            raise file.error(f"has tensor {name} with numbers that are not finite")
    return {
        place: {name: read[f"layers.{place[0]}.{place[1]}.{name}"] for name in names} for place, names in named.items()
    }


def assemble(scheme: Scheme, axis: Axis, tables: dict[str, Tensor]) -> Quantizer:
    """The quantizer that has these tables, which are used up. `tables` are as of `expected_tables`."""
    form = scheme.form(axis)
    feedback = Feedback(tables.pop("order").long(), tables.pop("feedback")) if scheme.feedback else None
    if form == "allocated":
        widths = sorted(set(tables["widths"].tolist()))
        codebooks = {width: Codebook(tables[f"levels.{width}"], tables[f"boundaries.{width}"]) for width in widths}
        return MixedQuantizer(
            scheme, codebooks, tables["widths"], tables["scale"], tables["zero"], feedback, tables.get("places")
        )
    codebook = Codebook(tables.pop("levels"), tables.pop("boundaries"))
    if form == "grouped":
        return GroupQuantizer(scheme, codebook, axis)
    if form == "rotated":
        return RotatedQuantizer(scheme, codebook, **tables)
    if form == "static":
        return ChannelQuantizer(scheme, codebook, **tables, feedback=feedback)
    return TokenQuantizer(scheme, codebook, tables.get("thresholds"), feedback)
