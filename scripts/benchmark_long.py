"""Long inputs: bytes, peak memory, speed and NLL of the packed cache beside transformers' own, on one text in one run.

    python -m scripts.benchmark_long --model ./smollm2 --text book.txt --quantizers nuq4.safetensors nuq2.safetensors \
        --contexts 2048 4096 8192 --results scripts/results/long.jsonl

The context is read chunk by chunk, its NLL is that of `deployment.evaluate`, and then some more tokens of the text follow
one by one. Caches: `DynamicCache`; `QuantizedCache` of quanto and HQQ at 4 and 2 bits, where `optimum-quanto` and `hqq` are
installed; one `PackedCache` for each file of quantizers. Every measurement has a process of its own, so that the peak of its
resident memory (counted from the loaded model on, read from /proc) is its own.
Decoding is quoted as one over the median step, which the steps in which a QuantizedCache quantizes anew do not enter.
Speeds are given twice: by the clock on the wall, and per second of processor time (all threads), which on a machine that
others use is the fairer one; with one thread on an idle machine they are the same.
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
from transformers import DynamicCache, PreTrainedConfig, QuantizedCache
from transformers.cache_utils import Cache

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from gradients.__main__ import add_model_arguments, load_model_from
from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from gradients.models import LoadedModel
from gradients.text import load_corpus
from quant.artefact import load_quantizers
from quant.evaluate import append_result

# backend of QuantizedCache -> the package it needs, the axis it groups along
BACKENDS = {"quanto": ("optimum.quanto", 0), "hqq": ("hqq", 1)}
OTHERS = ("dynamic", "quanto4", "quanto2", "hqq4", "hqq2")
_WARM_UP = 2  # decode steps that are not counted


def missing(name: str) -> str:
    """Why a cache of transformers cannot be measured here; nothing if it can."""
    package = BACKENDS.get(name[:-1], ("torch", 0))[0]
    try:
        return "" if find_spec(package) else f"{package} is not installed"
    except ModuleNotFoundError:
        return f"{package} is not installed"


def make_cache(name: str, config: PreTrainedConfig, tokens: int) -> Cache:
    """An empty cache: one of `OTHERS`, or that of a file of quantizers."""
    if name == "dynamic":
        return DynamicCache(config=config)
    if name in OTHERS:
        backend, bits = name[:-1], int(name[-1])
        axis = BACKENDS[backend][1]
        return QuantizedCache(backend, config, nbits=bits, axis_key=axis, axis_value=axis)
    return PackedCache(load_quantizers(name), config, capacity=tokens)


def tensor_bytes(thing: object, seen: set[int]) -> int:
    """Bytes of every tensor that a cache's layers reach, counted once; tensors made of tensors as these."""
    if isinstance(thing, Tensor) and hasattr(thing, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(thing, name), seen) for name in thing.__tensor_flatten__()[0])
    if isinstance(thing, Tensor):
        new = thing.numel() and thing.data_ptr() not in seen
        seen.add(thing.data_ptr())
        return thing.nbytes if new else 0
    if isinstance(thing, dict):
        return sum(tensor_bytes(each, seen) for each in thing.values())
    return sum(tensor_bytes(each, seen) for each in thing) if isinstance(thing, list | tuple) else 0


def cache_bytes(cache: Cache) -> int:
    """What is held for cached tokens."""
    if isinstance(cache, PackedCache):
        return cache.nbytes()
    return tensor_bytes([vars(layer) for layer in cache.layers], set())


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


@torch.inference_mode()
def measure(loaded: LoadedModel, name: str, tokens: Tensor, context: int, chunk: int) -> dict[str, Any]:
    """One cache on `tokens` `[1, context + steps]`."""
    model = loaded.model
    cache = make_cache(name, model.config, tokens.shape[1])
    model(input_ids=tokens[:, :1], use_cache=False)  # weights are mapped, and resident once they were read
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    way: AbstractContextManager[None] = packed_attention(model) if isinstance(cache, PackedCache) else nullcontext()
    with way:
        started, nll = clocks(), 0.0
        for start in range(0, context, chunk):
            end = min(start + chunk, context)
            logits = model(input_ids=tokens[:, start:end], past_key_values=cache).logits[0].float()
            targets = tokens[0, start + 1 : min(end, context - 1) + 1]
            nll += float(torch.nn.functional.cross_entropy(logits[: len(targets)], targets, reduction="sum"))
            del logits
        prefill = since(started)
        nbytes, steps = cache_bytes(cache), []
        for place in range(context, tokens.shape[1]):
            started = clocks()
            model(input_ids=tokens[:, place : place + 1], past_key_values=cache)
            steps.append(since(started))
    step = [statistics.median(clock) for clock in zip(*steps[_WARM_UP:], strict=True)]
    return {
        "cache": cache_name(name),
        "context": context,
        "prefill_chunk": chunk,
        "cache_bytes": nbytes,
        "extra_peak_rss": resident("VmHWM") - before,
        "model_rss": before,
        "prefill_tokens_per_second": round(context / prefill[0], 1),
        "prefill_tokens_per_cpu_second": round(context / prefill[1], 1),
        "decode_tokens_per_second": round(1 / step[0], 2),
        "decode_tokens_per_cpu_second": round(1 / step[1], 2),
        "decode_tokens": len(steps) - _WARM_UP,
        "nll": nll / (context - 1),
        "perplexity": math.exp(nll / (context - 1)),
    }


def cache_name(name: str) -> str:
    """As rows call it: the scheme of a packed cache."""
    return name if name in OTHERS else load_quantizers(name).scheme.describe()


def apart(argv: Sequence[str], name: str, context: int) -> dict[str, Any]:
    """`measure` in a process of its own; raises `UserError` with what it had to say if it fails."""
    command = [sys.executable, "-m", "scripts.benchmark_long", *argv, "--single", name, str(context)]
    run = subprocess.run(
        command, capture_output=True, text=True, env={"KVQUANT_NATIVE": "1", **os.environ}, check=False
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{name} at {context} tokens failed: {last}")
    return dict(json.loads(run.stdout.splitlines()[-1]))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("scripts.benchmark_long", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--text", required=True, help="wikitext2, c4, ptb, pydoc, or FILE[:START-END] in percent")
    parser.add_argument("--quantizers", nargs="*", default=[], help="files written by `python -m quant.fit`")
    parser.add_argument("--caches", nargs="*", choices=OTHERS, default=OTHERS, help="of transformers (all)")
    parser.add_argument("--contexts", nargs="+", type=positive_int, default=[2048, 4096, 8192])
    parser.add_argument("--decode", type=positive_int, default=16, help="tokens that are timed one by one")
    parser.add_argument("--prefill-chunk", type=positive_int, default=512, help="tokens per forward")
    parser.add_argument("--results", help="append a row per measurement to this JSONL file")
    parser.add_argument("--single", nargs=2, metavar=("CACHE", "CONTEXT"), help="one measurement, in this process")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    arguments = parse_arguments(argv)
    if arguments.single:
        name, context = arguments.single[0], int(arguments.single[1])
        loaded = load_model_from(arguments)
        corpus = load_corpus(arguments.text, "evaluation", loaded.tokenizer)
        tokens = corpus.evaluation_windows(context + arguments.decode + _WARM_UP, 1)
        result = measure(loaded, name, tokens, context, arguments.prefill_chunk)
        arguments.seqlen = tokens.shape[1]
        append_result(result, loaded, arguments)
        return result
    given, rows = list(sys.argv[1:] if argv is None else argv), []
    skipped = {name: missing(name) for name in arguments.caches if missing(name)}
    for name, why in skipped.items():
        print(f"{name} is left out: {why}")
    names = [*(name for name in arguments.caches if name not in skipped), *arguments.quantizers]
    for context in arguments.contexts:
        for name in names:
            rows.append(apart(given, name, context))
            print(format_table([{key: rows[-1][key] for key in rows[-1] if key != "model_rss"}]), flush=True)
    return {"benchmark": "long", "rows": rows, "skipped": skipped}


if __name__ == "__main__":
    run_command(main)
