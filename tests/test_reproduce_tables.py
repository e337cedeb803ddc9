"""The paper's tables as data and as rows: every cell can be run, is run once, and stands beside the paper's figure."""

from collections.abc import Callable
from pathlib import Path

import pytest

import scripts.reproduce_tables
from gradients.__main__ import main as record_main
from gradients.cli import UserError
from gradients.records import Records
from quant.results import read_rows
from scripts.bench.fit_shape import main as fit_shape_main
from scripts.bench.simulation import main as simulation_main
from scripts.experiments.paper_tables import MODELS, TABLES, Table, corpus_table
from scripts.readme_tables import cell_table
from scripts.reproduce_tables import main, paper_model

Command = Callable[..., list[str]]


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
def command(llama_folder: Path, text_file: Path, records: Records, tmp_path: Path) -> Command:
    """The command line for some tables on the tiny Llama."""

    def build(*options: str) -> list[str]:
        where = ["--model", str(llama_folder), "--records", str(records.folder), "--text", f"{text_file}:50-100"]
        return [*where, "--seqlen", "33", "--windows", "2", "--results", str(tmp_path / "tables.jsonl"), *options]

    return build


def test_every_cell_gets_one_row_and_shares_equal_evaluations(command: Command, tmp_path: Path) -> None:
    assert main(command("--tables", "ranges", "outliers", "datatypes"))["rows_added"] == 4 + 9 + 5
    rows = read_rows(tmp_path / "tables.jsonl")
    by_cell = {(row["table"], row["cell"]): row for row in rows}
    assert len(by_cell) == len(rows)
    same = [
        by_cell["ranges", "nuq3, calibrated"],
        by_cell["outliers", "none"],
        by_cell["datatypes", "nuq3, Fisher s^2"],
    ]
    assert len({row["nll"] for row in same}) == 1 and same[0]["scheme"] == "nuq3 sink_tokens=0"
    assert by_cell["ranges", "nuq3, online"]["nll"] != same[0]["nll"]
    assert all(row["paper"] is None for row in rows)
    assert all(row["baseline_nll"] == rows[0]["baseline_nll"] for row in rows)


def test_a_rerun_runs_only_what_is_missing(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = scripts.reproduce_tables.evaluate_many, []

    def stop_at_second(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(scripts.reproduce_tables, "evaluate_many", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            main(command("--tables", "sinks"))
    kept = read_rows(tmp_path / "tables.jsonl")
    assert 0 < len(kept) < 8
    assert main(command("--tables", "sinks"))["rows_added"] == 8 - len(kept)
    assert main(command("--tables", "sinks"))["rows_added"] == 0
    assert read_rows(tmp_path / "tables.jsonl")[: len(kept)] == kept


def test_other_lengths_cover_the_same_text(command: Command, tmp_path: Path) -> None:
    main(command("--tables", "calibration", "--windows", "2"))
    windows = {row["cell"]: row["calibration_windows"] for row in read_rows(tmp_path / "tables.jsonl")}
    assert windows["nuq3-1%, 1 windows"] == 1 and windows["nuq3-1%, all windows"] == 4
    assert scripts.reproduce_tables.windows_of(16, scripts.reproduce_tables.Namespace(windows=2, seqlen=64)) == 8
    assert scripts.reproduce_tables.windows_of(256, scripts.reproduce_tables.Namespace(windows=2, seqlen=64)) == 1


def test_another_corpus_gets_rows_of_its_own(command: Command, record_arguments: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    record_main([*record_arguments, "--seed", "5", "--output", str(other)])
    added = main(command("--tables", "corpora", "--other-records", f"noise={other}"))["rows_added"]
    rows = {row["cell"]: row for row in read_rows(tmp_path / "tables.jsonl")}
    assert added == len(rows) == 4
    assert rows["nuq3-1%, calibrated on noise"]["nll"] != rows["nuq3-1%, calibrated on the main text"]["nll"]


def test_bad_input_is_refused_by_name(command: Command, llama_folder: Path) -> None:
    with pytest.raises(UserError, match=r"'c4' is not of the form NAME=FOLDER"):
        main(command("--other-records", "c4"))
    with pytest.raises(UserError, match="--results is needed"):
        main(["--model", str(llama_folder), "--records", "r", "--text", "pydoc"])


def test_the_papers_column_appears_with_its_figures() -> None:
    row = {
        "cell": "nuq3",
        "bits_per_element": 3.1,
        "perplexity": 6.0,
        "nll": 1.8,
        "baseline_nll": 1.75,
        "scheme": "nuq3",
    }
    assert "paper" not in cell_table([row | {"paper": None}])
    assert "| 5.94 |" in cell_table([row | {"paper": 5.94}])


def test_benchmarks_of_the_laboratory(llama_folder: Path, records: Records, tmp_path: Path) -> None:
    """They run and write rows; what they measure is not for a test."""
    shape = ["--heads", "2", "--head-dim", "8", "--windows", "2", "--seqlen", "64", "--jobs", "1"]
    rows = fit_shape_main([*shape, "--results", str(tmp_path / "shape.jsonl")])["rows"]
    assert [row["scheme"] for row in rows] == ["nuq3-1%", "rdnuq3.4"]
    assert rows[0]["scaled_minutes"] == pytest.approx(rows[0]["seconds"] * 16 / 60)
    where = ["--model", str(llama_folder), "--records", str(records.folder), "--seqlen", "33", "--pairs", "2"]
    simulation_main([*where, "--results", str(tmp_path / "simulation.jsonl")])
    assert {row["scheme"] for row in read_rows(tmp_path / "simulation.jsonl")} == {"nuq3-1%", "rdnuq3.4"}
    assert len(read_rows(tmp_path / "shape.jsonl")) == 2
