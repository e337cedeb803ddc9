"""The paper's tables as data and as rows: every cell can be run, is run once, and stands beside the paper's figure."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gradients.records import Records
from quant.results import read_rows
from scripts.bench.overhead import main as overhead_main
from scripts.experiments.paper_tables import MODELS, TABLES, Table, corpus_table
from scripts.reproduce_tables import paper_model

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
        assert len(read_rows(tmp_path / "shape.jsonl")) == 2

    where = ["--model", str(llama_folder), "--text", str(text_file), "--seqlen", "33", "--windows", "2", "--results"]
    for what, schemes in (("recording", [None]), ("simulation", ["nuq3-1%", "rdnuq3.4"])):
        overhead_main([what, *where, str(tmp_path / what)])
        rows = read_rows(tmp_path / what)
        assert [row.get("scheme") for row in rows] == schemes and all(row["windows"] == 2 for row in rows)
        assert all(row["smallest_ratio"] <= row["median_ratio"] <= row["largest_ratio"] for row in rows)
