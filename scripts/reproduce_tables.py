r"""Regenerate the paper's perplexity and ablation tables for a model, with the paper's figures beside ours.

    python -m scripts.reproduce_tables --model huggyllama/llama-7b --records records/llama-7b --text wikitext2
    python -m scripts.reproduce_tables --model ./smollm2 --records records/ --text notes.txt:50-100 --seqlen 512 \
        --windows 12 --tables axes datatypes outliers --other-records pydoc=records-pydoc/ --results tables.jsonl

One JSONL row per cell (`scripts/experiments/paper_tables.py` lists them); cells that the results file already holds are not run
again, and an interrupted run continues. Cells that ask for the same evaluation share it. Under `accelerate launch`
(`torchrun` on CPUs) the windows of every cell are split over processes. Windows do not begin with <bos>, as in the paper's code,
and so should those of the records: record with --no-bos.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradients.__main__ import add_model_arguments, check_seqlen, load_model_from
from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from gradients.loading import LoadedModel
from gradients.processes import process_state
from gradients.records import Records
from gradients.text import Corpus
from quant.evaluate import add_evaluation_arguments, append_result, evaluate_many, evaluation_corpus, result_identity
from quant.fit import fit
from quant.results import is_of, read_rows
from scripts.experiments.paper_tables import MODELS, TABLES, Cell, Table, cell_table, corpus_table
from scripts.report.cells import Row

_BATCH = 4  # evaluations between two writes: they share the unquantized pass


@dataclass(frozen=True)
class Evaluation:
    """What a cell asks to be run; cells of several tables may ask for the same."""

    scheme: str
    records: str
    calibration_windows: int
    seqlen: int
    model: str
    text: str
    windows: int | None  # None: all that the text holds
    weights: str
    text_digest: str
    bos: bool
    dtype: str

    @property
    def fit(self) -> tuple[Any, ...]:
        """What is fitted for it."""
        return self.scheme, self.records, self.calibration_windows

    def matches(self, row: Row) -> bool:
        """Whether a row of the results holds it."""
        return is_of(row, vars(self))


def evaluation_of(cell: Cell, records: dict[str | None, Records], identity: Row, arguments: Namespace) -> Evaluation:
    """What is to be run for a cell."""
    manifest = records[cell.corpus].manifest
    scheme = cell.parse()
    seqlen = cell.seqlen or arguments.seqlen
    return Evaluation(
        **identity | {"seqlen": seqlen},
        scheme="unquantized" if scheme is None else scheme.describe(),
        records=manifest.digest,
        calibration_windows=cell.calibration_windows or manifest.windows,
        windows=windows_of(seqlen, arguments),
    )


def windows_of(seqlen: int, arguments: Namespace) -> int | None:
    """Windows of this length that cover as much text as `--windows` of `--seqlen`."""
    return None if arguments.windows is None else max(1, arguments.windows * arguments.seqlen // seqlen)


def paper_model(name: str) -> str | None:
    """The paper's name of a model: `meta-llama/Llama-2-7b-hf` is `llama-2-7b`."""
    folder = Path(name).name.lower().removesuffix("-hf").replace("meta-", "").replace("-v0.1", "")
    return folder if folder in MODELS else None


def run(
    wanted: dict[Evaluation, list[tuple[Table, Cell]]],
    records: dict[str | None, Records],
    loaded: LoadedModel,
    corpus: Corpus,
    arguments: Namespace,
) -> int:
    """Evaluate what is wanted, a few at a time; returns how many rows were added."""
    added, fits = 0, Counter(evaluation.fit for evaluation in wanted)
    kept: dict[tuple[Any, ...], Any] = {}  # of several lengths of windows

    def fitted(evaluation: Evaluation) -> Any:
        if evaluation.fit in kept:
            return kept[evaluation.fit]
        quantizers = _fitted(wanted[evaluation][0][1], records, arguments.jobs)
        if fits[evaluation.fit] > 1:
            kept[evaluation.fit] = quantizers
        return quantizers

    for seqlen in sorted({evaluation.seqlen for evaluation in wanted}):
        of_length = [evaluation for evaluation in wanted if evaluation.seqlen == seqlen]
        setting = Namespace(**{**vars(arguments), "seqlen": seqlen, "windows": windows_of(seqlen, arguments)})
        check_seqlen(loaded, seqlen)
        windows = corpus.evaluation_windows(seqlen, setting.windows)
        for start in range(0, len(of_length), _BATCH):
            batch = of_length[start : start + _BATCH]
            candidates = [fitted(evaluation) for evaluation in batch]
            for quantizers in candidates:
                if quantizers is not None:
                    quantizers.check_run(loaded, corpus.bos is not None)
            for evaluation, result in zip(batch, evaluate_many(loaded.model, windows, candidates), strict=True):
                for table, cell in wanted[evaluation]:
                    append_result(_row(table, cell, evaluation, result), loaded, corpus, setting)
                    added += 1
    return added


def _fitted(cell: Cell, records: dict[str | None, Records], jobs: int) -> Any:
    scheme = cell.parse()
    return None if scheme is None else fit(records[cell.corpus].first(cell.calibration_windows), scheme, jobs)


def _row(table: Table, cell: Cell, evaluation: Evaluation, result: Row) -> Row:
    where = {"table": table.name, "cell": cell.label, "source": table.source}
    return {**where, **result, **vars(evaluation), "paper": cell.paper.get(paper_model(evaluation.model) or "")}


def missing(
    tables: Iterable[Table],
    rows: Sequence[Row],
    records: dict[str | None, Records],
    identity: Row,
    arguments: Namespace,
) -> dict[Evaluation, list[tuple[Table, Cell]]]:
    """The cells without a row, by what has to be run for them."""
    wanted: dict[Evaluation, list[tuple[Table, Cell]]] = {}
    for table in tables:
        for cell in table.cells:
            evaluation = evaluation_of(cell, records, identity, arguments)
            of_cell = (row for row in rows if (row["table"], row["cell"]) == (table.name, cell.label))
            if not any(evaluation.matches(row) for row in of_cell):
                wanted.setdefault(evaluation, []).append((table, cell))
    return wanted


def show(tables: Iterable[Table], rows: Sequence[Row]) -> None:
    """Print every table for people."""
    for table in tables:
        latest = {row["cell"]: row for row in rows if row["table"] == table.name}
        shown = [latest[cell.label] for cell in table.cells if cell.label in latest]
        print(f"\n{table.title} (the paper's {table.source})\n{format_table(cell_table(shown))}")


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The command; returns its JSON summary (None in all but the main process)."""
    names = [table.name for table in TABLES]
    parser = command_parser("scripts.reproduce_tables", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--records", required=True, help="folder written by `python -m gradients`")
    parser.add_argument("--other-records", nargs="+", default=[], metavar="NAME=FOLDER", help="of other corpora")
    parser.add_argument("--tables", nargs="+", choices=[*names, "corpora"], help="default: all")
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes to fit layers in (1)")
    add_evaluation_arguments(parser, bos=False)
    arguments = parser.parse_args(argv)
    if arguments.results is None:
        raise UserError(
            "--results is needed: a JSONL file that takes one row per cell, and from which a rerun continues"
        )

    records: dict[str | None, Records] = {None: Records.open(arguments.records)}
    for given in arguments.other_records:
        name, separator, folder = given.partition("=")
        if not separator:
            raise UserError(f"--other-records {given!r} is not of the form NAME=FOLDER, such as c4=records/c4")
        records[name] = Records.open(folder)
    others = [name for name in records if name is not None]
    known = [*TABLES, *([corpus_table(others)] if others else [])]
    tables = [table for table in known if not arguments.tables or table.name in arguments.tables]
    state = process_state()
    loaded = load_model_from(arguments)
    corpus = evaluation_corpus(loaded, arguments)
    identity = result_identity(loaded, corpus, arguments)
    wanted = missing(tables, read_rows(arguments.results), records, identity, arguments)
    state.wait_for_everyone()  # all have read the same rows before the first is added
    added = run(wanted, records, loaded, corpus, arguments) if wanted else 0
    if not state.is_main_process:
        return None
    show(tables, read_rows(arguments.results))
    return {"results": arguments.results, "tables": [table.name for table in tables], "rows_added": added}


if __name__ == "__main__":
    run_command(main)
