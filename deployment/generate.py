"""Generate text from a packed cache.

    python -m deployment.generate --model ./smollm2 --quantizers nuq3.safetensors --prompt "The KV cache is"
    python -m deployment.generate --model ... --quantizers ... --prompt-file book.txt --max-new-tokens 256 --sample

The prompt is read in chunks and packed as it is read; text streams to stdout, and a table of what the cache took
ends the run. A long document is read once and continued from later:

    ... --prompt-file book.txt --save-cache book.cache [--max-new-tokens 0]    # the prompt's cache, not the answer's
    ... --load-cache book.cache                              # goes on as the run that saved it did
    ... --load-cache book.cache --prompt "In short,"         # the prompt continues the book; if it begins with the
                                                             # book's text, only what follows is read

With --chat the prompt is a message that the tokenizer's chat template renders, and with --interactive every line of stdin
is one: the cache keeps the conversation, each turn reads only what is new. Ctrl-C ends an answer; /exit, /reset and
/save FILE are understood. --save-cache then stores the conversation, and --load-cache goes on with it. --interactive
without --chat continues plain text; an empty line lets the model go on.

Several GPUs compute every layer together, each with its part of the heads and of the cache, under torchrun:

    torchrun --nproc-per-node 2 -m deployment.generate --tensor-parallel --model ... --quantizers ... --prompt ...

In a program:

    cache = PackedCache(load_quantizers("nuq3.safetensors"), model.config)
    with packed_attention(model):
        model.generate(ids, past_key_values=cache, max_new_tokens=128)
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from deployment.text.answer import Answer, Interruption
from deployment.text.chat import COMMANDS, Chat, Dialogue, PlainText, converse, turn, typed_lines
from deployment.text.saved import FILE, SavedCache, read_cache
from deployment.text.session import Session
from gradients.__main__ import add_model_arguments, load_model_from
from gradients.checked import require_own_place
from gradients.cli import (
    UserError,
    command_parser,
    format_table,
    non_negative_int,
    positive_float,
    positive_int,
    require_text,
    run_command,
    share,
)
from gradients.loading import LoadedModel
from gradients.parallel import Part, add_tensor_parallel_argument, own_part, summed
from gradients.processes import process_state, require_one_process
from quant.artefact import load_quantizers
from quant.options import add_exact_arguments, exact_from
from quant.parts import own_heads
from quant.storage import FP16_BITS, StoredSize

_IN_ONE_PROCESS = ("interactive", "save_cache", "load_cache")  # one process reads lines; a file holds all heads


def _prompt(arguments: argparse.Namespace) -> str | None:
    prompt = None if arguments.prompt is None else require_text(arguments.prompt, "--prompt")
    if arguments.system is not None:
        require_text(arguments.system, "--system")
    if arguments.prompt_file is not None:
        try:
            prompt = Path(arguments.prompt_file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"prompt file {arguments.prompt_file!r} cannot be read ({error}); give a UTF-8 text file"
            ) from error
    if prompt is not None and not prompt.strip():
        raise UserError(f"prompt {prompt!r} is empty; give --prompt or --prompt-file with words in it")
    return prompt


def _check(arguments: argparse.Namespace) -> None:
    given = arguments.prompt is not None or arguments.prompt_file is not None
    if not given and not arguments.interactive and (arguments.chat or arguments.load_cache is None):
        raise UserError("there is nothing to answer: give --prompt, --prompt-file or --interactive")
    if arguments.beams > 1 and (arguments.chat or arguments.interactive):
        raise UserError(
            f"--beams {arguments.beams} leaves no cache to go on with; drop it, --chat and --interactive need one"
        )
    if arguments.system is not None and (not arguments.chat or arguments.load_cache is not None):
        raise UserError("--system begins a conversation: it needs --chat, and no --load-cache, which has begun already")
    asked = [name for name in _IN_ONE_PROCESS if getattr(arguments, name)]
    if arguments.tensor_parallel is not None and asked:
        option = "--" + asked[0].replace("_", "-")
        raise UserError(f"{option} works in one process, which --tensor-parallel is not; drop one of them")
    only_reads = arguments.save_cache is not None and not arguments.chat and not arguments.interactive
    if arguments.max_new_tokens == 0 and not only_reads:
        raise UserError("--max-new-tokens 0 only reads, which is for --save-cache with a prompt; give at least 1")


def _dialogue(arguments: argparse.Namespace, loaded: LoadedModel, saved: SavedCache | None) -> Dialogue:
    if not arguments.chat:
        return PlainText(loaded)
    if saved is not None and saved.messages is None:
        raise UserError(
            f"cache {saved.name!r} holds plain text and no conversation; drop --chat, or save one with --chat --save-cache"
        )
    return Chat(loaded, arguments.system, None if saved is None else saved.messages)


def _answers(arguments: argparse.Namespace, session: Session, dialogue: Dialogue, prompt: str | None) -> list[Answer]:
    """Read, answer and save, as the options say."""
    sampling: dict[str, Any] = {"do_sample": arguments.sample, "num_beams": arguments.beams}
    if arguments.sample:
        sampling |= {"temperature": arguments.temperature, "top_p": arguments.top_p}

    def answer(tokens: list[int], interruption: Interruption | None = None) -> Answer:
        return session.answer(tokens, arguments.max_new_tokens, interruption, **sampling)

    begin = dialogue.tokens_of if prompt is None else dialogue.opening
    tokens = [] if arguments.interactive and prompt is None else begin(session.tokens, prompt or "")
    needed = None if arguments.interactive else len(tokens) + arguments.max_new_tokens
    session.open(arguments.capacity or needed)
    if not arguments.interactive:
        session.check_room(len(tokens), arguments.max_new_tokens)
    if not arguments.interactive and not arguments.chat:
        if arguments.save_cache is not None:
            session.read(tokens)
            session.save(arguments.save_cache)
        return [answer(tokens)] if arguments.max_new_tokens else []
    answers = [] if prompt is None else [turn(session, dialogue, prompt, tokens, answer)]
    if arguments.interactive:
        print(COMMANDS, file=sys.stderr)
        answers += converse(session, dialogue, typed_lines(), answer)
    if arguments.save_cache is not None and session.tokens:
        session.save(arguments.save_cache, dialogue.messages)
    return answers


def _summary(session: Session, answers: list[Answer], part: Part) -> dict[str, Any]:
    """The command's JSON: the cache at the end, in all processes, all turns together, and the last answer."""
    cache, size = session.cache, session.cache.packed_size()
    sums = summed([cache.nbytes(), cache.fp16_nbytes(), size.bits, size.elements], part)
    nbytes, fp16_nbytes = int(sums[0]), int(sums[1])
    packed = StoredSize(int(sums[2]), int(sums[3]))
    decoding = sum(answer.decode_seconds for answer in answers)
    steps = sum(max(0, answer.new_tokens - 1) for answer in answers)
    return {
        "scheme": session.quantizers.scheme.describe(),
        "turns": len(answers),
        "prompt_tokens": answers[-1].prompt_tokens if answers else len(session.tokens),
        "read_tokens": session.read_tokens,
        "new_tokens": sum(answer.new_tokens for answer in answers),
        "tokens": session.cache.get_seq_length(),
        "processes": part.count,
        "cache_bytes": nbytes,
        "fp16_bytes": fp16_nbytes,
        "ratio": round(fp16_nbytes / nbytes, 3) if nbytes else None,
        "bits_per_element": round(packed.bits_per_element, 3) if packed.elements else None,  # of the quantized layers
        "cache_bits_per_element": round(FP16_BITS * nbytes / fp16_nbytes, 3) if fp16_nbytes else None,  # of all layers
        "open_seconds": round(session.open_seconds, 3),
        "prefill_seconds": round(session.read_seconds + sum(answer.prefill_seconds for answer in answers), 3),
        "tokens_per_second": round(steps / decoding, 2) if decoding else 0.0,
        "text": answers[-1].text if answers else "",
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The command; returns its JSON summary (None in all but the main process)."""
    parser = command_parser("deployment.generate", __doc__)
    add_model_arguments(parser)
    add_tensor_parallel_argument(parser)
    parser.add_argument("--quantizers", required=True, help="file written by `python -m quant.fit`")
    add_exact_arguments(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt")
    prompt.add_argument("--prompt-file", help="UTF-8 text file")
    parser.add_argument("--chat", action="store_true", help="prompts are messages, rendered by the chat template")
    parser.add_argument("--interactive", action="store_true", help="go on with lines from stdin")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the message before the first")
    parser.add_argument("--save-cache", metavar="FILE", help="store the prompt's cache, or the whole conversation's")
    parser.add_argument("--load-cache", metavar="FILE", help="go on from a stored cache; the prompt continues its text")
    parser.add_argument("--max-new-tokens", type=non_negative_int, default=128, help="of an answer; 0: only read")
    parser.add_argument("--prefill-chunk", type=positive_int, default=1024, help="prompt tokens per forward")
    parser.add_argument("--capacity", type=positive_int, help="tokens to reserve; default: what the request needs")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the most likely token")
    parser.add_argument("--temperature", type=positive_float, default=1.0, help="with --sample")
    parser.add_argument("--top-p", type=share, default=1.0, help="with --sample")
    parser.add_argument("--beams", type=positive_int, default=1, help="beam search; the text comes at the end")
    parser.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on CUDA, record decode steps, which the host then only repeats (default)",
    )
    parser.add_argument("--seed", type=non_negative_int, default=0)
    arguments = parser.parse_args(argv)

    _check(arguments)
    if arguments.save_cache is not None:
        require_own_place(arguments.save_cache, FILE)
    part = own_part(arguments.tensor_parallel, "deployment.generate")
    if part.is_whole:
        require_one_process("deployment.generate", ", or give --tensor-parallel")
    text = _prompt(arguments)
    quantizers = own_heads(exact_from(load_quantizers(arguments.quantizers), arguments), part)
    saved = None if arguments.load_cache is None else read_cache(arguments.load_cache, quantizers)
    loaded = load_model_from(arguments, part)
    quantizers.check_run(loaded)
    if saved is not None:
        saved.check_model(loaded.model)
    torch.manual_seed(arguments.seed)
    quiet = not process_state().is_main_process
    session = Session(loaded, quantizers, arguments.prefill_chunk, saved, quiet, graphs=arguments.cuda_graph)
    answers = _answers(arguments, session, _dialogue(arguments, loaded, saved), text)
    result = _summary(session, answers, part)
    if quiet:
        return None
    columns = "scheme tokens cache_bytes fp16_bytes ratio bits_per_element cache_bits_per_element tokens_per_second"
    print("\n" + format_table([result], columns))
    return result


if __name__ == "__main__":
    run_command(main)
