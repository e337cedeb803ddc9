"""The quantizers of some heads, out of those of all: what a process of a tensor-parallel run needs (gradients/parallel.py).

A table is split if its size depends on the number of heads (`expected_tables`), along its first dimension, which is that
of heads or of channels; codebooks are everybody's. Ranges of channels are then all that a process needs to know. A range
that is the token's own takes the token, all heads of it, which is gathered from the other processes when it is encoded.
"""

from dataclasses import replace

from torch import Tensor

from gradients.cli import UserError
from gradients.fingerprint import Fingerprint
from gradients.models import Kind
from gradients.parallel import Part
from quant.artefact import Quantizers, assemble, axis_of, expected_tables
from quant.quantizer import Quantizer, TokenQuantizer


def own_heads(quantizers: Quantizers, part: Part) -> Quantizers:
    """The quantizers of one part of every layer's heads; they are still those of the whole model, by their fingerprint.

    Raises `UserError` for heads that do not divide, and for a scheme that chooses outliers among all heads of a token
    whose ranges are not the token's own.
    """
    if part.is_whole:
        return quantizers
    part.check_heads(quantizers.fingerprint.heads, "KV heads")
    layers: dict[int, dict[Kind, Quantizer]] = {
        layer: {kind: _own(quantizer, kind, quantizers.fingerprint, part) for kind, quantizer in sides.items()}
        for layer, sides in quantizers.layers.items()
    }
    return replace(quantizers, layers=layers)


def _own(quantizer: Quantizer, kind: Kind, fingerprint: Fingerprint, part: Part) -> Quantizer:
    scheme = quantizer.scheme
    if scheme.outlier_cap is not None:
        raise UserError(
            f"scheme {scheme.describe()} cannot be split by heads: outlier_cap counts a token's outliers in all of them; "
            "fit one without outlier_cap, or drop --tensor-parallel"
        )
    widths = quantizer.tables["widths"].unique().tolist() if scheme.allocated else []
    shapes = [
        {name: table.shape for name, table in expected_tables(scheme, kind, of_part, widths).items()}
        for of_part in (fingerprint, replace(fingerprint, heads=fingerprint.heads // part.count))
    ]

    def own(name: str, table: Tensor) -> Tensor:
        return table[part.of(len(table))].clone() if shapes[0][name] != shapes[1][name] else table

    tables = {name: own(name, table) for name, table in quantizer.tables.items()}
    split = assemble(scheme, axis_of(scheme, kind), tables)
    return replace(split, part=part) if isinstance(split, TokenQuantizer) else split
