"""Time of a forward with simulated quantization as a ratio to the unquantized one, in one run.

    python -m scripts.bench.simulation --model ./smollm2 --records records/ --schemes nuq3-1% rdnuq3.4 \
        --results scripts/results/benchmark_simulation.jsonl

The two forwards of a pair follow each other on the same random tokens, so that a machine that slows down slows
down both; the median over pairs is reported.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from gradients.__main__ import add_model_arguments, load_model_from
from gradients.cli import command_parser, format_table, positive_int, run_command
from gradients.models import LoadedModel
from gradients.progress import progress
from gradients.records import Records
from quant.artefact import Quantizers
from quant.fit import fit
from quant.results import append_row
from quant.scheme import Scheme
from quant.simulate import simulated


@torch.inference_mode()
def forward_seconds(loaded: LoadedModel, tokens: torch.Tensor, quantizers: Quantizers | None) -> float:
    """Seconds of one forward without a cache."""
    with nullcontext() if quantizers is None else simulated(loaded.model, quantizers):
        started = time.perf_counter()
        loaded.model(input_ids=tokens, use_cache=False).logits.sum().item()
        return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.bench.simulation", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--records", required=True, help="folder written by `python -m gradients`")
    parser.add_argument("--schemes", nargs="+", default=["nuq3-1%", "rdnuq3.4"])
    parser.add_argument("--seqlen", type=positive_int, default=512)
    parser.add_argument("--pairs", type=positive_int, default=15)
    parser.add_argument("--results", help="append a row per scheme to this JSONL file")
    arguments = parser.parse_args(argv)

    loaded, records = load_model_from(arguments), Records.open(arguments.records)
    vocabulary = loaded.model.get_input_embeddings().num_embeddings
    shape = (1, arguments.seqlen)
    tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(loaded.device)
    rows = []
    for name in arguments.schemes:
        quantizers = fit(records, Scheme.parse(name))
        forward_seconds(loaded, tokens, quantizers)  # warms up
        pairs = [
            (forward_seconds(loaded, tokens, None), forward_seconds(loaded, tokens, quantizers))
            for _ in progress(range(arguments.pairs), desc=name, unit="pair")
        ]
        row = {
            "scheme": name,
            "model": Path(arguments.model).name,
            "seqlen": arguments.seqlen,
            "pairs": arguments.pairs,
            "unquantized_seconds": statistics.median(plain for plain, _ in pairs),
            "median_ratio": statistics.median(quantized / plain for plain, quantized in pairs),
        }
        append_row(arguments.results, row)
        rows.append(row)
    print(format_table([{key: row[key] for key in ("scheme", "unquantized_seconds", "median_ratio")} for row in rows]))
    return {"rows": rows}


if __name__ == "__main__":
    run_command(main)
