"""Long inputs: bytes, peak memory, speed and NLL of the packed cache beside transformers' own, on one text in one run.

    python -m scripts.bench.long --model ./smollm2 --text book.txt --quantizers nuq4.safetensors nuq2.safetensors \
        --contexts 2048 4096 8192 --results scripts/results/long.jsonl

The context is read chunk by chunk; its NLL is that of `deployment.evaluate`. Caches: `DynamicCache`; `QuantizedCache` of quanto and HQQ at 4 and 2 bits, where `optimum-quanto` and `hqq` are
installed; one `PackedCache` for each file of quantizers. Every such measurement has a process of its own, so that the peak of its resident memory (counted from the loaded model on, read
from /proc) is its own.

Decoding is timed side by side: one process holds all caches and gives a token to each in turn, so that all meet the same
machine, whatever else it does. Caches of transformers are filled from one `DynamicCache` there, packed ones by reading the
context. Quoted is one over the median step, which the steps in which a QuantizedCache quantizes anew do not enter. Speeds are
given twice: by the clock on the wall, and per second of processor time (of all threads); with one thread on an idle machine
these are the same.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from gradients.__main__ import add_model_arguments, load_model_from
from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from gradients.loading import LoadedModel
from gradients.text import load_corpus
from quant.artefact import load_quantizers
from quant.evaluate import append_result
from quant.results import results_file
from scripts.bench.fp16_caches import quantized_cache, stored_bytes

BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}  # of QuantizedCache, and the packages they need
OTHERS = ("dynamic", "quanto4", "quanto2", "hqq4", "hqq2")
_WARM_UP = 2  # decode steps that are not counted
_DECODING = "decoding"  # of all caches that follow, side by side


def missing(name: str) -> str:
    """Why a cache of transformers cannot be measured here; nothing if it can."""
    package = BACKENDS.get(name[:-1], "torch")
    try:
        return "" if find_spec(package) else f"{package} is not installed"
    except ModuleNotFoundError:
        return f"{package} is not installed"


def make_cache(name: str, config: PreTrainedConfig, tokens: int) -> Cache:
    """An empty cache: one of `OTHERS`, or that of a file of quantizers."""
    if name == "dynamic":
        return DynamicCache(config=config)
    if name in OTHERS:
        return quantized_cache(name, config)
    return PackedCache(load_quantizers(name), config, capacity=tokens)


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10


def clocks() -> tuple[float, float]:
    """Seconds on the wall, and of processor time."""
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> tuple[float, float]:
    """Both kinds of seconds that have passed."""
    wall, processor = clocks()
    return wall - started[0], processor - started[1]


def way_of(cache: Cache, model: PreTrainedModel) -> AbstractContextManager[None]:
    """What the model must run within."""
    return packed_attention(model) if isinstance(cache, PackedCache) else nullcontext()


def prefill(model: PreTrainedModel, cache: Cache, tokens: Tensor, chunk: int) -> float:
    """Read `tokens` `[1, n]`, `chunk` at a time; returns the sum of their NLLs."""
    nll, context = 0.0, tokens.shape[1]
    with way_of(cache, model):
        for start in range(0, context, chunk):
            end = min(start + chunk, context)
            logits = model(input_ids=tokens[:, start:end], past_key_values=cache).logits[0].float()
            targets = tokens[0, start + 1 : min(end, context - 1) + 1]
            nll += float(torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum"))
            del logits
    return nll


@torch.inference_mode()
def measure(loaded: LoadedModel, name: str, tokens: Tensor, chunk: int) -> dict[str, Any]:
    """Bytes, peak memory, speed and NLL of reading `tokens` `[1, n]` with one cache."""
    model, context = loaded.model, tokens.shape[1]
    cache = make_cache(name, model.config, context)
    model(input_ids=tokens[:, :1], use_cache=False)  # weights are mapped, and resident once they were read
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    started = clocks()
    nll = prefill(model, cache, tokens, chunk) / (context - 1)
    wall, processor = since(started)
    return {
        "measured": "prefill",
        "cache": cache_name(name),
        "context": context,
        "prefill_chunk": chunk,
        "cache_bytes": cache.nbytes() if isinstance(cache, PackedCache) else stored_bytes(cache),
        "extra_peak_rss": resident("VmHWM") - before,
        "model_rss": before,
        "tokens_per_second": round(context / wall, 1),
        "tokens_per_cpu_second": round(context / processor, 1),
        "nll": nll,
        "perplexity": math.exp(nll),
    }


@torch.inference_mode()
def measure_decoding(
    loaded: LoadedModel, names: Sequence[str], tokens: Tensor, steps: int, chunk: int
) -> list[dict[str, Any]]:
    """Speeds of all caches after `tokens` `[1, n]`, of which the last `steps` are decoded."""
    model, context = loaded.model, tokens.shape[1] - steps
    filled = DynamicCache(config=model.config)
    prefill(model, filled, tokens[:, :context], chunk)
    caches = {name: make_cache(name, model.config, tokens.shape[1]) for name in names}
    for cache in caches.values():
        if isinstance(cache, PackedCache):
            prefill(model, cache, tokens[:, :context], chunk)
        else:
            for number, layer in enumerate(filled.layers):
                cache.update(layer.keys, layer.values, number)
    del filled
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for place in range(context, tokens.shape[1]):
        for name, cache in caches.items():
            with way_of(cache, model):
                started = clocks()
                model(input_ids=tokens[:, place : place + 1], past_key_values=cache)
                seconds[name].append(since(started))
    medians = {
        name: [statistics.median(clock) for clock in zip(*each[_WARM_UP:], strict=True)]
        for name, each in seconds.items()
    }
    return [
        {
            "measured": "decode",
            "cache": cache_name(name),
            "context": context,
            "tokens_per_second": round(1 / wall, 2),
            "tokens_per_cpu_second": round(1 / processor, 2),
            "tokens": steps - _WARM_UP,
            "native": os.environ.get("KVQUANT_NATIVE") == "1",
        }
        for name, (wall, processor) in medians.items()
    ]


def cache_name(name: str) -> str:
    """As rows call it: the scheme of a packed cache."""
    return name if name in OTHERS else load_quantizers(name).scheme.describe()


def apart(argv: Sequence[str], names: Sequence[str], context: int) -> list[dict[str, Any]]:
    """`measure` of one cache, or `measure_decoding` of several, in a process of its own.

    Raises `UserError` with what it had to say if it fails.
    """
    command = [sys.executable, "-m", "scripts.bench.long", *argv, "--within", str(context), *names]
    run = subprocess.run(
        command, capture_output=True, text=True, env={"KVQUANT_NATIVE": "1", **os.environ}, check=False
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(names)} at {context} tokens failed: {last}")
    return list(json.loads(run.stdout.splitlines()[-1])["rows"])


def within(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What `apart` asked for; the rows are those that are appended."""
    context, names = int(arguments.within[0]), arguments.within[1:]
    loaded, steps = load_model_from(arguments), arguments.decode + _WARM_UP
    corpus = load_corpus(arguments.text, "evaluation", loaded.tokenizer)
    tokens = corpus.evaluation_windows(context + steps, 1)
    arguments.seqlen = tokens.shape[1]
    if names[0] == _DECODING:
        rows = measure_decoding(loaded, names[1:], tokens, steps, arguments.prefill_chunk)
    else:
        rows = [measure(loaded, names[0], tokens[:, :context], arguments.prefill_chunk)]
    for row in rows:
        append_result(row, loaded, corpus, arguments)
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.bench.long", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--text", required=True, help="wikitext2, c4, ptb, pydoc, or FILE[:START-END] in percent")
    parser.add_argument("--quantizers", nargs="*", default=[], help="files written by `python -m quant.fit`")
    parser.add_argument("--caches", nargs="*", choices=OTHERS, default=OTHERS, help="of transformers (all)")
    parser.add_argument("--contexts", nargs="+", type=positive_int, default=[2048, 4096, 8192])
    parser.add_argument("--decode", type=positive_int, default=16, help="tokens that are timed one by one")
    parser.add_argument("--prefill-chunk", type=positive_int, default=512, help="tokens per forward")
    parser.add_argument("--results", type=results_file, help="append a row per measurement to this JSONL file")
    parser.add_argument("--within", nargs="+", help="context and caches: one measurement, in this process")
    arguments = parser.parse_args(argv)
    if arguments.within:
        return {"benchmark": "long", "rows": within(arguments)}
    given, rows = list(sys.argv[1:] if argv is None else argv), []
    skipped = {name: missing(name) for name in arguments.caches if missing(name)}
    for name, why in skipped.items():
        print(f"{name} is left out: {why}")
    names = [*(name for name in arguments.caches if name not in skipped), *arguments.quantizers]
    for context in arguments.contexts:
        for chosen in (*([name] for name in names), [_DECODING, *names]):
            made = apart(given, chosen, context)
            print(format_table([{key: row[key] for key in row if key != "model_rss"} for row in made]), flush=True)
            rows += made
    return {"benchmark": "long", "rows": rows, "skipped": skipped}


if __name__ == "__main__":
    run_command(main)
