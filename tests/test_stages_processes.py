"""Several processes share the windows: together they write the files, and report the figures, of one."""

from typing import Any

import pytest
import torch
from launched import launched

import scripts.reproduce_tables
from deployment.evaluate import main as deployed_main
from gradients.cli import UserError
from gradients.processes import gathered, own_share, require_one_process
from quant.evaluate import evaluate
from quant.evaluate import main as evaluate_main
from quant.results import read_rows
from scripts.reproduce_tables import main as tables_main


def without_speed(result: dict[str, Any] | None) -> dict[str, Any]:
    assert result is not None
    return {
        name: value for name, value in result.items() if name not in ("tokens_per_second", "commit")
    }  # somebody may commit meanwhile


def test_two_processes_do_the_work_of_one(
    record_arguments, records, llama_folder, text_file, quantizers_file, tmp_path, snapshot, monkeypatch
) -> None:
    """`accelerate launch` starts several only where there are several accelerators; `torchrun` does anywhere."""
    model = ["--model", str(llama_folder), "--device", "cpu"]
    text = ["--text", f"{text_file}:50-100", "--seqlen", "65", "--windows", "3"]
    quantizers = ["--quantizers", str(quantizers_file)]
    simulated, deployed = [*model, *text, *quantizers], [*model, *text, *quantizers, "--prefill-chunk", "16"]
    one_batch = [*deployed, "--batch", "3"]  # the second process has nothing to do
    tables = [*model, *text, "--records", str(records.folder), "--tables", "sinks"]
    results = {name: tmp_path / f"{name}.jsonl" for name in ("alone", "together", "deployed")}

    # an evaluation of the tables that is interrupted after its first cells, and those of one process
    evaluate_many, calls = scripts.reproduce_tables.evaluate_many, []

    def stop_at_second(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate_many(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(scripts.reproduce_tables, "evaluate_many", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            tables_main([*tables, "--results", str(results["together"])])
    finished = results["together"].read_text()
    tables_main([*tables, "--results", str(results["alone"])])

    (main_process, other), _ = launched(
        tmp_path,
        [
            ("gradients.__main__", [*record_arguments, "--output", str(tmp_path / "records")]),
            ("quant.evaluate", simulated),
            ("deployment.evaluate", [*deployed, "--results", str(results["deployed"])]),
            ("deployment.evaluate", one_batch),
            ("scripts.reproduce_tables", [*tables, "--results", str(results["together"])]),
            ("deployment.generate", [*model, *quantizers, "--prompt", "key"]),
        ],
    )
    refusal = "deployment.generate is one process's work and 2 were started"
    assert other[:-1] == [None] * 5, "only the main process reports"
    assert refusal in other[-1] and refusal in main_process[-1]

    assert snapshot(tmp_path / "records") == snapshot(records.folder)
    assert (main_process[0]["windows"], main_process[0]["recorded_now"]) == (4, 4), "of both"
    assert without_speed(main_process[1]) == without_speed(evaluate_main(simulated))
    assert without_speed(main_process[2]) == without_speed(deployed_main(deployed))
    assert without_speed(main_process[3]) == without_speed(deployed_main(one_batch))
    assert len(read_rows(results["deployed"])) == 1, "only the main process writes"

    assert results["together"].read_text().startswith(finished), "finished cells are not run again"
    together, alone = ([without_speed(row) for row in read_rows(results[name])] for name in ("together", "alone"))
    assert together == alone and len(alone) == 8
    assert main_process[4]["rows_added"] == 8 - len(finished.splitlines()) < 8


class Several:
    """What a process of several sees of the others."""

    num_processes, is_main_process, device = 2, False, torch.device("cpu")

    def __init__(self, index: int) -> None:
        self.process_index = index


def test_shares_are_disjoint_and_complete(monkeypatch) -> None:
    shares = []
    for index in (0, 1):
        monkeypatch.setattr("gradients.processes.process_state", lambda index=index: Several(index))
        shares.append(list(own_share(5)))
        assert list(own_share(0)) == []
    assert shares == [[0, 2, 4], [1, 3]]
    with pytest.raises(UserError, match="this is one process's work and 2 were started; start one"):
        require_one_process("this")


def test_one_process_gathers_what_it_has() -> None:
    rows = torch.rand(3, 2, dtype=torch.float64)
    assert gathered(rows) is rows and list(own_share(3)) == [0, 1, 2]
    require_one_process("this")


def test_other_processes_append_nothing(llama, quantizers, llama_folder, text_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("quant.evaluate.process_state", lambda: Several(1))
    arguments = ["--model", str(llama_folder), "--text", str(text_file), "--seqlen", "33", "--windows", "2"]
    assert evaluate_main([*arguments, "--device", "cpu", "--results", str(tmp_path / "rows")]) is None
    assert not (tmp_path / "rows").exists()
    assert evaluate(llama, torch.full((1, 9), 5), quantizers)["tokens"] == 8


def test_a_map_and_several_processes_are_refused(llama_folder, monkeypatch) -> None:
    monkeypatch.setattr("gradients.placement.process_state", lambda: Several(1))
    with pytest.raises(
        UserError, match="--device-map auto spreads a model that each of 2 processes has its own device"
    ):
        evaluate_main(["--model", str(llama_folder), "--text", "pydoc", "--device-map", "auto"])
