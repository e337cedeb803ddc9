r"""Needle in a haystack: a sentence hidden at some depth of a long text, over depths and lengths.

    python -m scripts.retrieval.needle --model ./smollm2 --quantizers nuq4.safetensors nuq2.safetensors --lengths 1024 2048 \
        --depths 0 0.5 1 --samples 3 --results scripts/results/needle.jsonl --heat-map scripts/results/plots/needle.png
    python -m scripts.retrieval.needle --model ... --quantizers ... --packed --text book.txt --lengths 32768 131072

The needle says what is best to do in a city: what to eat, where, and in which weather, all drawn with a seed. The question
asks for the city; the answer is graded twice: by the share of the three words that a greedy answer holds, and by the NLL
of the true answer per token, which also tells apart models that are too small, or too damaged, to answer.
One JSONL row per scheme, length and depth; rows that the results file holds are not measured again.
"""

import argparse
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gradients.cli import run_command
from gradients.text import load_text
from quant.prompts import Prompter, Sample
from scripts.report.plot_needle import draw_rows, require_matplotlib
from scripts.retrieval.haystack import Haystack
from scripts.retrieval.shared import Cell, Row, asked, means, retrieval_parser, run, table

CITIES = ["Lisbon", "Oslo", "Cairo", "Lima", "Dublin", "Hanoi", "Prague", "Quito", "Riga", "Tunis", "Vienna", "Zagreb"]
FOODS = ["mangoes", "pancakes", "dumplings", "olives", "waffles", "noodles", "chestnuts", "pretzels", "oysters", "figs"]
PLACES = [
    "harbour",
    "museum",
    "park",
    "stadium",
    "cathedral",
    "library",
    "palace",
    "lighthouse",
    "aquarium",
    "vineyard",
]
WEATHERS = ["sunny", "foggy", "windy", "snowy", "cloudy", "stormy", "frosty", "humid"]

INTRODUCTION = "Read the text below. A question about one of its sentences follows.\n\n"
NEEDLE = "The best thing to do in {city} is to eat {food} at the {place} on a {weather} day."
QUESTION = "\n\nWhat is the best thing to do in {city}?"
LEAD = " The best thing to do in {city} is to"
ANSWER = " eat {food} at the {place} on a {weather} day."
SPARE_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class NeedleTask:
    """One question: prompt of `tokens`, needle at a `depth` from 0 to 1, words and haystack drawn with a `seed`."""

    tokens: int
    depth: float
    seed: int
    source: str | None = None  # a text to hide it in; else generated

    @property
    def words(self) -> dict[str, str]:
        """What the needle is about."""
        draw = random.Random(self.seed)
        lists = {"city": CITIES, "food": FOODS, "place": PLACES, "weather": WEATHERS}
        return {name: draw.choice(words) for name, words in lists.items()}

    def sample(self, prompter: Prompter) -> Sample:
        """Prompt and answer in tokens. Raises `UserError` for a length that cannot be had."""
        words, hay = self.words, Haystack(self.seed, self.source)
        needle, question = NEEDLE.format_map(words), QUESTION.format_map(words)

        def text(size: int) -> str:
            return INTRODUCTION + hay.hiding([(self.depth, needle)], size) + question

        expected = tuple(word for name, word in words.items() if name != "city")
        return prompter.sample(text, LEAD.format_map(words), ANSWER.format_map(words), expected, self.tokens)


def cells_from(arguments: argparse.Namespace) -> list[Cell]:
    """A cell for every length and depth. Raises `UserError` for a text without sentences."""
    source = None if arguments.text is None else load_text(arguments.text, "evaluation")
    Haystack(source=source)  # refuses a text that cannot be used
    cells = []
    for tokens in sorted(set(arguments.lengths)):
        for depth in sorted(set(arguments.depths)):
            seeds = range(arguments.seed, arguments.seed + arguments.samples)
            tasks = [NeedleTask(tokens=tokens, depth=depth, seed=seed, source=source) for seed in seeds]
            fields = {"text": Path(arguments.text).name if arguments.text else "generated"}
            if source is not None:
                fields["text_digest"] = hashlib.sha256(source.encode()).hexdigest()[:16]
            cells.append(Cell(fields | {"context": tokens, "depth": depth}, partial(asked, tasks)))
    return cells


def share(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a depth from 0 to 1")
    return number


def main(argv: Sequence[str] | None = None) -> Row:
    """The command; returns its JSON summary."""
    parser = retrieval_parser("needle", __doc__, lengths=(1024, 2048, 4096), samples=3)
    parser.add_argument("--depths", type=share, nargs="+", default=[0, 0.25, 0.5, 0.75, 1], help="from 0 to 1 (5)")
    parser.add_argument("--text", help="haystack: corpus name or text file; default: generated sentences")
    parser.add_argument("--heat-map", type=Path, help="draw the rows as this PNG (needs matplotlib)")
    arguments = parser.parse_args(argv)
    if arguments.heat_map:
        require_matplotlib()  # before hours of measuring
    rows, added = run(arguments, cells_from(arguments), SPARE_TOKENS)
    shown = table(rows, lambda row: str(row["context"]), means("found", "nll_per_token"))
    print(f"share of the needle's words found (NLL per token of the answer, nats), {arguments.mode}\n{shown}")
    if arguments.heat_map:
        draw_rows(rows, arguments.heat_map)
    return {
        "results": arguments.results,
        "heat_map": arguments.heat_map and str(arguments.heat_map),
        "rows_added": added,
    }


if __name__ == "__main__":
    run_command(main)
