"""Generate text from a packed cache.

    python -m deployment.generate --model ./smollm2 --quantizers nuq3.safetensors --prompt "The KV cache is"
    python -m deployment.generate --model ... --quantizers ... --prompt-file book.txt --max-new-tokens 256 --sample

The prompt is read in chunks and packed as it is read; text streams to stdout, and a table of what the cache took
ends the run. In a program:

    cache = PackedCache(load_quantizers("nuq3.safetensors"), model.config)
    with packed_attention(model):
        model.generate(ids, past_key_values=cache, max_new_tokens=128)
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from gradients.__main__ import add_model_arguments, load_model_from
from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from gradients.models import LoadedModel, decoder_config
from quant.artefact import Quantizers, load_quantizers


class TimedStreamer(TextStreamer):
    """Prints words as they come (unless told not to) and notes when the first token was there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, quiet: bool = False) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.quiet = quiet
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called once with the prompt, then once per token."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each piece of printable text."""
        if not self.quiet:
            super().on_finalized_text(text, stream_end)

    def prefill_seconds(self, started: float) -> float:
        """From the start to the first token."""
        return self.times[1] - started

    def tokens_per_second(self) -> float:
        """Speed of all tokens after the first."""
        steps = len(self.times) - 2
        return steps / (self.times[-1] - self.times[1]) if steps else 0.0


def generate(
    loaded: LoadedModel,
    quantizers: Quantizers,
    prompt: str,
    max_new_tokens: int,
    prefill_chunk: int = 1024,
    capacity: int | None = None,
    quiet: bool = False,
    **sampling: Any,
) -> dict[str, Any]:
    """Continue `prompt`; `sampling` goes to `model.generate`. Returns the command's summary.

    Raises `UserError` for an empty prompt, and for a request beyond the capacity or the model's positions.
    """
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(loaded.device)
    prompt_tokens = inputs.input_ids.shape[1]
    if not prompt.strip() or not prompt_tokens:
        raise UserError(f"prompt {prompt!r} is empty; give --prompt or --prompt-file with words in it")
    needed = prompt_tokens + max_new_tokens
    positions = decoder_config(loaded.model.config).max_position_embeddings
    for limit, name in ((positions, "the model's positions"), (capacity or needed, "the --capacity")):
        if needed > limit:
            raise UserError(
                f"prompt of {prompt_tokens} tokens and {max_new_tokens} new ones need {needed}, {name} are {limit}; "
                "shorten the prompt or lower --max-new-tokens"
            )
    cache = PackedCache(quantizers, loaded.model.config, capacity=capacity or needed)
    streamer = TimedStreamer(loaded.tokenizer, quiet)
    beams = sampling.get("num_beams", 1) > 1
    started = time.perf_counter()
    with torch.inference_mode(), packed_attention(loaded.model):
        output = loaded.model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            prefill_chunk_size=prefill_chunk,
            streamer=None if beams else streamer,
            pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
            **sampling,
        )
    seconds = time.perf_counter() - started
    new_tokens = output.shape[1] - prompt_tokens
    text = loaded.tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)
    if beams and not quiet:
        print(text)
    nbytes, fp16_nbytes = cache.nbytes(), cache.fp16_nbytes()
    return {
        "scheme": quantizers.scheme.describe(),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "tokens": cache.get_seq_length(),
        "cache_bytes": nbytes,
        "fp16_bytes": fp16_nbytes,
        "ratio": round(fp16_nbytes / nbytes, 3),
        "prefill_seconds": None if beams else round(streamer.prefill_seconds(started), 3),
        "tokens_per_second": round(new_tokens / seconds if beams else streamer.tokens_per_second(), 2),
        "text": text,
    }


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return arguments.prompt
    try:
        return Path(arguments.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompt file {arguments.prompt_file!r} cannot be read ({error}); give a UTF-8 text file"
        ) from error


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("deployment.generate", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--quantizers", required=True, help="file written by `python -m quant.fit`")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt")
    prompt.add_argument("--prompt-file", help="UTF-8 text file")
    parser.add_argument("--max-new-tokens", type=positive_int, default=128)
    parser.add_argument("--prefill-chunk", type=positive_int, default=1024, help="prompt tokens per forward")
    parser.add_argument("--capacity", type=positive_int, help="tokens to reserve; default: what the request needs")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the most likely token")
    parser.add_argument("--temperature", type=float, default=1.0, help="with --sample")
    parser.add_argument("--top-p", type=float, default=1.0, help="with --sample")
    parser.add_argument("--beams", type=positive_int, default=1, help="beam search; the text comes at the end")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    quantizers = load_quantizers(arguments.quantizers)
    text = _prompt(arguments)
    loaded = load_model_from(arguments)
    quantizers.check_model(loaded.model.config)
    torch.manual_seed(arguments.seed)
    sampling: dict[str, Any] = {"do_sample": arguments.sample, "num_beams": arguments.beams}
    if arguments.sample:
        sampling |= {"temperature": arguments.temperature, "top_p": arguments.top_p}
    result = generate(
        loaded, quantizers, text, arguments.max_new_tokens, arguments.prefill_chunk, arguments.capacity, **sampling
    )
    shown = ("scheme", "tokens", "cache_bytes", "fp16_bytes", "ratio", "tokens_per_second")
    print("\n" + format_table([{name: result[name] for name in shown}]))
    return result


if __name__ == "__main__":
    run_command(main)
