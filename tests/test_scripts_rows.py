"""What the scripts compute: README tables, the quickstart's table, resumed sweeps, result rows."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from gradients.cli import UserError
from quant.evaluate import main as evaluate_main
from quant.results import append_row, read_rows
from quant.scheme import Scheme
from scripts import sweep_schemes
from scripts.readme_tables import DOCUMENTS, TABLES, TEXTS, with_tables
from scripts.report.quickstart_table import table_rows
from scripts.sweep_schemes import main as sweep_main


def test_the_readme_shows_the_rows() -> None:
    text = "".join((REPOSITORY / name).read_text() for name in DOCUMENTS)
    assert with_tables(text) == text, "run `python -m scripts.readme_tables`"
    assert all(f"<!-- table: {name} -->" in text for name in [*TABLES, *TEXTS])


def test_an_outdated_table_is_noticed() -> None:
    text = "before\n<!-- table: schemes -->\n| old |\n<!-- end -->\nafter\n"
    renewed = with_tables(text)
    assert "old" not in renewed and "nuq3-1%" in renewed
    assert renewed.startswith("before\n<!-- table: schemes -->\n| scheme |") and renewed.endswith(
        "<!-- end -->\nafter\n"
    )


COMMANDS = [path for path in (REPOSITORY / "scripts").rglob("*.py") if "run_command(main)" in path.read_text()]


def test_every_script_has_a_line_in_their_readme() -> None:
    text = (REPOSITORY / "scripts" / "README.md").read_text()
    assert len(COMMANDS) > 20
    for path in [*COMMANDS, *(REPOSITORY / "scripts").rglob("*.sh")]:
        assert f"{path.stem}`" in text or f"{path.name}`" in text, path


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_help_calls_a_script_by_the_name_it_is_run_by(path: Path, capsys) -> None:
    module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    imported = importlib.import_module(module)
    with pytest.raises(SystemExit, match="0"):
        imported.main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m {module} ")
    assert f" -m {module}" in imported.__doc__


def test_quickstart_table_has_bytes_and_changes(records) -> None:
    result = {"scheme": "nuq3-1%", "bits_per_element": 3.5, "perplexity": 11.0, "baseline_nll": math.log(10), "kl": 0.1}
    plain, quantized = table_rows([result], records.manifest.fingerprint)
    elements = 2 * 2 * 24  # keys and values, layers, C
    assert plain["kilobytes_per_token"] == elements * 2 / 1000 and plain["change_percent"] == pytest.approx(0)
    assert quantized["kilobytes_per_token"] == elements * 3.5 / 8 / 1000
    assert quantized["change_percent"] == pytest.approx(10)


def test_an_interrupted_sweep_goes_on(llama_folder, text_file, records, tmp_path, monkeypatch) -> None:
    results, whole = tmp_path / "rows.jsonl", sweep_schemes.evaluate_many
    arguments = ["--model", str(llama_folder), "--device", "cpu", "--records", str(records.folder), "--text"]
    arguments += [str(text_file), "--seqlen", "33", "--windows", "2", "--results", str(results), "--together", "2"]
    arguments += ["--schemes", "int2", "int3", "int4"]
    evaluated: list[str] = []

    def evaluate(model: Any, windows: Any, candidates: Any) -> Any:
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        evaluated.extend(quantizers.scheme.describe() for quantizers in candidates)
        return whole(model, windows, candidates)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_schemes, "evaluate_many", evaluate)
        with pytest.raises(KeyboardInterrupt):
            sweep_main(arguments)
    assert [row["scheme"] for row in read_rows(results)] == evaluated == ["int2", "int3"]
    first = results.read_text()
    assert [sweep_main(arguments)["rows_added"] for _ in range(2)] == [1, 0]
    assert results.read_text().startswith(first)
    assert [row["scheme"] for row in read_rows(results)] == ["int2", "int3", "int4"]
    # another option is another scheme
    assert sweep_main([*arguments[:-2], "--sink-tokens", "0"])["rows_added"] == 1


def test_a_sweep_of_fewer_calibration_windows_is_another(llama_folder, text_file, records, tmp_path) -> None:
    results = tmp_path / "rows.jsonl"
    arguments = ["--model", str(llama_folder), "--device", "cpu", "--records", str(records.folder), "--text"]
    arguments += [str(text_file), "--seqlen", "33", "--windows", "2", "--results", str(results), "--schemes", "nuq2"]
    assert sweep_main([*arguments, "--calibration-windows", "1"])["rows_added"] == 1
    assert sweep_main(arguments)["rows_added"] == 1
    assert sweep_main([*arguments, "--calibration-windows", "4"])["rows_added"] == 0  # which is all of them
    assert sweep_main([*arguments, "--calibration-windows", "1"])["rows_added"] == 0
    one, all_of_them = read_rows(results)
    assert (one["calibration_windows"], all_of_them["calibration_windows"]) == (1, 4)
    assert one["nll"] != all_of_them["nll"]
    with pytest.raises(UserError, match="5 calibration windows .* hold 4"):
        sweep_main([*arguments, "--calibration-windows", "5"])


def test_rows_say_where_they_come_from(tmp_path) -> None:
    append_row(tmp_path / "deep" / "rows.jsonl", {"figure": 1.5})
    append_row(None, {"figure": 2.5})
    row = json.loads((tmp_path / "deep" / "rows.jsonl").read_text())
    assert row["figure"] == 1.5 and {"device", "versions", "commit", "threads"} <= row.keys()


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "scripts" / "results").glob("*.jsonl")), ids=lambda path: path.stem
)
def test_committed_rows_carry_their_commit(path: Path) -> None:
    for row in read_rows(path):
        assert row["commit"] not in ("", "unknown") and row["versions"]["torch"]
        if row.get("scheme", "unquantized") != "unquantized":
            assert Scheme.parse(row["scheme"].split()[0])


def test_scripts_refuse_layers_that_are_not_there_and_outputs_that_are_taken(records, llama_folder, tmp_path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("something")
    compiled = ["--bits", "4", "--queries", "1"]
    layers, output = ["--records", str(records.folder), "--layers", "99"], "taken"
    commands: list[tuple[str, list[str], str]] = [
        ("experiments.ablate_allocation", layers, "--layers 99 is not in the records; they hold 0, 1"),
        ("bench.fit", layers, "--layers 99 is not in the records; they hold 0, 1"),
        ("bench.random_model", ["--shape", "tiny", "--device", "cpu", "--output", str(taken)], output),
        ("convert_gguf", [str(llama_folder), str(taken)], output),
        ("convert_gguf", [str(llama_folder), str(tmp_path)], "holds no model; give another folder"),
        ("checks.compile_kernels", [*compiled, "--targets", "12"], "--targets: invalid choice: 12"),
        ("checks.compile_kernels", [*compiled, "--outliers", "-1"], "--outliers -1 is not a share"),
    ]
    for name, arguments, message in commands:
        with pytest.raises(UserError, match=message):
            importlib.import_module(f"scripts.{name}").main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and taken.read_text() == "something"


def test_a_row_is_not_appended_to_what_was_left_of_another(tmp_path) -> None:
    """One line to remove, and not two rows lost."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"figure": 1.5}\n{"figu')
    append_row(path, {"figure": 2.5})
    with pytest.raises(UserError, match="remove that line"):
        read_rows(path)
    path.write_text("".join(line for line in path.open() if not line.endswith("figu\n")))
    assert [row["figure"] for row in read_rows(path)] == [1.5, 2.5]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_row_without_room_is_said_and_shown(llama_folder, text_file, capsys) -> None:
    arguments = ["--model", str(llama_folder), "--text", str(text_file), "--seqlen", "33", "--windows", "1"]
    with pytest.raises(UserError, match="results '/dev/full' cannot be written .*No space left"):
        evaluate_main([*arguments, "--results", "/dev/full"])
    assert "unquantized" in capsys.readouterr().out
