"""Whether a device computes what the CPU does, with a real model: loss through the packed cache, and greedy text.

    python -m scripts.checks.device ./smollm2 nuq3.safetensors --device cuda --text notes.txt --results results/device.jsonl

Two checks for each dtype the model has on the device:

    loss    packed, every token seeing all tokens as stored, against simulated, on the same device: within `--limit`, or twice as
            much as simulated differs from itself with embeddings off by a rounding error (the most of three times)
    text    the device's greedy continuations of the first tokens of some windows, from the packed cache. The torch path
            on the CPU, in the same dtype, then reads the same tokens one by one: each must be the one it finds most
            likely, or a tie

What is a tie, the CPU says itself. A quantized cache amplifies rounding: where an element lies next to the border of two
codes, the last bit decides, and a step of one code is a million such bits. An error d in front of a layer therefore comes
out of it as about the square root of d times a code's step, and after some layers is as large as quantization itself,
however small it began. So close choices go either way; after one, texts differ, which is why the CPU reads the
device's tokens and does not write its own. It reads them once more with embeddings off by a rounding error, which are as
right as the others: the tokens that it then finds most likely lie up to `rounded_distance` below those of the first time.
The device's tokens may lie twice as far (`largest_distance`); what a wrong kernel says lies much further.

Exits with 1 if anything is outside the limits. On the CPU (`--device cpu`) the torch path is held against itself, to
try it.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.evaluate import evaluate_packed
from deployment.layer import PackedLayer
from deployment.step.dispatch import runs_kernels
from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from gradients.loading import load_model
from gradients.text import load_corpus
from quant.artefact import Quantizers, load_quantizers
from quant.evaluate import evaluate
from quant.results import append_row, results_file

_OWN, _ROUNDING = 2.0, 0.1  # a tie: at most this multiple of the CPU's own distance, which counts as 0.1 at least
_TIMES = 3  # that a loss is found with embeddings rounded otherwise

Row = dict[str, Any]


def check_loss(model: PreTrainedModel, windows: Tensor, quantizers: Quantizers, chunk: int) -> Row:
    """Mean NLL in nats of `windows` `[n, S]`, simulated and packed; relative differences of packed, and of simulated rounded otherwise."""
    simulated = evaluate(model, windows, quantizers)["nll"]
    packed = evaluate_packed(model, windows, quantizers, chunk, exact_chunk=False)["nll"]
    own = []
    for seed in range(_TIMES):
        with rounded_otherwise(model, seed):
            own.append(abs(evaluate(model, windows, quantizers)["nll"] / simulated - 1))
    losses = {"nll_simulated": simulated, "nll_packed": packed, "nll_difference": abs(packed / simulated - 1)}
    return {**losses, "nll_rounded_difference": max(own)}


@torch.inference_mode()
def greedy(model: PreTrainedModel, quantizers: Quantizers, prompt: Tensor, new: int) -> tuple[Tensor, str]:
    """(the `[new]` tokens that continue a prompt `[S]`, which path attended: `triton` or `torch`)."""
    device = next(model.parameters()).device
    cache = PackedCache(quantizers, model.config, capacity=len(prompt) + new, exact_chunk=False)
    ids, tokens = prompt.to(device)[None], []
    with packed_attention(model):
        for _ in range(new):
            ids = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(ids)
    layers = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
    kernels = all(runs_kernels(None, layer, device) for layer in layers)
    return torch.cat(tokens, dim=1)[0].cpu(), "triton" if kernels else "torch"


@torch.inference_mode()
def logits_of(model: PreTrainedModel, quantizers: Quantizers, parts: Sequence[Tensor]) -> Tensor:
    """Logits `[N, V]` after every token of a text that a model on the CPU reads part by part."""
    cache = PackedCache(quantizers, model.config, exact_chunk=False)
    with packed_attention(model, "torch"):
        outputs = [model(input_ids=part[None], past_key_values=cache).logits[0].float() for part in parts]
    return torch.cat(outputs)


@contextmanager
def rounded_otherwise(model: PreTrainedModel, seed: int = 0) -> Iterator[None]:
    """Within, embeddings are multiplied by 1 plus normal noise of their dtype's precision."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator) * torch.finfo(output.dtype).eps
        return (output * (1 + noise.to(output.device))).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()


def distances(model: PreTrainedModel, quantizers: Quantizers, prompt: Tensor, tokens: Tensor) -> Tensor:
    """How far below the highest logit of a model on the CPU are: `tokens` `[N]` that continue `prompt`; and what it would choose.

    When it chooses, its embeddings are off by a rounding error. Returns `[2, N]`, 0 for the highest itself.
    """
    parts, last = [prompt, *tokens[:-1].split(1)], len(prompt) - 1
    logits = logits_of(model, quantizers, parts)[last:]
    with rounded_otherwise(model):
        chosen = logits_of(model, quantizers, parts)[last:].argmax(-1)
    return torch.stack([logits.amax(-1) - logits.gather(1, said[:, None])[:, 0] for said in (tokens, chosen)])


def check_text(device: PreTrainedModel, cpu: PreTrainedModel, prompts: Tensor, quantizers: Quantizers, new: int) -> Row:
    """Greedy continuations of `prompts` `[n, S]` on a device, and how the CPU finds them."""
    said = [greedy(device, quantizers, prompt, new) for prompt in prompts]
    pairs = zip(prompts, said, strict=True)
    below, own = torch.stack([distances(cpu, quantizers, prompt, tokens) for prompt, (tokens, _) in pairs], dim=1)
    return {
        "path": "+".join(sorted({path for _, path in said})),
        "tokens": below.numel(),
        "equal_tokens": int((below == 0).sum()),
        "rounded_equal_tokens": int((own == 0).sum()),
        "equal_texts": int((below == 0).all(1).sum()),
        "largest_distance": round(float(below.max()), 4),
        "rounded_distance": round(float(own.max()), 4),
    }


def check(arguments: argparse.Namespace, dtype: str, quantizers: Quantizers) -> Row:
    """The row of one dtype."""
    cpu, model = load_model(arguments.model, dtype, "cpu"), load_model(arguments.model, dtype, arguments.device).model
    quantizers.check_model(cpu.model.config)
    corpus = load_corpus(arguments.text, "evaluation", cpu.tokenizer)
    windows = corpus.evaluation_windows(arguments.seqlen, arguments.windows)
    row = {"model": Path(arguments.model).name, "scheme": quantizers.scheme.describe(), "dtype": dtype}
    row |= {"on": torch.device(arguments.device).type, "text": Path(arguments.text).name}
    row |= {"windows": len(windows), "seqlen": arguments.seqlen, "chunk": arguments.prefill_chunk}
    row |= check_loss(model, windows, quantizers, arguments.prefill_chunk)
    prompts = windows[: arguments.prompts, : arguments.prompt_tokens]
    row |= check_text(model, cpu.model, prompts, quantizers, arguments.new_tokens)
    tie = _OWN * max(row["rounded_distance"], _ROUNDING)
    most = max(arguments.limit, _OWN * row["nll_rounded_difference"])
    passed = row["nll_difference"] <= most and row["largest_distance"] <= tie
    return {**row, "limit": arguments.limit, "tie": tie, "passed": passed}


def main(argv: Sequence[str] | None = None) -> Row:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.checks.device", __doc__)
    parser.add_argument("model", help="hub id, local folder, or folder of GGUF weights")
    parser.add_argument("quantizers", help="file written by `python -m quant.fit` for this model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"], help="of the model on the device")
    parser.add_argument("--text", default="pydoc", help="wikitext2, c4, ptb, pydoc, or FILE[:START-END] in percent")
    parser.add_argument("--seqlen", type=positive_int, default=512, help="tokens per window")
    parser.add_argument(
        "--windows",
        type=positive_int,
        default=40,
        help="for the loss (40); codes that flip need many tokens to even out",
    )
    parser.add_argument("--prompts", type=positive_int, default=8, help="windows that are continued (8)")
    parser.add_argument("--prefill-chunk", type=positive_int, default=128, help="tokens per forward")
    parser.add_argument("--prompt-tokens", type=positive_int, default=100)
    parser.add_argument("--new-tokens", type=positive_int, default=64)
    parser.add_argument(
        "--limit", type=float, default=1e-3, help="relative difference of the losses (0.001), if not more is noise"
    )
    parser.add_argument("--results", type=results_file, help="JSONL file to append to")
    arguments = parser.parse_args(argv)
    if arguments.prompt_tokens > arguments.seqlen:
        raise UserError(f"--prompt-tokens {arguments.prompt_tokens} exceeds --seqlen {arguments.seqlen}; lower it")
    quantizers, rows = load_quantizers(arguments.quantizers), []
    for dtype in arguments.dtypes:
        row = check(arguments, dtype, quantizers)
        append_row(arguments.results, row, packages=("torch", "transformers", "triton"))
        rows.append(row)
    columns = "scheme dtype path nll_simulated nll_packed nll_difference nll_rounded_difference equal_tokens "
    columns += "rounded_equal_tokens tokens largest_distance rounded_distance passed"
    print(format_table(rows, columns))
    return {"passed": all(row["passed"] for row in rows), "rows": rows}


if __name__ == "__main__":
    run_command(main)
