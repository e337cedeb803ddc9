"""Tokens per second and memory of whole models, from our cache and from others.

    python -m scripts.bench.generate --shape llama-7b --contexts 32K 128K --seconds 500 --results results/generate.jsonl
    python -m scripts.bench.generate --shape llama-3-8b --contexts 1M --caches nuq2-1% nuq2 --modes graph --chunks
    python -m scripts.bench.generate --shape tiny --contexts 128 --caches fp16 nuq3-1% --chunks 16     # on a CPU, to try it

The model has random weights of a named shape in fp16, and the cache is full of random tokens from the start
(`"filled": "synthetic"`): neither changes what is timed. A row is one cache at one context and

    decode     greedy steps of one sequence, as they are (`eager`), recorded in a CUDA graph (`graph`; only caches that are
               written in place), and as `model.generate` takes them (`generate`), which records them by itself over a
               packed cache; the peak of allocated memory during them, weights and cache included
    prefill    forwards of a chunk of tokens behind `--prefill-context` others, logits of the last token only; the peak of
               allocated memory, and what `deployment.plan` expects of it: weights, cache, activations

Caches are schemes, such as nuq3-1%, or those of scripts/bench/fp16_caches.py. What runs out of memory, or is not installed,
is a row that says so. Nothing is begun after `--seconds`; rows are written as they are measured.
"""

import argparse
from collections.abc import Sequence

import torch

from deployment.measure.shapes import SHAPES
from deployment.plan import parse_tokens
from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from quant.results import results_file
from quant.scheme import Scheme
from scripts.bench.fp16_caches import NAMES, is_known
from scripts.bench.whole_model import Benchmark, Row

CACHES = ("fp16", "nuq4-1%", "nuq3-1%", "nuq2-1%", "nuq2", "fp16-dynamic", "fp16-static", "hqq4", "quanto4")
MODES = ("eager", "graph", "generate")


def _cache_name(text: str) -> str:
    if not is_known(text):
        try:
            Scheme.parse(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is none of {', '.join(NAMES)}, and no scheme ({error})"
            ) from error
    return text


def _table(rows: Sequence[Row]) -> str:
    """Decode rows and prefill rows, or what came instead."""
    lines = []
    for row in rows:
        cells = {name: row.get(name, "") for name in ("op", "cache", "context", "mode", "chunk", "tokens_per_second")}
        for name in ("cache_bytes", "peak_bytes"):
            cells[name.replace("bytes", "GB")] = round(row[name] / 1e9, 2) if row.get(name) else ""
        lines.append({**cells, "error": row.get("error", "")})
    return format_table(lines) if lines else "no rows"


def main(argv: Sequence[str] | None = None) -> Row:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.bench.generate", __doc__)
    parser.add_argument("--shape", choices=[*SHAPES, "tiny"], default="llama-7b")
    parser.add_argument("--layers", type=positive_int, help="fewer than the model has, to try things")
    parser.add_argument(
        "--caches", type=_cache_name, nargs="+", default=list(CACHES), help=f"schemes, {', '.join(NAMES)}"
    )
    parser.add_argument("--contexts", type=parse_tokens, nargs="+", default=[1 << 15, 1 << 17])
    parser.add_argument("--modes", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument(
        "--chunks", type=positive_int, nargs="*", default=[256, 512, 1024, 2048], help="none: no prefill"
    )
    parser.add_argument("--prefill-context", type=parse_tokens, default=1 << 15, help="tokens before the chunk (32K)")
    parser.add_argument("--seconds", type=float, default=540.0, help="nothing is begun later (540)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=results_file, help="JSONL file to append to")
    rows = Benchmark(parser.parse_args(argv)).run()
    print(_table(rows))
    return {"rows": rows}


if __name__ == "__main__":
    run_command(main)
