"""What becomes of rows measured on GPUs: tables, and the plot of microseconds against context."""

import json
from typing import Any

import pytest

from gradients.cli import UserError
from scripts.report import figures, plot_speed
from scripts.report.gpu_tables import (
    device_table,
    generate_table,
    parallel_table,
    prefill_table,
    processes_table,
    sharded_table,
    speed_table,
)

Row = dict[str, Any]


def layer_row(scheme: str, context: int, us: float, fp16_us: float, **other: Any) -> Row:
    step = {"op": "decode", "us": us, "fp16_us": fp16_us, "speedup": fp16_us / us, "percent_of_copy": 50.0}
    sizes = {"copy_gb_per_s": 2.0, "bytes_per_token": 100.0, "fp16_bytes_per_token": 400.0}
    row = {
        "shape": "llama-7b",
        "scheme": scheme,
        "context": context,
        "batch": 1,
        "path": "triton",
        "device": "NVIDIA H200",
    }
    return row | sizes | {"ops": [{"op": "append", "us": 1.0}, step]} | other


def model_row(cache: str, mode: str | None, rate: float | None, **other: Any) -> Row:
    row: Row = {"op": "decode", "shape": "llama-7b", "layers": 32, "context": 32768, "cache": cache, "device": "H200"}
    row |= {} if mode is None else {"mode": mode}
    row |= {} if rate is None else {"tokens_per_second": rate, "cache_bytes": 2e9, "peak_bytes": 16e9}
    return row | other


def test_the_last_of_equal_rows_counts() -> None:
    rows = [layer_row("nuq3-1%", 2048, 9, 10), layer_row("nuq3-1%", 2048, 5, 10), layer_row("nuq3-1%", 4096, 5, 10)]
    rows.append(layer_row("nuq3-1%", 4096, 5, 10, ops=[{"op": "prefill", "us": 9.0}]))  # takes nothing away
    header, cells = speed_table(rows)
    assert cells[0] == ["H200", "llama-7b", "1", "nuq3-1%", "2,048", "4.0x", "5", "10", "2.00x", "50 %"]
    assert len(cells) == 2 and len(header) == len(cells[0])
    # one that measured something else takes nothing away
    assert speed_table([*rows, {**rows[0], "ops": rows[0]["ops"][:1]}]) == (header, cells)


def test_whole_models_have_a_line_for_each_cache() -> None:
    rows = [
        model_row("fp16", "eager", 30.0),
        model_row("fp16", "graph", 80.04, peak_bytes=17e9),
        model_row("fp16", "generate", 75.5),
        model_row("fp16-dynamic", None, None, error="out of memory"),
        model_row("fp16-static", "eager", 20.0),
        model_row("fp16-static", "graph", None, error="not recorded: RuntimeError"),
        model_row("nuq2", None, None, op="prefill", chunk=512, tokens_per_second=9000.0),
        model_row("nuq2", None, None, op="prefill", chunk=256, tokens_per_second=8000.0),
        model_row("hqq4", None, None, op="prefill", error="not installed"),
    ]
    header, cells = generate_table(rows)
    what = ["H200", "llama-7b", "32,768"]
    assert cells == [
        [*what, "fp16", "30.0", "80.0", "75.5", "2.0", "17.0"],
        [*what, "fp16-dynamic", *["out of memory"] * 3, "", ""],
        [*what, "fp16-static", "20.0", "failed", "", "2.0", "16.0"],
    ]
    assert len(header) == 9
    assert prefill_table(rows)[1] == [
        [*what, "nuq2", "8000.0", "9000.0"],
        [*what, "hqq4", "not installed", "not installed"],
    ]


def test_several_gpus_have_a_line_for_each_run() -> None:
    memory = [{"held": 3 * 2**30, "predicted_held": 2 * 2**30}, {"held": 2**29, "predicted_held": 2**30}]
    row = {"shape": "llama-7b", "scheme": "nuq2", "context": 2049, "filled": "prefill", "world_size": 2}
    row |= {"device": "NVIDIA H100 80GB HBM3", "memory": memory, "tokens_per_second": 11.26}
    header, cells = sharded_table([row, {**row, "tokens_equal_one_device": False}])
    line = ["llama-7b", "nuq2", "2,049", "prefill", "2 x H100", "11.3", "3.00, 0.50", "2.00, 1.00"]
    assert cells == [[*line, ""], [*line, "no"]] and len(header) == len(cells[0])
    row = {"command": "gradients", "world_size": 2, "device": "H200", "identical": False, "largest_difference": 0.0064}
    header, cells = processes_table([row, {**row, "identical": True, "speedup": 1.158}])
    assert cells == [
        ["gradients", "2", "H200", "within 6.4e-03", ""],
        ["gradients", "2", "H200", "yes", "1.16x"],
    ]
    assert len(header) == len(cells[0])


def test_tensor_parallel_runs_are_compared_with_one_gpu() -> None:
    memory = [{"held": 2**30, "predicted_held": 2**30}, {"held": 2**31, "predicted_held": 2**30}]
    row = {"shape": "llama-7b", "scheme": "nuq2", "context": 2049, "device": "NVIDIA H100 80GB HBM3", "memory": memory}
    two, longest = row | {"world_size": 2, "tokens_per_second": 15.0}, row | {"world_size": 2, "context": 9000}
    one = row | {"world_size": 1, "tokens_per_second": 10.0, "memory": memory[:1]}
    check = {"part": "parallel", "same_tokens": 64}
    header, cells = parallel_table([longest | {"tokens_per_second": 5.0}, two, check, one])
    what = ["llama-7b", "nuq2"]
    assert cells == [
        [*what, "2,049", "1 x H100", "10.0", "", "1.00", "1.00"],
        [*what, "2,049", "2 x H100", "15.0", "1.50x", "2.00", "1.00"],
        [*what, "9,000", "2 x H100", "5.0", "", "2.00", "1.00"],
    ]
    assert len(header) == len(cells[0])


def test_a_device_has_a_line_for_each_scheme_and_dtype() -> None:
    row = {"device": "H200", "model": "m", "scheme": "nuq3-1%", "dtype": "float16", "tokens": 64}
    row |= {
        "nll_simulated": 3.44,
        "nll_packed": 3.441,
        "nll_difference": 2.9e-4,
        "equal_tokens": 63,
        "rounded_equal_tokens": 62,
    }
    header, (line,) = device_table([row])
    assert line == ["H200", "nuq3-1%", "float16", "3.4400", "3.4410", "2.9e-04", "63 of 64", "62 of 64"]
    assert len(header) == len(line)
    del row["rounded_equal_tokens"]
    assert device_table([row])[1][0][-1] == ""


def test_the_plot_shows_times_and_limits(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, _path: drawn.append(figure))
    rows = [
        layer_row("nuq3-1%", 1 << 20, 1, 1, device="another"),
        layer_row("nuq3-1%", 1 << 20, 1, 1, batch=8),
        layer_row("nuq2-1%", 4096, 300, 900),
        layer_row("nuq3-1%", 2048, 200, 500),
        layer_row("nuq3-1%", 4096, 400, 800),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = plot_speed.main(["--results", str(path), "--output", str(tmp_path / "speed.png")])
    assert summary["points"] == 4 and summary["shapes"] == ["llama-7b"]
    (place,) = drawn[0].axes
    lines = {line.get_label(): line for line in place.lines}
    assert lines["fp16"].get_xydata().tolist() == [[2048, 500], [4096, 800]]  # the quicker of the two at 4096
    assert lines["nuq3-1%"].get_xydata().tolist() == [[2048, 200], [4096, 400]]
    limits = [line.get_ydata()[-1] for line in place.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
    assert limits == pytest.approx([400 * 4096 / 2e3, 100 * 4096 / 2e3])
    assert "nuq2-1%" not in lines  # one context makes no line
    assert place.get_xscale() == place.get_yscale() == "log"
    assert [label.get_text() for label in place.get_xticklabels()] == ["2K", "4K"]
    with pytest.raises(UserError, match="no row holds decode steps of the kernels for batch 3"):
        plot_speed.main(["--results", str(path), "--batch", "3"])
    path.write_text('{"shape": "llama-7b"}\n')
    with pytest.raises(UserError, match="a row lacks 'device'"):
        plot_speed.main(["--results", str(path)])
