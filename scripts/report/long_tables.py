"""Cells of the README's tables of long inputs, from rows of `scripts.bench.long`; speeds are per second of processor time."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # header, cells

_DECODING = ["decode, tokens/s", "of the fastest 4-bit QuantizedCache"]
_SPEED = "tokens_per_cpu_second"


def all_measured(rows: Sequence[Row]) -> Table:
    """Sizes, loss and speeds of the model in bfloat16."""
    found = {(row["context"], row["cache"], row["measured"]): row for row in rows if row["dtype"] == "bfloat16"}
    cells = []
    for context, cache in sorted({key[:2] for key in found}):
        read, decode = (found[context, cache, measured] for measured in ("prefill", "decode"))
        sizes = [f"{read[size] / 1e6:.0f}" for size in ("cache_bytes", "extra_peak_rss")]
        speeds = [f"{read[_SPEED]:.0f}", *_decoding(decode, list(found.values()))]
        cells.append([f"{context:,}", cache, *sizes, f"{read['nll']:.4f}", *speeds])
    return ["context", "cache", "cache, MB", "peak, MB", "NLL", "prefill, tokens/s", *_DECODING], cells


def decoding_in_float32(rows: Sequence[Row]) -> Table:
    """Decoding alone, of the model in float32."""
    chosen = [row for row in rows if (row["dtype"], row["measured"]) == ("float32", "decode")]
    return ["context", "cache", *_DECODING], [
        [f"{row['context']:,}", row["cache"], *_decoding(row, chosen)] for row in chosen
    ]


def _decoding(row: Row, rows: Sequence[Row]) -> list[str]:
    beside = [each for each in rows if each["measured"] == "decode" and each["context"] == row["context"]]
    fastest = max(each[_SPEED] for each in beside if each["cache"] in ("hqq4", "quanto4"))
    return [f"{row[_SPEED]:.1f}", f"{row[_SPEED] / fastest:.2f}x"]
