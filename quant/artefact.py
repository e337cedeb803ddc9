"""`quantizers.safetensors`: everything evaluation and deployment need, and nothing to repeat on a command line.

Tensors: `layers.{i}.key.{levels,boundaries,scale,zero}`, `layers.{i}.value.{levels,boundaries}` (scale and zero
wherever the axis is channel-wise); for rdnuq `widths`, `scale`, `zero`, `levels.{b}`, `boundaries.{b}`; `thresholds` of
a matrix; `rotation` of rotated head vectors; `order` and `feedback` where errors are handed on. Metadata, one JSON object: schema version, the scheme, the layers that
depart from it, the model's fingerprint, the digest of the records, package versions. Nothing is ever unpickled.
"""

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from gradients.atomic import atomic_write
from gradients.cli import UserError
from gradients.fingerprint import Fingerprint, canonical_json
from gradients.models import KINDS, Kind
from quant.codebook import Codebook
from quant.feedback import Feedback
from quant.grouped import GroupQuantizer
from quant.mixed import MixedQuantizer
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.rotated import RotatedQuantizer
from quant.scheme import Axis, Scheme

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Quantizers:
    """The fitted quantizers of a model: `layers[i]["key" | "value"]` for every cached layer i."""

    scheme: Scheme
    fingerprint: Fingerprint
    records_digest: str
    layers: dict[int, dict[Kind, Quantizer]]

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise `UserError` unless they were fitted for a model of this config."""
        difference = self.fingerprint.difference(Fingerprint.of(config))
        if difference:
            raise UserError(
                f"quantizers were fitted for another model: {difference}; record and fit for this model, or give --model the other (and the same --max-positions)"
            )

    def check_packable(self) -> None:
        """Raise `UserError` when their scheme exists in simulation only."""
        if self.scheme.simulated_only:
            raise UserError(
                f"scheme {self.scheme.describe()} exists in simulation only, to be compared with; deploy one with keys "
                "before RoPE and ranges per channel (calibrated) or per token, such as rdnuq3.4 or nuq3-1%"
            )

    def save(self, path: str | Path) -> None:
        """Write the artefact atomically."""
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
            "schema": SCHEMA,
            "scheme": self.scheme.to_json(),
            "layer_schemes": departures,
            "fingerprint": self.fingerprint.to_json(),
            "records": self.records_digest,
            "versions": {package: version(package) for package in ("torch", "transformers")},
        }
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"kvquant": canonical_json(content)})


def load_quantizers(path: str | Path) -> Quantizers:
    """Read an artefact.

    Raises `UserError` when it is missing, not safetensors (a pickle, say), damaged, of another schema, or when
    layers or tensors are missing or do not fit its scheme.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except OSError as error:
        raise UserError(
            f"quantizers {str(path)!r} cannot be read ({error}); make them with `python -m quant.fit`"
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"quantizers {str(path)!r} are not a complete safetensors file ({error}); pickles are never loaded: "
            "make them with `python -m quant.fit`"
        ) from error
    if "kvquant" not in metadata:
        raise UserError(
            f"quantizers {str(path)!r} lack our metadata: some other safetensors file; use one that `python -m quant.fit` wrote"
        )
    try:
        return _parse(path, json.loads(metadata["kvquant"]), tensors)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"quantizers {str(path)!r} are damaged ({error!r}); fit them again") from error


def _parse(path: str | Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> Quantizers:
    if content.get("schema") != SCHEMA:
        raise UserError(
            f"quantizers {str(path)!r} have schema {content.get('schema')}, this version reads {SCHEMA}; fit them again"
        )
    scheme, fingerprint = Scheme.from_json(content["scheme"]), Fingerprint.from_json(content["fingerprint"])
    layers: dict[int, dict[Kind, Quantizer]] = {
        layer: {
            kind: _assemble(path, layer, kind, _scheme_of(content, scheme, layer, kind), tensors, fingerprint)
            for kind in KINDS
        }
        for layer in fingerprint.cached_layers
    }
    return Quantizers(scheme=scheme, fingerprint=fingerprint, records_digest=content["records"], layers=layers)


def axis_of(scheme: Scheme, kind: Kind) -> Axis:
    """The axis along which a scheme quantizes keys or values."""
    return scheme.key_axis if kind == "key" else scheme.value_axis


def _scheme_of(content: dict[str, Any], default: Scheme, layer: int, kind: Kind) -> Scheme:
    departure = content["layer_schemes"].get(f"{layer}.{kind}")
    scheme = Scheme.from_json(departure) if departure else default
    for name in ("sink_tokens", "residual_tokens", "key_rope"):  # what is exact, and where, does not vary by layer
        if getattr(scheme, name) != getattr(default, name):
            raise ValueError(
                f"layer {layer} {kind} has {name} {getattr(scheme, name)}, the model {getattr(default, name)}"
            )
    return scheme


def _assemble(
    path: str | Path, layer: int, kind: Kind, scheme: Scheme, tensors: dict[str, Tensor], fingerprint: Fingerprint
) -> Quantizer:
    channels, axis = fingerprint.heads * fingerprint.head_dim, axis_of(scheme, kind)
    form = scheme.form(axis)
    prefix = f"layers.{layer}.{kind}."
    feedback = _assemble_feedback(prefix, tensors, fingerprint) if scheme.feedback else None
    if form == "allocated":
        return _assemble_mixed(prefix, scheme, tensors, channels, feedback)
    shapes: dict[str, tuple[int, ...]] = {"levels": (scheme.levels,), "boundaries": (scheme.levels - 1,)}
    if form == "static":
        shapes |= {"scale": (channels,), "zero": (channels,)}
    if form == "rotated":
        shapes["rotation"] = (fingerprint.head_dim, fingerprint.head_dim)
    if form == "token" and scheme.thresholds == "matrix":
        shapes["thresholds"] = (2,)
    tables = {}
    for name, shape in shapes.items():
        full = f"layers.{layer}.{kind}.{name}"
        if full not in tensors:
            raise UserError(f"quantizers {str(path)!r} lack tensor {full}; fit them again")
        table = tensors[full]
        if tuple(table.shape) != shape or table.dtype != torch.float32 or not table.isfinite().all():
            raise UserError(
                f"quantizers {str(path)!r}: tensor {full} is {tuple(table.shape)} {table.dtype}, expected finite {shape} "
                "float32; fit them again"
            )
        tables[name] = table
    codebook = Codebook(tables.pop("levels"), tables.pop("boundaries"))
    if form == "grouped":
        return GroupQuantizer(scheme, codebook, axis)
    if form == "rotated":
        return RotatedQuantizer(scheme, codebook, **tables)
    return (ChannelQuantizer if form == "static" else TokenQuantizer)(scheme, codebook, **tables, feedback=feedback)


def _assemble_feedback(prefix: str, tensors: dict[str, Tensor], fingerprint: Fingerprint) -> Feedback:
    """Raises KeyError for a missing tensor, ValueError for one that does not fit."""
    order, matrix = tensors[prefix + "order"], tensors[prefix + "feedback"]
    heads, dim = fingerprint.heads, fingerprint.head_dim
    if order.shape != (heads, dim) or order.dtype != torch.uint8 or matrix.dtype != torch.float16:
        raise ValueError(f"{prefix}order is not {heads} x {dim} uint8, or {prefix}feedback not float16")
    try:
        return Feedback(order.long(), matrix)
    except ValueError as error:
        raise ValueError(f"{prefix}feedback: {error}") from error


def _assemble_mixed(
    prefix: str, scheme: Scheme, tensors: dict[str, Tensor], channels: int, feedback: Feedback | None
) -> MixedQuantizer:
    """Raises KeyError for a missing tensor, ValueError for one that does not fit."""
    widths, scale, zero = (tensors[prefix + name] for name in ("widths", "scale", "zero"))
    codebooks = {}
    for width in sorted(set(widths.tolist())):
        codebooks[width] = Codebook(tensors[f"{prefix}levels.{width}"], tensors[f"{prefix}boundaries.{width}"])
        if len(codebooks[width].levels) != 2**width:
            raise ValueError(f"{prefix}levels.{width} has {len(codebooks[width].levels)} levels")
    for name, table in (("widths", widths), ("scale", scale), ("zero", zero)):
        if table.shape != (channels,) or not table.isfinite().all():
            raise ValueError(f"{prefix}{name} is not {channels} finite numbers")
    return MixedQuantizer(scheme, codebooks, widths, scale, zero, feedback)
