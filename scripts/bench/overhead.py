"""What recording and simulated quantization cost over the plain model: two ways side by side, the median of their ratios.

    python -m scripts.bench.overhead recording --model smollm2/ --text pydoc --results scripts/results/benchmark_recording.jsonl
    python -m scripts.bench.overhead simulation --model smollm2/ --text pydoc --schemes nuq3-1% rdnuq3.4+fb --windows 16 \
        --results scripts/results/benchmark_simulation.jsonl

    recording   forward, loss and backward of a window with frozen parameters, against what stage 1 does with it:
                `record_window` and `Records.write`, checksums and the write to a temporary folder included
    simulation  a forward without a cache, against the same quantized with what was fitted to these windows

Both ways run on each window one right after the other, in alternating order, so that whatever else the machine does falls
on both; a first window is not counted.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradients.__main__ import add_model_arguments, check_seqlen, load_model_from
from gradients.cli import command_parser, format_table, non_negative_int, positive_int, run_command
from gradients.fingerprint import Fingerprint
from gradients.fisher import next_token_loss, record_window
from gradients.loading import LoadedModel
from gradients.manifest import Manifest
from gradients.progress import progress
from gradients.records import Records
from gradients.text import Corpus, load_corpus
from quant.artefact import Quantizers
from quant.evaluate import append_result
from quant.fit import fit
from quant.results import results_file
from quant.scheme import Scheme
from quant.simulate import simulated

Way = Callable[[int, Tensor], object]  # of a window's number and its tokens [S]


def plain_step(loaded: LoadedModel, _: int, tokens: Tensor) -> None:
    """Forward and backward of one window with frozen parameters."""
    with torch.enable_grad():
        embedding = loaded.model.get_input_embeddings()
        tokens = tokens.to(embedding.weight.device)[None]
        embedded = embedding(tokens).requires_grad_()
        next_token_loss(loaded.model(inputs_embeds=embedded, use_cache=False).logits, tokens).backward()


def record_step(loaded: LoadedModel, records: Records, number: int, tokens: Tensor) -> None:
    """What stage 1 does with a window."""
    records.write(number, record_window(loaded.model, tokens))


def forward(loaded: LoadedModel, quantizers: Quantizers | None, _: int, tokens: Tensor) -> None:
    """A forward of one window without a cache."""
    with torch.inference_mode(), nullcontext() if quantizers is None else simulated(loaded.model, quantizers):
        loaded.model(input_ids=tokens[None].to(loaded.device), use_cache=False)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of `work`, an accelerator's queue emptied before and after."""
    _synchronise(device)
    started = time.perf_counter()
    work()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def side_by_side(plain: Way, other: Way, windows: Tensor, device: torch.device, name: str) -> list[tuple[float, float]]:
    """(plain, other) seconds of each of `windows`, `[n, S]`, but the first."""
    pairs = []
    for number, tokens in enumerate(progress(windows, desc=name, unit="window")):
        ways = {"plain": plain, "other": other}
        order = list(ways) if number % 2 else list(reversed(ways))
        seconds = {way: seconds_of(partial(ways[way], number, tokens), device) for way in order}
        pairs.append((seconds["plain"], seconds["other"]))
    return pairs[1:]


def summarise(name: str, pairs: Sequence[tuple[float, float]], seqlen: int) -> dict[str, Any]:
    """Tokens per second of both ways, and other / plain."""
    plain, other = (len(pairs) * seqlen / sum(times) for times in zip(*pairs, strict=True))
    ratios = [other / plain for plain, other in pairs]
    return {
        "benchmark": name,
        "windows": len(pairs),
        "plain_tokens_per_second": round(plain, 1),
        f"{name}_tokens_per_second": round(other, 1),
        "median_ratio": round(statistics.median(ratios), 3),
        "smallest_ratio": round(min(ratios), 3),
        "largest_ratio": round(max(ratios), 3),
    }


def manifest_of(loaded: LoadedModel, corpus: Corpus, arguments: argparse.Namespace) -> Manifest:
    """A manifest for the throw-away records."""
    return Manifest(
        fingerprint=Fingerprint.of(loaded.model.config),
        text=corpus.name,
        token_digest=corpus.digest,
        seqlen=arguments.seqlen,
        windows=arguments.windows + 1,
        moment_windows=arguments.windows + 1,
        seed=arguments.seed,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.bench.overhead", __doc__)
    parser.add_argument("what", choices=["recording", "simulation"])
    add_model_arguments(parser)
    parser.add_argument("--text", required=True, help="wikitext2, c4, ptb, pydoc, or FILE[:START-END] in percent")
    parser.add_argument("--windows", type=positive_int, default=8, help="besides the one that warms up (8)")
    parser.add_argument("--seqlen", type=positive_int, default=512, help="tokens per window (512)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the places the windows are drawn from (0)")
    parser.add_argument("--schemes", nargs="+", default=["nuq3-1%", "nuq3+fb", "rdnuq3.4+fb"], help="of simulation")
    parser.add_argument("--results", type=results_file, help="append the rows to this JSONL file")
    arguments = parser.parse_args(argv)

    schemes = [Scheme.parse(name) for name in arguments.schemes]
    loaded, rows = load_model_from(arguments), []
    check_seqlen(loaded, arguments.seqlen)
    corpus = load_corpus(arguments.text, "calibration", loaded.tokenizer)
    windows = corpus.calibration_windows(arguments.seqlen, arguments.windows + 1, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        records = Records.create(folder, manifest_of(loaded, corpus, arguments))
        record: Way = partial(record_step, loaded, records)
        if arguments.what == "recording":
            pairs = side_by_side(partial(plain_step, loaded), record, windows, loaded.device, "recording")
            rows.append(summarise("recording", pairs, arguments.seqlen))
        else:
            for number, tokens in enumerate(windows):
                record(number, tokens)
            for scheme in schemes:
                ways = (partial(forward, loaded, None), partial(forward, loaded, fit(records, scheme)))
                pairs = side_by_side(*ways, windows, loaded.device, str(scheme))
                rows.append({"scheme": scheme.describe(), **summarise("simulation", pairs, arguments.seqlen)})
    print(format_table(rows))
    for row in rows:
        append_result(row, loaded, corpus, arguments)
    return {"rows": rows}


if __name__ == "__main__":
    run_command(main)
