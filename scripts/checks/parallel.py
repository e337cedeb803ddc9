"""Whether the processes of torchrun together make the tokens that one of them makes alone.

    torchrun --nproc-per-node 2 -m scripts.checks.parallel --model ./tiny --quantizers nuq3.safetensors rdnuq2.4.safetensors

Every process first reads a prompt of random tokens and continues it greedily alone, with the whole model on its device; then
all do so together, each with its part of the heads. A row says how many tokens are the same from the first on, and how far apart the
logits behind the prompt are: sums are in another order, so in half precision two tokens that are about as likely may change places.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.step.graphed import graphed
from gradients.cli import command_parser, format_table, positive_int, run_command
from gradients.loading import LoadedModel, load_model
from gradients.models import decoder_config
from gradients.parallel import WHOLE, Part, add_tensor_parallel_argument, own_part
from gradients.processes import process_state
from quant.artefact import Quantizers, load_quantizers
from quant.parts import own_heads
from quant.results import append_row, results_file


@torch.inference_mode()
def continued(
    loaded: LoadedModel, quantizers: Quantizers, prompt: Tensor, count: int, graph: bool
) -> tuple[list[int], Tensor]:
    """(`count` greedy tokens behind `prompt` `[1, S]`, logits `[V]` of the first)."""
    cache = PackedCache(quantizers, loaded.model.config, capacity=prompt.shape[1] + count)
    tokens: list[int] = []
    with packed_attention(loaded.model):
        for part in prompt.to(loaded.device).split(128, dim=1):
            logits = loaded.model(input_ids=part, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        first = logits
        with graphed(loaded.model, cache) if graph else nullcontext():
            for _ in range(count):
                tokens.append(int(logits.argmax()))
                ids = torch.tensor([tokens[-1:]], device=loaded.device)
                logits = loaded.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
    return tokens, first.float().cpu()


def compare(arguments: argparse.Namespace, dtype: str, part: Part) -> list[dict[str, Any]]:
    """A row for every file of quantizers."""
    found: dict[Part, list[tuple[list[int], Tensor]]] = {}
    for own in (WHOLE, part):
        loaded = load_model(arguments.model, dtype, part=own)
        drawn = torch.Generator().manual_seed(0)
        prompt = torch.randint(
            3, decoder_config(loaded.model.config).vocab_size, (1, arguments.prompt), generator=drawn
        )
        found[own] = [
            continued(loaded, own_heads(load_quantizers(file), own), prompt, arguments.new_tokens, arguments.graph)
            for file in arguments.quantizers
        ]
    rows = []
    for file, (alone, logits), (together, others) in zip(arguments.quantizers, *found.values(), strict=True):
        pairs = enumerate(zip(alone, together, strict=True))
        same = next((place for place, (one, other) in pairs if one != other), len(alone))
        row = {"part": "parallel", "scheme": load_quantizers(file).scheme.describe(), "dtype": dtype}
        row |= {"processes": part.count, "graph": arguments.graph, "prompt": arguments.prompt, "new_tokens": len(alone)}
        row |= {"same_tokens": same, "logits_apart": float((logits - others).abs().max())}
        rows.append(row | {"largest_logit": float(logits.abs().max())})
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The command; returns its JSON summary (None in all but the main process)."""
    parser = command_parser("scripts.checks.parallel", __doc__)
    parser.add_argument("--model", required=True, help="local folder, small enough for one device")
    parser.add_argument("--quantizers", nargs="+", required=True, help="files written by `python -m quant.fit`")
    parser.add_argument("--dtype", nargs="+", default=["auto"])
    parser.add_argument("--prompt", type=positive_int, default=300, help="tokens")
    parser.add_argument("--new-tokens", type=positive_int, default=64)
    parser.add_argument("--graph", action="store_true", help="record the steps in a CUDA graph")
    parser.add_argument("--results", type=results_file, help="JSONL file to append to")
    add_tensor_parallel_argument(parser)
    arguments = parser.parse_args(argv)
    part = own_part(arguments.tensor_parallel or 0, "scripts.checks.parallel")
    rows = [row for dtype in arguments.dtype for row in compare(arguments, dtype, part)]
    if not process_state().is_main_process:
        return None
    for row in rows:
        append_row(arguments.results, row)
    print(format_table(rows))
    return {"rows": rows}


if __name__ == "__main__":
    run_command(main)
