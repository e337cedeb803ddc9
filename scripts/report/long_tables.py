"""Cells of the README's tables of long inputs, from rows of `scripts.bench.long`; speeds are per second of processor time."""

from collections.abc import Sequence

from scripts.report.cells import Line, Row, line

_CACHE = {"context": "{context:,}", "cache": "{cache}"}
_SPEED = "tokens_per_cpu_second"


def all_measured(rows: Sequence[Row]) -> list[Line]:
    """Sizes, loss and speeds of the model in bfloat16."""
    columns = _CACHE | {"cache, MB": "{cache_mb:.0f}", "peak, MB": "{peak_mb:.0f}", "NLL": "{nll:.4f}"}
    columns |= {"prefill, tokens/s": f"{{{_SPEED}:.0f}}"}
    found = {(row["context"], row["cache"], row["measured"]): row for row in rows if row["dtype"] == "bfloat16"}
    lines = []
    for context, cache in sorted({key[:2] for key in found}):
        read, decode = (found[context, cache, measured] for measured in ("prefill", "decode"))
        sizes = {"cache_mb": read["cache_bytes"] / 1e6, "peak_mb": read["extra_peak_rss"] / 1e6}
        lines.append(line(columns, read | sizes) | _decoding(decode, list(found.values())))
    return lines


def decoding_in_float32(rows: Sequence[Row]) -> list[Line]:
    """Decoding alone, of the model in float32."""
    chosen = [row for row in rows if (row["dtype"], row["measured"]) == ("float32", "decode")]
    return [line(_CACHE, row) | _decoding(row, chosen) for row in chosen]


def _decoding(row: Row, rows: Sequence[Row]) -> Line:
    beside = [each for each in rows if each["measured"] == "decode" and each["context"] == row["context"]]
    fastest = max(each[_SPEED] for each in beside if each["cache"] in ("hqq4", "quanto4"))
    ratio = f"{row[_SPEED] / fastest:.2f}x"
    return {"decode, tokens/s": f"{row[_SPEED]:.1f}", "of the fastest 4-bit QuantizedCache": ratio}
