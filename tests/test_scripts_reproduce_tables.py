"""The paper's tables as data and as rows: every cell can be run, is run once, and stands beside the paper's figure."""

from collections.abc import Callable

import pytest

import scripts.reproduce_tables
from gradients.__main__ import main as record_main
from gradients.cli import UserError
from quant.results import read_rows
from scripts.bench.fit_shape import main as fit_shape_main
from scripts.bench.overhead import main as overhead_main
from scripts.experiments.paper_tables import MODELS, TABLES, Cell, Table, corpus_table
from scripts.reproduce_tables import main, paper_model


@pytest.mark.parametrize("table", [*TABLES, corpus_table(["c4"])], ids=lambda table: table.name)
def test_cells_are_distinct_and_their_schemes_exist(table: Table) -> None:
    labels = [cell.label for cell in table.cells]
    assert len(set(labels)) == len(labels)
    asked = set()
    for cell in table.cells:
        scheme = cell.parse()
        described = None if scheme is None else scheme.describe()
        asked.add((described, cell.calibration_windows, cell.seqlen, cell.corpus))
        assert cell.paper.keys() <= set(MODELS)
    assert len(asked) == len(labels)


def test_the_papers_own_cells_have_the_papers_figures() -> None:
    """A figure read off the paper by hand for each table that has some (LLaMA-7B)."""
    by_table = {table.name: {cell.label: cell.paper.get("llama-7b") for cell in table.cells} for table in TABLES}
    assert by_table["methods"]["nuq3-1%"] == 5.75
    assert by_table["axes"]["int3, keys per channel before RoPE"] == 6.23
    assert by_table["datatypes"]["nuq3, k-means without weights"] == 6.84
    assert by_table["outliers"]["1 %, thresholds per matrix"] == 5.85
    assert by_table["sinks"]["nuq2, no sink"] == 8.47
    assert by_table["ranges"]["nuq3, online"] == 5.91


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("huggyllama/llama-7b", "llama-7b"),
        ("meta-llama/Llama-2-13b-hf", "llama-2-13b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("./smollm2", None),
    ],
)
def test_the_papers_models_are_recognised(name: str, expected: str | None) -> None:
    assert paper_model(name) == expected


@pytest.fixture
def command(llama_folder, text_file, records, tmp_path) -> Callable[..., list[str]]:
    """The command line for some tables on the tiny Llama."""

    def build(*options: str) -> list[str]:
        where = ["--model", str(llama_folder), "--records", str(records.folder), "--text", f"{text_file}:50-100"]
        return [*where, "--seqlen", "33", "--windows", "2", "--results", str(tmp_path / "tables.jsonl"), *options]

    return build


def test_every_cell_gets_one_row_and_shares_equal_evaluations(command, tmp_path) -> None:
    assert main(command("--tables", "ranges", "outliers", "datatypes"))["rows_added"] == 4 + 9 + 5
    rows = read_rows(tmp_path / "tables.jsonl")
    by_cell = {(row["table"], row["cell"]): row for row in rows}
    assert len(by_cell) == len(rows)
    equal = (("ranges", "nuq3, calibrated"), ("outliers", "none"), ("datatypes", "nuq3, Fisher s^2"))
    same = [by_cell[cell] for cell in equal]
    assert len({row["nll"] for row in same}) == 1 and same[0]["scheme"] == "nuq3 sink_tokens=0"
    assert by_cell["ranges", "nuq3, online"]["nll"] != same[0]["nll"]
    assert all(row["paper"] is None and row["baseline_nll"] == rows[0]["baseline_nll"] for row in rows)


def test_other_lengths_cover_the_same_text(command) -> None:
    arguments = scripts.reproduce_tables.Namespace(windows=2, seqlen=64)
    assert [scripts.reproduce_tables.windows_of(seqlen, arguments) for seqlen in (16, 256)] == [8, 1]


def test_a_scheme_is_fitted_once_for_all_lengths(command, monkeypatch) -> None:
    real, fitted = scripts.reproduce_tables.fit, []
    monkeypatch.setattr(scripts.reproduce_tables, "fit", lambda *what: fitted.append(what) or real(*what))
    cells = [Cell(f"{name}, {seqlen} tokens", name, seqlen=seqlen) for seqlen in (16, 33) for name in ("nuq2", "nuq3")]
    monkeypatch.setattr(scripts.reproduce_tables, "TABLES", (Table("seqlens", "Sequence lengths", "", cells),))
    assert main(command("--tables", "seqlens"))["rows_added"] == 4 and len(fitted) == 2


def test_another_corpus_gets_rows_of_its_own(command, record_arguments, tmp_path) -> None:
    record_main([*record_arguments, "--seed", "5", "--output", str(tmp_path / "other")])
    added = main(command("--tables", "corpora", "--other-records", f"noise={tmp_path / 'other'}"))["rows_added"]
    rows = {row["cell"]: row for row in read_rows(tmp_path / "tables.jsonl")}
    assert added == len(rows) == 4
    assert rows["nuq3-1%, calibrated on noise"]["nll"] != rows["nuq3-1%, calibrated on the main text"]["nll"]


def test_bad_input_is_refused_by_name(command, llama_folder) -> None:
    with pytest.raises(UserError, match=r"'c4' is not of the form NAME=FOLDER"):
        main(command("--other-records", "c4"))
    with pytest.raises(UserError, match="--results is needed"):
        main(["--model", str(llama_folder), "--records", "r", "--text", "pydoc"])


def test_benchmarks_of_fit_and_overhead_write_their_rows(llama_folder, text_file, tmp_path) -> None:
    """What they measure is not for a test."""
    shape = ["--heads", "2", "--head-dim", "8", "--windows", "2", "--seqlen", "64", "--jobs", "1"]
    (row, _) = fit_shape_main([*shape, "--results", str(tmp_path / "shape")])["rows"]
    assert row["scaled_minutes"] == pytest.approx(row["seconds"] * 16 / 60) and len(read_rows(tmp_path / "shape")) == 2
    where = ["--model", str(llama_folder), "--text", str(text_file), "--seqlen", "33", "--windows", "2", "--results"]
    for what, schemes in (("recording", [None]), ("simulation", ["nuq3-1%", "nuq3+fb", "rdnuq3.4+fb"])):
        overhead_main([what, *where, str(tmp_path / what)])
        rows = read_rows(tmp_path / what)
        assert [row.get("scheme") for row in rows] == schemes and all(row["windows"] == 2 for row in rows)
        assert all(row["smallest_ratio"] <= row["median_ratio"] <= row["largest_ratio"] for row in rows)
