r"""The synthetic part of RULER with a quantized cache, over tasks and lengths (see scripts/retrieval/tasks.py).

    python -m scripts.retrieval.ruler --model ./smollm2 --quantizers nuq4.safetensors nuq2.safetensors --lengths 1024 2048 \
        --samples 3 --results scripts/results/ruler.jsonl
    python -m scripts.retrieval.ruler --model ... --quantizers ... --packed --chat-template --tasks vt cwe --lengths 131072

Answers are greedy and scored as RULER does, by the share of the expected numbers, names or words that they hold; beside it
stands the NLL of the expected answer per token, which also grades models that find nothing.
One JSONL row per scheme, length and task; rows that the results file holds are not measured again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from gradients.cli import run_command
from quant.prompts import Prompter, Sample
from scripts.retrieval.shared import Cell, Row, asked, means, retrieval_parser, run, table
from scripts.retrieval.tasks import TASKS

SPARE_TOKENS = 8


@dataclass(frozen=True)
class RulerTask:
    """One question of a task: a prompt of `tokens`, everything in it drawn with a `seed`."""

    task: str
    tokens: int
    seed: int

    def sample(self, prompter: Prompter) -> Sample:
        """Prompt and answer in tokens. Raises `UserError` for a length that cannot be had."""
        return TASKS[self.task](prompter, self.tokens, self.seed)


def main(argv: Sequence[str] | None = None) -> Row:
    """The command; returns its JSON summary."""
    parser = retrieval_parser("ruler", __doc__, lengths=(1024, 2048, 4096), samples=3)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    arguments = parser.parse_args(argv)
    seeds = range(arguments.seed, arguments.seed + arguments.samples)
    cells = [
        Cell({"context": tokens, "task": task}, partial(asked, [RulerTask(task, tokens, seed) for seed in seeds]))
        for tokens in sorted(set(arguments.lengths))
        for task in dict.fromkeys(arguments.tasks)
    ]
    rows, added = run(arguments, cells, SPARE_TOKENS)
    print(f"share of the answers found (NLL per token of the expected answer, nats), {arguments.mode}")
    for tokens in sorted(set(arguments.lengths)):
        own = [row for row in rows if row["context"] == tokens]
        shown = table(own, lambda row: row["task"], means("found", "nll_per_token"))
        print(f"\n{tokens} tokens\n{shown}")
    return {"results": arguments.results, "rows_added": added}


if __name__ == "__main__":
    run_command(main)
