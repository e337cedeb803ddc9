"""Perplexity through the packed cache: the text goes through the model chunk by chunk, the past is read packed.

    python -m deployment.evaluate --model ./smollm2 --quantizers nuq3.safetensors --text notes.txt:50-100
    python -m deployment.evaluate ... --no-exact-chunk --prefill-chunk 1       # equals `python -m quant.evaluate`
    accelerate launch -m deployment.evaluate ...                  # the windows split over processes (torchrun on CPUs)
    torchrun --nproc-per-node 2 -m deployment.evaluate --tensor-parallel ...   # every layer split over processes

By default a chunk sees itself in full precision and only the past packed, as generation does. With
`--no-exact-chunk` it sees itself as stored, too; any size of chunk then reproduces the simulation, which proves
that what was evaluated is what is deployed.
"""

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from gradients.__main__ import add_model_arguments, load_model_from
from gradients.cli import command_parser, format_table, note, positive_int, run_command
from gradients.finite import require_finite
from gradients.parallel import WHOLE, Part, add_tensor_parallel_argument, own_part, summed
from gradients.placement import input_device
from gradients.precision import widened
from gradients.processes import gathered, own_share, process_state
from gradients.progress import progress
from quant.artefact import Quantizers, load_quantizers
from quant.evaluate import add_evaluation_arguments, append_result, evaluation_corpus
from quant.options import add_exact_arguments, exact_from
from quant.parts import own_heads
from quant.storage import FP16_BITS


@torch.inference_mode()
def packed_nll(model: PreTrainedModel, windows: Tensor, cache: PackedCache, chunk: int) -> float:
    """Summed negative log-likelihood in nats of `windows`, `[B, S]` int64, as one batch, `chunk` tokens at a time.

    The cache must be empty; it holds all tokens afterwards. Raises `UserError` for logits that are NaN.
    """
    tokens = windows.to(input_device(model))
    total = 0.0
    with packed_attention(model):
        for start in range(0, tokens.shape[1], chunk):
            logits = model(input_ids=tokens[:, start : start + chunk], past_key_values=cache).logits
            targets = tokens[:, start + 1 : start + 1 + chunk].to(logits.device)
            predictions = widened(logits[:, : targets.shape[1]].flatten(0, 1))
            total += float(torch.nn.functional.cross_entropy(predictions, targets.flatten(), reduction="sum"))
            require_finite(logits, model, tokens[:, : start + chunk])
    return total


def evaluate_packed(
    model: PreTrainedModel,
    windows: Tensor,
    quantizers: Quantizers,
    chunk: int,
    exact_chunk: bool,
    batch: int = 1,
    part: Part = WHOLE,
) -> dict[str, Any]:
    """Perplexity over `windows` `[n, S]`, and the bytes of the cache at the end of a window.

    `batch` windows run side by side, which changes the speed and nothing else. Under `accelerate launch` every process
    takes its share of the batches and all return the whole result, to the last bit that of one. With a `part` of the model
    all take all of them, and the bytes are those of all parts.
    """
    seqlen, parts, started = windows.shape[1], windows.split(batch), time.perf_counter()
    # of every batch: nats, bytes, bytes in fp16, packed bits and elements
    rows = torch.zeros(len(parts), 5, dtype=torch.float64)
    quiet = not process_state().is_main_process
    share = own_share(len(parts)) if part.is_whole else range(len(parts))
    for number in progress(share, desc="evaluating packed", unit="batch", disable=quiet):
        cache = PackedCache(quantizers, model.config, capacity=seqlen, exact_chunk=exact_chunk)
        nll = packed_nll(model, parts[number], cache, chunk)
        size = cache.packed_size()
        sizes = summed([cache.nbytes(), cache.fp16_nbytes(), size.bits, size.elements], part)
        rows[number] = torch.tensor([nll, *sizes], dtype=torch.float64)
    together = gathered(rows) if part.is_whole else rows
    sums = [sum(column) for column in zip(*together.tolist(), strict=True)]
    nll, nbytes, fp16_nbytes = sums[0], int(sums[1]), int(sums[2])
    tokens = len(windows) * (seqlen - 1)
    return {
        "perplexity": math.exp(nll / tokens),
        "nll": nll / tokens,
        "tokens": tokens,
        "scheme": quantizers.scheme.describe(),
        "prefill_chunk": chunk,
        "exact_chunk": exact_chunk,
        # of the quantized layers, as in quant.evaluate; and of all, sliding windows in the model's precision
        "bits_per_element": sums[3] / sums[4],
        "cache_bits_per_element": FP16_BITS * nbytes / fp16_nbytes,
        "cache_bytes": nbytes // len(windows),
        "fp16_bytes": fp16_nbytes // len(windows),
        "tokens_per_second": round(tokens / (time.perf_counter() - started), 1),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The command; returns its JSON summary (None in all but the main process)."""
    parser = command_parser("deployment.evaluate", __doc__)
    add_model_arguments(parser)
    add_tensor_parallel_argument(parser)
    parser.add_argument("--quantizers", required=True, help="file written by `python -m quant.fit`")
    add_exact_arguments(parser)
    add_evaluation_arguments(parser)
    parser.add_argument("--prefill-chunk", type=positive_int, default=1024, help="tokens per forward")
    parser.add_argument("--exact-chunk", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--batch", type=positive_int, default=1, help="windows side by side")
    arguments = parser.parse_args(argv)

    part = own_part(arguments.tensor_parallel, "deployment.evaluate")
    quantizers = own_heads(exact_from(load_quantizers(arguments.quantizers), arguments), part)
    loaded = load_model_from(arguments, part)
    corpus = evaluation_corpus(loaded, arguments)
    quantizers.check_run(loaded, corpus.bos is not None)
    if arguments.exact_chunk and arguments.prefill_chunk >= arguments.seqlen:
        note(
            f"windows of {arguments.seqlen} tokens are read as one chunk, which sees itself exactly: this is the unquantized model's "
            f"loss; give --no-exact-chunk, or a --prefill-chunk below {arguments.seqlen}"
        )
    result = evaluate_packed(
        loaded.model,
        corpus.evaluation_windows(arguments.seqlen, arguments.windows),
        quantizers,
        arguments.prefill_chunk,
        arguments.exact_chunk,
        arguments.batch,
        part,
    )
    if not process_state().is_main_process:
        return None
    columns = "scheme prefill_chunk exact_chunk bits_per_element cache_bits_per_element "
    columns += "perplexity nll cache_bytes tokens_per_second"
    result["records"] = quantizers.records_digest
    try:
        append_result(result, loaded, corpus, arguments)
    finally:  # what cannot be written down is shown all the same
        print(format_table([result], columns))
    return result


if __name__ == "__main__":
    run_command(main)
