"""What the retrieval tests share: their options, what is compared on which cells, three ways to run it, and resuming.

A *cell* is one row of results: a length, and a depth or a task, with its questions. Every candidate (the model as it is,
and each quantizer) answers the questions of every cell. Ways to run:
- `unquantized`: the model with its own cache;
- `simulated`: a forward per sample that quantizes keys and values as it goes;
- `packed`: the prompt is read in chunks into the packed cache and the answer decoded from it, as `deployment.generate` does.

A row is appended as soon as its cell is finished, and cells that the results file already holds are not run again. What
a command cannot do (a length without room for the question, quantizers of another model) it refuses before the first
cell.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from gradients.__main__ import add_bos_argument, add_model_arguments, load_model_from
from gradients.cli import UserError, command_parser, format_table, non_negative_int, positive_int
from gradients.loading import LoadedModel
from gradients.models import decoder_config
from gradients.positions import usable_positions
from gradients.processes import require_one_process
from gradients.progress import progress
from quant.answers import Reply, reply_cached, reply_simulated, share_found
from quant.artefact import Quantizers
from quant.prompts import Prompter, Sample
from quant.results import append_row, is_of, read_rows, results_file
from quant.storage import StoredSize
from scripts.retrieval.candidates import Candidate, Row, add_candidate_arguments, candidates_from


@dataclass(frozen=True)
class Cell:
    """One row to be.

    Fields:
        fields: what tells the row from others of its candidate.
        samples: makes its questions; the same for every candidate.
        note: more fields, from the replies.
    """

    fields: Row
    samples: Callable[[Prompter], list[Sample]]
    note: Callable[[Sequence[Reply]], Row] = lambda _replies: {}


class Question(Protocol):
    """What makes one sample."""

    def sample(self, prompter: Prompter) -> Sample:
        """The question in the model's tokens."""


def asked(questions: Sequence[Question], prompter: Prompter) -> list[Sample]:
    """The questions in the model's tokens."""
    return [question.sample(prompter) for question in questions]


def retrieval_parser(name: str, description: str | None, lengths: Sequence[int], samples: int) -> Any:
    """The parser of `python -m scripts.retrieval.{name}` with the options that all tests share, and their defaults."""
    parser = command_parser(f"scripts.retrieval.{name}", description)
    add_model_arguments(parser)
    add_candidate_arguments(parser)
    shown = " ".join(map(str, lengths))
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=lengths, help=f"tokens per prompt ({shown})")
    parser.add_argument("--samples", type=positive_int, default=samples, help=f"prompts per cell ({samples})")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the questions (0)")
    parser.add_argument("--chat-template", action="store_true", help="ask through the tokenizer's chat template")
    add_bos_argument(parser)
    parser.add_argument(
        "--results", type=results_file, help="append the rows to this JSONL file, and leave out those it holds"
    )
    return parser


def run(arguments: argparse.Namespace, cells: Sequence[Cell], spare_tokens: int | None = None) -> tuple[list[Row], int]:
    """All rows of the `cells`, in their order, and how many of them were measured now.

    With `spare_tokens` the model also speaks: as many greedy tokens as the expected answer has, and these.
    """
    require_one_process("a retrieval test")
    common: Row = {"model": Path(arguments.model).name, "samples": arguments.samples, "seed": arguments.seed}
    candidates = candidates_from(arguments)
    loaded = load_model_from(arguments)
    prompter = Prompter(loaded.tokenizer, arguments.chat_template, arguments.bos)
    common |= {"weights": loaded.weights, "bos": prompter.begins_with_bos}
    common |= {"max_positions": arguments.max_positions, "full_attention": arguments.full_attention}
    common["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
    if arguments.chat_template:
        common["chat_template"] = True
    wanted = [(one, cell, common | one.identity(arguments) | cell.fields) for cell in cells for one in candidates]
    done = read_rows(arguments.results)
    missing = [unit for unit in wanted if row_of(done, unit[2]) is None]
    measured = _measure(missing, loaded, prompter, arguments, spare_tokens) if missing else []
    found = (row_of([*done, *measured], identity) for _, _, identity in wanted)
    return [row for row in found if row], len(measured)


def row_of(rows: Sequence[Row], identity: Row) -> Row | None:
    """The first row of this identity, if there is one; a row without a chat template does not say so."""
    plain = "chat_template" not in identity
    matching = (row for row in rows if is_of(row, identity))
    return next((row for row in matching if not (plain and row.get("chat_template"))), None)


def check_positions(loaded: LoadedModel, sample: Sample, tokens: int) -> None:
    """Raise `UserError` when a prompt and `tokens` more exceed the positions the model was made for."""
    positions = usable_positions(decoder_config(loaded.model.config))
    if (needed := len(sample.prompt) + tokens) > positions:
        raise UserError(
            f"a prompt of {len(sample.prompt)} tokens and its answer need {needed} positions, model {loaded.name!r} has "
            f"{positions}; ask for a shorter one"
        )


def new_tokens(sample: Sample, spare_tokens: int | None) -> int:
    """How many tokens the model says."""
    return 0 if spare_tokens is None else len(sample.answer) + spare_tokens


def _measure(
    missing: Sequence[tuple[Candidate, Cell, Row]],
    loaded: LoadedModel,
    prompter: Prompter,
    arguments: argparse.Namespace,
    spare_tokens: int | None,
) -> list[Row]:
    """A row for each candidate, cell and identity, appended to the results one by one."""
    cells = {id(cell): cell for _, cell, _ in missing}
    samples = {key: cell.samples(prompter) for key, cell in cells.items()}
    for sample in (one for group in samples.values() for one in group):
        check_positions(loaded, sample, max(len(sample.answer), new_tokens(sample, spare_tokens)))
        loaded.check_tokens(torch.cat([sample.prompt, sample.answer]))
    for candidate in dict.fromkeys(candidate for candidate, _, _ in missing):
        if candidate.quantizers:
            candidate.quantizers.check_run(loaded, prompter.begins_with_bos)
    rows = []
    with progress(total=sum(len(samples[id(cell)]) for _, cell, _ in missing), unit="sample") as bar:
        for candidate, cell, identity in missing:
            bar.set_description(
                ", ".join(
                    str(value)
                    for value in (identity["scheme"], *(v for k, v in cell.fields.items() if k != "text_digest"))
                )
            )
            started, replies = time.perf_counter(), []
            for sample in samples[id(cell)]:
                spoken = new_tokens(sample, spare_tokens)
                replies.append(reply(loaded, sample, candidate.quantizers, arguments, spoken))
                bar.update()
            row = (
                summarise(loaded, samples[id(cell)], replies, candidate, spare_tokens is not None)
                | cell.note(replies)
                | identity
            )
            row["seconds"] = round(time.perf_counter() - started, 1)
            append_row(arguments.results, row)
            rows.append(row)
    return rows


def reply(
    loaded: LoadedModel, sample: Sample, quantizers: Quantizers | None, arguments: argparse.Namespace, spoken: int
) -> Reply:
    """One sample, run as `arguments` say: see the module's docstring."""
    model = loaded.model
    if quantizers is None:
        return reply_cached(model, sample, DynamicCache(config=model.config), arguments.prefill_chunk, spoken)
    if arguments.mode == "simulated":
        return reply_simulated(model, sample, quantizers, spoken)
    capacity = len(sample.prompt) + max(len(sample.answer), spoken)
    cache = PackedCache(quantizers, model.config, capacity=capacity, exact_chunk=arguments.exact_chunk)
    with packed_attention(model):
        return reply_cached(model, sample, cache, arguments.prefill_chunk, spoken, cache.packed_size)


def summarise(
    loaded: LoadedModel, samples: Sequence[Sample], replies: Sequence[Reply], candidate: Candidate, spoke: bool
) -> Row:
    """Means over the samples of one cell, as reported; what the model said where it was let speak."""
    size = sum((one.size for one in replies), StoredSize())
    nll = sum(one.nll for one in replies)
    row: Row = {
        "retrieved": sum(one.exact for one in replies) / len(replies),
        "answer_nll": nll / len(replies),
        "nll_per_token": nll / sum(len(sample.answer) for sample in samples),
        "bits_per_element": size.bits_per_element if candidate.scheme else float(loaded.model.dtype.itemsize * 8),
    }
    if spoke:
        said = [loaded.tokenizer.decode(one.greedy, skip_special_tokens=True) for one in replies]
        shares = [share_found(sample.expected, text) for sample, text in zip(samples, said, strict=True)]
        row |= {"found": sum(shares) / len(shares), "any_found": sum(share > 0 for share in shares) / len(shares)}
        row["said"] = said
    return row


def table(rows: Sequence[Row], column: Callable[[Row], str], show: Callable[[Sequence[Row]], str]) -> str:
    """A line per scheme: its bits at the longest context, then what to `show` of the rows of each `column`."""
    columns = list(dict.fromkeys(column(row) for row in rows))
    lines = []
    for scheme, records in dict.fromkeys((row["scheme"], row["records"]) for row in rows):
        own = [row for row in rows if (row["scheme"], row["records"]) == (scheme, records)]
        longest = max(own, key=lambda row: row["context"])
        shown = {name: show([row for row in own if column(row) == name]) for name in columns}
        lines.append({"scheme": scheme, "bits_per_element": longest["bits_per_element"], **shown})
    return format_table(lines)


def means(share: str, nll: str) -> Callable[[Sequence[Row]], str]:
    """Shows the means of these two fields over rows, `0.75 (1.20)`."""

    def show(rows: Sequence[Row]) -> str:
        first, second = (sum(row[field] for row in rows) / len(rows) for field in (share, nll))
        return f"{first:.2f} ({second:.2f})"

    return show
