r"""Passkey retrieval with a quantized cache, over schemes and lengths of context (see quant/passkey.py).

    python -m scripts.retrieval.passkey --model ./smollm2 --records records/ --schemes nuq4-1% nuq3-1% rdnuq3.4 \
        --lengths 512 1024 2048 --samples 10 --results scripts/results/passkey.jsonl
    python -m scripts.retrieval.passkey --model ./smollm2 --quantizers nuq3.safetensors --lengths 4096 --packed

The model without quantization is always among the rows. One JSONL row per scheme and length, written as soon as it is
known; rows that the results file already holds are not measured again. All schemes get the same prompts, at as many
depths as there are samples.
"""

from collections.abc import Sequence
from functools import partial

from gradients.cli import run_command
from quant.answers import Reply
from quant.passkey import PasskeyTask, passkey_tasks
from scripts.retrieval.shared import Cell, Row, asked, means, retrieval_parser, run, table


def cell(tokens: int, samples: int, seed: int) -> Cell:
    """The questions of one length."""
    tasks = passkey_tasks(tokens, samples, seed)
    return Cell({"context": tokens}, partial(asked, tasks), partial(missed, tasks))


def missed(tasks: Sequence[PasskeyTask], replies: Sequence[Reply]) -> Row:
    """At which depths the key was not found."""
    return {"missed_depths": [task.depth for task, one in zip(tasks, replies, strict=True) if not one.exact]}


def main(argv: Sequence[str] | None = None) -> Row:
    """The command; returns its JSON summary."""
    arguments = retrieval_parser("passkey", __doc__, lengths=(512, 1024, 2048), samples=10).parse_args(argv)
    cells = [cell(length, arguments.samples, arguments.seed) for length in sorted(set(arguments.lengths))]
    rows, added = run(arguments, cells)
    shown = table(rows, lambda row: str(row["context"]), means("retrieved", "answer_nll"))
    print(f"share retrieved (NLL of the answer, nats), {arguments.samples} samples, {arguments.mode}\n{shown}")
    return {"results": arguments.results, "rows_added": added}


if __name__ == "__main__":
    run_command(main)
