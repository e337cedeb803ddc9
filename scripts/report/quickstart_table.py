"""The quickstart's one table: what each scheme costs, and what it saves.

    python -m scripts.report.quickstart_table --records records/ nuq4.json nuq3.json nuq2.json

Each file holds the JSON line of one `python -m quant.evaluate`, all of the same model and text. The first row, the
model with an fp16 cache, comes from the same runs: they score the unquantized model beside the quantized one.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradients.cli import UserError, command_parser, format_table, run_command
from gradients.fingerprint import Fingerprint
from gradients.records import Records
from quant.storage import FP16_BITS


def table_rows(results: Sequence[dict[str, Any]], fingerprint: Fingerprint) -> list[dict[str, Any]]:
    """One row for the unquantized model and one per result; `change_percent` is that of the perplexity."""
    baseline = math.exp(results[0]["baseline_nll"])
    unquantized = {"scheme": "fp16 cache", "bits_per_element": float(FP16_BITS), "perplexity": baseline, "kl": 0.0}
    return [
        {
            "scheme": result["scheme"],
            "bits_per_element": result["bits_per_element"],
            "perplexity": result["perplexity"],
            "change_percent": 100 * (result["perplexity"] / baseline - 1),
            "kl": result["kl"],
            "kilobytes_per_token": result["bits_per_element"] / 8 * elements_per_token(fingerprint) / 1000,
        }
        for result in [unquantized, *results]
    ]


def elements_per_token(fingerprint: Fingerprint) -> int:
    """Keys and values of one token: 2 * layers * G * D."""
    return 2 * len(fingerprint.cached_layers) * fingerprint.heads * fingerprint.head_dim


def shown(row: dict[str, Any]) -> dict[str, str]:
    """A row as it is printed."""
    return {
        "scheme": row["scheme"],
        "bits/element": f"{row['bits_per_element']:.2f}",
        "perplexity": f"{row['perplexity']:.3f}",
        "change": f"{row['change_percent']:+.2f} %",
        "KL (nats)": f"{row['kl']:.4f}",
        "cache KB/token": f"{row['kilobytes_per_token']:.2f}",
    }


def read_result(path: Path) -> dict[str, Any]:
    """The JSON line of a `quant.evaluate`. Raises `UserError` when it is missing or something else."""
    try:
        result = json.loads(path.read_text())
        return {key: result[key] for key in ("scheme", "bits_per_element", "perplexity", "baseline_nll", "kl")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} is not a result of `python -m quant.evaluate` ({error}); run it again"
        ) from error


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.report.quickstart_table", __doc__)
    parser.add_argument(
        "--records", required=True, help="folder written by `python -m gradients`; tells the model's shape"
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON lines of `python -m quant.evaluate`, a file each")
    arguments = parser.parse_args(argv)
    fingerprint = Records.open(arguments.records).manifest.fingerprint
    rows = table_rows([read_result(path) for path in arguments.results], fingerprint)
    print(format_table([shown(row) for row in rows]))
    return {"rows": rows}


if __name__ == "__main__":
    run_command(main)
