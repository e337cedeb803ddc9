"""Perplexity of a model whose cache is quantized in simulation, and how far it strays from the unquantized model.

    python -m quant.evaluate --model meta-llama/Llama-2-7b-hf --text wikitext2                      # unquantized
    python -m quant.evaluate --model meta-llama/Llama-2-7b-hf --text wikitext2 --quantizers nuq3.safetensors
    accelerate launch -m quant.evaluate ...                            # the windows split over processes (torchrun on CPUs)

The quantizer file says everything about the quantization. Each window runs twice, without and with it, so that
KL divergence and agreement of the most likely token cost no second pass over the text.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradients.__main__ import add_bos_argument, add_model_arguments, check_seqlen, load_model_from
from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from gradients.finite import require_finite
from gradients.loading import LoadedModel
from gradients.placement import input_device
from gradients.precision import widened
from gradients.processes import gathered, own_share, process_state
from gradients.progress import progress
from gradients.text import Corpus, load_corpus
from quant.artefact import Quantizers, load_quantizers
from quant.options import add_exact_arguments, exact_from
from quant.results import append_row, results_file
from quant.simulate import simulated
from quant.storage import StoredSize

_LOGIT_ROWS = 256  # positions whose logits are compared at a time: bounds the float32 copies


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over predicted tokens; windows and processes add up."""

    tokens: int = 0
    nll: float = 0.0  # nats
    baseline_nll: float = 0.0  # nats, of the unquantized model
    kl: float = 0.0  # nats, KL(unquantized || quantized)
    agreements: int = 0  # positions where both find the same token most likely

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def summary(self) -> dict[str, float | int]:
        """Means per token, as reported."""
        nll = self.nll / self.tokens
        return {
            "perplexity": math.exp(nll),
            "nll": nll,
            "baseline_nll": self.baseline_nll / self.tokens,
            "tokens": self.tokens,
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agreements / self.tokens,
        }


def compare_logits(logits: Tensor, baseline: Tensor, targets: Tensor) -> Totals:
    """Score `logits` `[N, V]` against the `targets` `[N]` and the unquantized model's `baseline` `[N, V]`.

    Raises `UserError` when either holds NaN.
    """
    totals = Totals()
    for rows in torch.arange(len(targets), device=logits.device).split(_LOGIT_ROWS):
        log_p = widened(logits[rows]).log_softmax(-1)
        log_q = widened(baseline[rows]).log_softmax(-1)
        wanted = targets[rows, None]
        totals += Totals(
            tokens=len(rows),
            nll=-_total(log_p.gather(1, wanted)),
            baseline_nll=-_total(log_q.gather(1, wanted)),
            kl=_total(torch.linalg.vecdot(log_q.exp(), log_q - log_p)),
            agreements=int((log_p.argmax(-1) == log_q.argmax(-1)).sum()),
        )
    if math.isnan(totals.nll + totals.kl):
        raise UserError("the model's logits are NaN; check its weights, or try --dtype float32")
    return totals


def _total(x: Tensor) -> float:
    """The sum, in float64 on the CPU: not every accelerator has it."""
    return float(x.cpu().double().sum())


def evaluate(model: PreTrainedModel, windows: Tensor, quantizers: Quantizers | None) -> dict[str, Any]:
    """Perplexity and distance from the unquantized model over `windows`, `[n, S]` int64.

    Under `accelerate launch` every process takes its share and all return the whole result, to the last bit that of one.
    """
    return evaluate_many(model, windows, [quantizers])[0]


@torch.inference_mode()
def evaluate_many(
    model: PreTrainedModel, windows: Tensor, candidates: Sequence[Quantizers | None]
) -> list[dict[str, Any]]:
    """`evaluate` for several quantizers (None: unquantized), which share each window's unquantized logits."""
    state = process_state()
    device = input_device(model)
    scores = [_Score.of(len(windows)) for _ in candidates]
    for number in progress(
        own_share(len(windows)), desc="evaluating", unit="window", disable=not state.is_main_process
    ):
        tokens = windows[number].to(device)[None]
        started = time.perf_counter()
        baseline = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        require_finite(baseline, model, tokens)
        targets = tokens[0, 1:].to(baseline.device)
        shared = time.perf_counter() - started
        for quantizers, score in zip(candidates, scores, strict=True):
            started = time.perf_counter()
            logits, size = baseline, StoredSize()
            if quantizers is not None:
                with simulated(model, quantizers) as usage:
                    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
                size = usage.size
                require_finite(logits, model, tokens)
            score.add(number, compare_logits(logits, baseline, targets), size, shared + time.perf_counter() - started)
    return [score.summary(model, quantizers) for quantizers, score in zip(candidates, scores, strict=True)]


@dataclass
class _Score:
    """A row per window for one set of quantizers: its totals, its size, its seconds with the unquantized pass."""

    rows: Tensor  # [n, 8] float64, zero for the windows of other processes

    @classmethod
    def of(cls, windows: int) -> "_Score":
        return cls(torch.zeros(windows, len(vars(Totals())) + 3, dtype=torch.float64))

    def add(self, window: int, totals: Totals, size: StoredSize, seconds: float) -> None:
        row = [*vars(totals).values(), size.bits, size.elements, seconds]
        self.rows[window] = torch.tensor(row, dtype=torch.float64)

    def summary(self, model: PreTrainedModel, quantizers: Quantizers | None) -> dict[str, Any]:
        totals, size, seconds = Totals(), StoredSize(), 0.0
        for *sums, bits, elements, lasted in gathered(self.rows).tolist():
            named = zip(vars(totals).items(), sums, strict=True)
            totals += Totals(**{name: type(value)(added) for (name, value), added in named})
            size += StoredSize(int(bits), int(elements))
            seconds += lasted
        return {
            **totals.summary(),
            # of the quantized layers; what layers with sliding windows take beside them only a cache knows
            "bits_per_element": size.bits_per_element if quantizers else float(torch.finfo(model.dtype).bits),
            "scheme": quantizers.scheme.describe() if quantizers else "unquantized",
            "tokens_per_second": round(totals.tokens * process_state().num_processes / seconds, 1),
        }


def add_evaluation_arguments(parser: argparse.ArgumentParser, bos: bool | None = None) -> None:
    """`--text --seqlen --windows --bos --results`, spelled alike in every evaluation command."""
    parser.add_argument("--text", required=True, help="wikitext2, c4, ptb, pydoc, or FILE[:START-END] in percent")
    parser.add_argument("--seqlen", type=positive_int, default=2048, help="tokens per window")
    parser.add_argument("--windows", type=positive_int, default=None, help="default: as many as the text holds")
    add_bos_argument(parser, bos)
    parser.add_argument("--results", type=results_file, help="append the result as a row to this JSONL file")


def evaluation_corpus(loaded: LoadedModel, arguments: argparse.Namespace) -> Corpus:
    """The text that `add_evaluation_arguments` describes. Raises `UserError` for a bad one."""
    check_seqlen(loaded, arguments.seqlen)
    corpus = load_corpus(arguments.text, "evaluation", loaded.tokenizer, arguments.bos)
    loaded.check_tokens(corpus.tokens)
    return corpus


def result_identity(loaded: LoadedModel, corpus: Corpus, arguments: argparse.Namespace) -> dict[str, Any]:
    """Whose a result is: the model and the text, by name and by content, and the dtype that was computed in."""
    return {
        "model": Path(arguments.model).name,
        "weights": loaded.weights,
        "text": Path(arguments.text).name,
        "text_digest": corpus.digest,
        "bos": corpus.bos is not None,
        "seqlen": arguments.seqlen,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
    }


def append_result(result: dict[str, Any], loaded: LoadedModel, corpus: Corpus, arguments: argparse.Namespace) -> None:
    """Append a result to the `--results` file, if one is given, with the model and text it belongs to.

    Of several processes, all of which have the whole result, the main one does.
    """
    if not process_state().is_main_process:
        return
    append_row(arguments.results, {**result, **result_identity(loaded, corpus, arguments)})


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The command; returns its JSON summary (None in all but the main process)."""
    parser = command_parser("quant.evaluate", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--quantizers", help="file written by `python -m quant.fit`; without it, the model as it is")
    add_exact_arguments(parser)
    add_evaluation_arguments(parser)
    arguments = parser.parse_args(argv)

    quantizers = None
    if arguments.quantizers:
        quantizers = exact_from(load_quantizers(arguments.quantizers), arguments)
    loaded = load_model_from(arguments)
    corpus = evaluation_corpus(loaded, arguments)
    if quantizers is not None:
        quantizers.check_run(loaded, corpus.bos is not None)
    result = evaluate(loaded.model, corpus.evaluation_windows(arguments.seqlen, arguments.windows), quantizers)
    if not process_state().is_main_process:
        return None
    columns = "scheme bits_per_element perplexity baseline_nll nll kl top1_agreement tokens_per_second"
    if quantizers is not None:
        result["records"] = quantizers.records_digest
    try:
        append_result(result, loaded, corpus, arguments)
    finally:  # what cannot be written down is shown all the same
        print(format_table([result], columns))
    return result


if __name__ == "__main__":
    run_command(main)
