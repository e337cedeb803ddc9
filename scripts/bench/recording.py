"""What recording costs over the plain training step it contains.

    python -m scripts.bench.recording --model smollm2/ --text pydoc --windows 8 --seqlen 512
    python -m scripts.bench.recording --model smollm2/ --text pydoc --seqlen 512 --results scripts/results/recording.jsonl

The model is loaded once, its parameters are frozen, and every window is run both ways, one right after the other
and in alternating order, so that whatever else the machine does falls on both:

    plain      forward, mean next-token loss, backward to the embeddings of the window; nothing is kept
    recording  what stage 1 does with a window: `gradients.fisher.record_window` and `Records.write`, with squaring,
               casting, checksums and the write to the disk (a temporary folder)

A first window of each is not counted. The ratio quoted is the median over the windows.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradients.__main__ import add_model_arguments, check_seqlen, load_model_from
from gradients.cli import command_parser, format_table, non_negative_int, positive_int, run_command
from gradients.fingerprint import Fingerprint
from gradients.fisher import next_token_loss, record_window
from gradients.models import LoadedModel
from gradients.progress import progress
from gradients.records import Manifest, Records
from gradients.text import Corpus, load_corpus
from quant.evaluate import append_result


def plain_step(model: PreTrainedModel, tokens: Tensor) -> None:
    """Forward and backward of one window, `[S]` int64, with frozen parameters."""
    with torch.enable_grad():
        embedding = model.get_input_embeddings()
        tokens = tokens.to(embedding.weight.device)[None]
        embedded = embedding(tokens).requires_grad_()
        next_token_loss(model(inputs_embeds=embedded, use_cache=False).logits, tokens).backward()


def record_step(model: PreTrainedModel, tokens: Tensor, records: Records, number: int) -> None:
    """What stage 1 does with window `number`, `[S]` int64."""
    records.write(number, record_window(model, tokens))


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


def measure(loaded: LoadedModel, windows: Tensor, records: Records) -> list[tuple[float, float]]:
    """(plain, recording) seconds of each of `windows`, `[n, S]`; the first only warms up and is left out."""
    pairs = []
    for number, tokens in enumerate(progress(windows, desc="measuring", unit="window")):
        ways = {
            "plain": partial(plain_step, loaded.model, tokens),
            "recording": partial(record_step, loaded.model, tokens, records, number),
        }
        order = list(ways) if number % 2 else list(reversed(ways))
        seconds = {way: seconds_of(ways[way], loaded.device) for way in order}
        pairs.append((seconds["plain"], seconds["recording"]))
    return pairs[1:]


def summarise(pairs: Sequence[tuple[float, float]], seqlen: int) -> dict[str, Any]:
    """Tokens per second of both, and the median of recording / plain."""
    plain, recording = (sum(times) for times in zip(*pairs, strict=True))
    ratios = [recording / plain for plain, recording in pairs]
    return {
        "windows": len(pairs),
        "plain_tokens_per_second": round(len(pairs) * seqlen / plain, 1),
        "recording_tokens_per_second": round(len(pairs) * seqlen / recording, 1),
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
        seed=arguments.seed,
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("scripts.bench.recording", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--text", required=True, help="wikitext2, c4, ptb, pydoc, or FILE[:START-END] in percent")
    parser.add_argument("--windows", type=positive_int, default=8, help="besides the one that warms up")
    parser.add_argument("--seqlen", type=positive_int, default=512, help="tokens per window")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the places the windows are drawn from")
    parser.add_argument("--results", help="append the result as a row to this JSONL file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    arguments = parse_arguments(argv)
    loaded = load_model_from(arguments)
    check_seqlen(loaded, arguments.seqlen)
    corpus = load_corpus(arguments.text, "calibration", loaded.tokenizer)
    windows = corpus.calibration_windows(arguments.seqlen, arguments.windows + 1, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        pairs = measure(loaded, windows, Records.create(folder, manifest_of(loaded, corpus, arguments)))
    print(format_table([{"plain s": p, "recording s": r, "ratio": r / p} for p, r in pairs]))
    result = {
        "benchmark": "recording",
        **summarise(pairs, arguments.seqlen),
    }
    print(
        f"\nplain {result['plain_tokens_per_second']:.0f} tokens/s, recording "
        f"{result['recording_tokens_per_second']:.0f} tokens/s: {result['median_ratio']:.2f} times the time (median)"
    )
    append_result(result, loaded, corpus, arguments)
    return result


if __name__ == "__main__":
    run_command(main)
