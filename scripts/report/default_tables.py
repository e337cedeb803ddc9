"""The tables behind the default scheme: sparse or dense, and what a recent window buys. Each is a header and lines of cells."""

import re
from collections.abc import Sequence
from typing import Any

from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS, FP16_BITS

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

_OUTLIERS = {0.0: "none", 0.005: "at most 0.5 %", 0.04: "free (at most 4 %)"}
_SHAPES = ("llama-7b", "llama-3-8b")
_CONTEXTS = {"4K": 1 << 12, "128K": 1 << 17}


def sparse_table(simulated: Sequence[Row], timed: Sequence[Row]) -> Table:
    """Budgets and outliers of rdnuq with feedback: simulated loss beside the time of a decode step's attention.

    `timed` rows are of schemes without feedback, which changes what is stored and not how it is read.
    """
    times = {(row["scheme"], row["shape"]): op for row in timed for op in row["ops"] if op["op"] == "decode"}
    lines = []
    for row in sorted(simulated, key=lambda row: _budget(row["scheme"])):
        scheme = Scheme.parse(row["scheme"])
        increase = row["nll"] - row["baseline_nll"]
        what = [f"{scheme.bits:g}", _OUTLIERS[scheme.outliers], f"{row['bits_per_element']:.2f}"]
        steps = [times.get((row["scheme"].removesuffix("+fb"), shape)) for shape in _SHAPES]
        shown = [f"{step['us']:.0f} ({step['speedup']:.2f}x)" if step else "" for step in steps]
        lines.append([*what, f"{increase:+.4f}", f"{row['kl']:.4f}", *shown])
    return ["bits asked", "outliers", "bits stored", "NLL increase", "KL", *(f"{name}, us" for name in _SHAPES)], lines


def _budget(name: str) -> tuple[float, float]:
    scheme = Scheme.parse(name)
    return scheme.bits, scheme.outliers


def window_table(rows: Sequence[Row]) -> Table:
    """Sinks and recent tokens kept exact: simulated loss, and bits per element at two lengths of context."""
    lines = []
    for row in rows:
        scheme = parsed(row["scheme"])
        bits = [f"{bits_at(row, scheme, tokens):.3f}" for tokens in _CONTEXTS.values()]
        loss = [f"{row['nll'] - row['baseline_nll']:+.4f}", f"{row['kl']:.4f}", f"{100 * row['top1_agreement']:.1f} %"]
        lines.append([row["scheme"].split()[0], str(scheme.sink_tokens), str(scheme.residual_tokens), *bits, *loss])
    header = ["scheme", "sinks", "recent tokens", *(f"bits at {name}" for name in _CONTEXTS)]
    return [*header, "NLL increase", "KL", "top-1 agreement"], lines


def parsed(described: str) -> Scheme:
    """The scheme of `nuq2+fb sink_tokens=32 residual_tokens=128`: a name and whole numbers."""
    name, *departures = described.split()
    numbers = [re.fullmatch(r"(\w+)=(\d+)", one) for one in departures]
    return Scheme.parse(name, **{one[1]: int(one[2]) for one in numbers if one})


def bits_at(row: Row, scheme: Scheme, tokens: int) -> float:
    """Bits per element of a context of `tokens`, its exact tokens and the unused slots of its last block included.

    A slot takes what it took in the windows that the row is of.
    """
    seqlen, exact = row["seqlen"], scheme.exact_tokens * FP16_BITS
    slot = (row["bits_per_element"] * seqlen - exact) / _slots(seqlen - scheme.exact_tokens)
    return float(slot * _slots(tokens - scheme.exact_tokens) + exact) / tokens


def _slots(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
