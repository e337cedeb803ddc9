"""The tables behind the default scheme: sparse or dense, and what a recent window buys."""

import re
from collections.abc import Sequence

from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS, FP16_BITS
from scripts.report.cells import Line, Row, line, percent

_OUTLIERS = {0.0: "none", 0.005: "at most 0.5 %", 0.04: "free (at most 4 %)"}
_SHAPES = ("llama-7b", "llama-3-8b")
_CONTEXTS = {"4K": 1 << 12, "128K": 1 << 17}


def sparse_table(simulated: Sequence[Row], timed: Sequence[Row]) -> list[Line]:
    """Budgets and outliers of rdnuq with feedback: simulated loss beside the time of a decode step's attention.

    `timed` rows are of schemes without feedback, which changes what is stored and not how it is read.
    """
    columns = {"bits asked": "{bits:g}", "outliers": "{outliers}", "bits stored": "{bits_per_element:.2f}"}
    columns |= {"NLL increase": "{increase:+.4f}", "KL": "{kl:.4f}"}
    times = {(row["scheme"], row["shape"]): op for row in timed for op in row["ops"] if op["op"] == "decode"}
    lines = []
    for row in simulated:
        scheme = Scheme.parse(row["scheme"])
        asked = {"bits": scheme.bits, "outliers": _OUTLIERS[scheme.outliers]}
        steps = {shape: times.get((row["scheme"].removesuffix("+fb"), shape)) for shape in _SHAPES}
        shown = {
            f"{shape}, us": f"{step['us']:.0f} ({step['speedup']:.2f}x)" if step else ""
            for shape, step in steps.items()
        }
        lines.append(line(columns, row | asked, increase=row["nll"] - row["baseline_nll"]) | shown)
    return lines


def window_table(rows: Sequence[Row]) -> list[Line]:
    """Sinks and recent tokens kept exact: simulated loss, and bits per element at two lengths of context."""
    lines = []
    for row in rows:
        scheme = parsed(row["scheme"])
        exact = {"sinks": str(scheme.sink_tokens), "recent tokens": str(scheme.residual_tokens)}
        bits = {f"bits at {name}": f"{bits_at(row, scheme, tokens):.3f}" for name, tokens in _CONTEXTS.items()}
        loss = {"NLL increase": f"{row['nll'] - row['baseline_nll']:+.4f}", "KL": f"{row['kl']:.4f}"}
        agreement = {"top-1 agreement": percent(row["top1_agreement"], ".1%")}
        lines.append({"scheme": row["scheme"].split()[0]} | exact | bits | loss | agreement)
    return lines


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
