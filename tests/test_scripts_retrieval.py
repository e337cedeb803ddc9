"""The needle and RULER commands: three ways to run, resumed runs, heat maps."""

import sys
from typing import Any

import pytest

from gradients.cli import UserError
from quant.results import read_rows
from quant.scheme import Scheme
from scripts.retrieval import needle, ruler, shared

# the commands


@pytest.fixture
def common(llama_folder, tmp_path) -> list[str]:
    results = ["--results", str(tmp_path / "rows.jsonl"), "--samples", "2", "--lengths", "400"]
    return ["--model", str(llama_folder), "--device", "cpu", *results]


CELLS = {needle: ["--depths", "0", "1"], ruler: ["--tasks", "niah_single", "vt"]}
COMMANDS = pytest.mark.parametrize("command", CELLS, ids=lambda command: command.__name__.split(".")[1])


@COMMANDS
def test_every_way_to_run_gets_its_rows(command: Any, common, quantizers_file, tmp_path, capsys) -> None:
    arguments = [*common, *CELLS[command], "--quantizers", str(quantizers_file)]
    assert command.main(arguments)["rows_added"] == 4
    added = command.main([*arguments, "--packed", "--no-exact-chunk", "--prefill-chunk", "100"])["rows_added"]
    assert added == 2, "the model as it is was measured already"
    rows = read_rows(tmp_path / "rows.jsonl")
    by_mode = {mode: [row for row in rows if row["mode"] == mode] for mode in ("unquantized", "simulated", "packed")}
    assert [len(group) for group in by_mode.values()] == [2, 2, 2]
    for simulated, packed in zip(by_mode["simulated"], by_mode["packed"], strict=True):
        assert packed["answer_nll"] == pytest.approx(simulated["answer_nll"], rel=1e-3)
        assert packed["said"] == simulated["said"]
        # the packed cache was measured with what the model said in it
        assert packed["bits_per_element"] == pytest.approx(simulated["bits_per_element"], rel=0.05)
    for row in rows:
        assert row["model"] == "tiny-llama" and row["context"] == 400 and len(row["said"]) == 2
        assert 0 <= row["found"] <= row["any_found"] <= 1 and row["nll_per_token"] < row["answer_nll"]
    assert by_mode["unquantized"][0]["bits_per_element"] == 32
    printed = capsys.readouterr().out
    assert f"({rows[0]['nll_per_token']:.2f})" in printed or command is needle
    assert "nuq3-1%" in printed


def test_fitted_quantizers_keep_as_many_tokens_exact_as_asked(common: list[str], quantizers_file, tmp_path) -> None:
    arguments = [*common, "--depths", "1", "--quantizers", str(quantizers_file)]
    exact = ["--sink-tokens", "4", "--residual-tokens", "40"]
    needle.main([*arguments, *exact])
    needle.main([*arguments, *exact, "--packed", "--no-exact-chunk"])
    _, simulated, packed = read_rows(tmp_path / "rows.jsonl")
    assert simulated["scheme"] == packed["scheme"] == "nuq3-1% sink_tokens=4 residual_tokens=40"
    assert packed["answer_nll"] == pytest.approx(simulated["answer_nll"], rel=1e-3)
    assert simulated["bits_per_element"] > 4


@COMMANDS
def test_an_interrupted_run_goes_on_where_it_stopped(
    command: Any, common, quantizers_file, tmp_path, monkeypatch
) -> None:
    arguments = [*common, *CELLS[command], "--quantizers", str(quantizers_file)]
    command.main(arguments)
    results = tmp_path / "rows.jsonl"
    whole = read_rows(results)
    assert len(whole) == 4
    results.unlink()
    replies = 0

    def interrupted(*a: Any, **kwargs: Any) -> Any:
        nonlocal replies
        replies += 1
        if replies == 6:
            raise KeyboardInterrupt
        return reply(*a, **kwargs)

    reply = shared.reply
    monkeypatch.setattr("scripts.retrieval.shared.reply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    kept = results.read_text()
    assert len(read_rows(results)) == 2
    assert command.main(arguments)["rows_added"] == 2
    assert results.read_text().startswith(kept)
    assert replies == 5 + 1 + 4, "the second run asks only what the first did not finish"
    measured = ("scheme", "found", "nll_per_token", "said")
    assert [[row[name] for name in measured] for row in read_rows(results)] == [
        [row[name] for name in measured] for row in whole
    ]
    before = results.read_text()
    assert command.main(arguments)["rows_added"] == 0 and results.read_text() == before


@COMMANDS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "400", "90"], "more than the 90 asked for"),
        (["--lengths", "400", "510"], "tiny-llama' has 512"),
        (["--quantizers", "missing.st"], "'missing.st' cannot be read"),
        (["--schemes", "nuq3"], "give --records"),
        (["--chat-template"], "tokenizer has none"),
        (["--samples", "0"], "not a positive integer"),
        (["--lengths", "many"], "invalid positive_int value: 'many'"),
    ],
)
def test_bad_requests_are_refused_and_write_nothing(
    command: Any, options: list[str], message: str, common, tmp_path, snapshot
) -> None:
    results = tmp_path / "rows.jsonl"
    results.write_text('{"scheme": "of another run"}\n')
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=message):
        command.main([*common, *CELLS[command], *options])
    assert snapshot(tmp_path) == before


def test_requests_that_one_command_refuses(common, tmp_path, text_file) -> None:
    for command, options, message in (
        (needle, ["--depths", "1.5"], "1.5 is not a depth from 0 to 1"),
        (needle, ["--text", "missing.txt"], "'missing.txt' cannot be read"),
        (ruler, ["--tasks", "qa"], "invalid choice: 'qa'"),
    ):
        with pytest.raises(UserError, match=message):
            command.main([*common, *options])
    assert not list(tmp_path.iterdir())
    assert needle.main([*common, "--depths", "0.5", "--text", str(text_file)])["rows_added"] == 1
    assert read_rows(tmp_path / "rows.jsonl")[0]["text"] == text_file.name


@COMMANDS
def test_results_that_cannot_be_used(command: Any, common, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"scheme": "nuq3')
    with pytest.raises(UserError, match="holds a line that is no row.*remove that line"):
        command.main([*common, *CELLS[command]])
    (tmp_path / "rows.jsonl").write_text("")
    for bad in (tmp_path, tmp_path / "rows.jsonl" / "rows.jsonl"):
        with pytest.raises(UserError, match="cannot be (read|written)"):
            command.main([*common, *CELLS[command], "--results", str(bad)])


def test_quantizers_of_another_model(common, tmp_path, make_model, fit_model) -> None:
    fit_model(make_model("qwen2"), Scheme.parse("nuq3")).save(tmp_path / "other.safetensors")
    for mode in (["--packed"], []):
        with pytest.raises(UserError, match="another model"):
            needle.main([*common, *mode, "--quantizers", str(tmp_path / "other.safetensors")])
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_heat_map_at_the_end_of_a_run(common, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(UserError, match="plots need matplotlib"):
            needle.main([*common, "--depths", "0", "--heat-map", str(tmp_path / "map.png")])
        assert not list(tmp_path.iterdir()), "it is said before anything is measured"
    summary = needle.main([*common, "--depths", "0", "--heat-map", str(tmp_path / "map.png")])
    assert summary["heat_map"] == str(tmp_path / "map.png") and (tmp_path / "map.png").exists()
