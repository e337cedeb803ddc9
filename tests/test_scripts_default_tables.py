"""The tables behind the default scheme: losses beside times of the same budget, and what exact tokens cost and find."""

from typing import Any

import pytest

from quant.scheme import Scheme
from scripts.report.default_tables import bits_at, sparse_table, window_table


def row(scheme: str, increase: float, **fields: Any) -> dict[str, Any]:
    return {"scheme": scheme, "nll": 3 + increase, "baseline_nll": 3.0, "kl": 0.01, "seqlen": 4096, **fields}


def timed(scheme: str, shape: str, us: float) -> dict[str, Any]:
    decode = {"op": "decode", "us": us, "speedup": 700 / us}
    return {"scheme": scheme, "shape": shape, "ops": [{"op": "append", "us": 5.0}, decode]}


def test_losses_stand_beside_times_of_the_same_budget_and_outliers() -> None:
    rows = [
        row(name, increase, bits_per_element=bits)
        for name, increase, bits in (
            ("rdnuq3.4+fb", 0.01, 3.43),
            ("rdnuq2.4-4%+fb", 0.06, 2.44),
            ("rdnuq2.4+fb", 0.07, 2.43),
        )
    ]
    times = [
        timed("rdnuq2.4", "llama-7b", 230),
        timed("rdnuq2.4-4%", "llama-3-8b", 140),
        timed("nuq2", "llama-7b", 170),
    ]
    _, lines = sparse_table(rows, times)
    assert [line[:4] for line in lines] == [
        ["2.4", "none", "2.43", "+0.0700"],
        ["2.4", "free (at most 4 %)", "2.44", "+0.0600"],
        ["3.4", "none", "3.43", "+0.0100"],
    ]
    assert [line[5:] for line in lines] == [["230 (3.04x)", ""], ["", "140 (5.00x)"], ["", ""]]


def test_what_a_window_finds_is_averaged_over_cells_that_all_were_asked() -> None:
    names = ["nuq2+fb", "nuq2+fb sink_tokens=32 residual_tokens=128"]
    rows = [row(name, 0.1, bits_per_element=bits) for name, bits in zip(names, (2.11, 2.65), strict=True)]
    cells = [(names[0], 1024, 0.5), (names[1], 1024, 1.0), (names[0], 8192, 0.0), ("nuq4", 2048, 1.0)]
    asked = [
        {
            "scheme": name,
            "mode": "simulated",
            "context": context,
            "found": found,
            "retrieved": found,
            "nll_per_token": 1.0,
        }
        for name, context, found in cells
    ]
    header, lines = window_table(rows, {"needle": [*asked, {**asked[0], "mode": "packed", "found": 0.0}]})
    assert header[-1] == "needle"
    assert [line[:3] for line in lines] == [["nuq2+fb", "1", "0"], ["nuq2+fb", "32", "128"]]
    assert [line[-1] for line in lines] == ["50 % (1.00)", "100 % (1.00)"]


def test_exact_tokens_weigh_less_the_longer_the_context() -> None:
    scheme = Scheme.parse("nuq2", sink_tokens=32, residual_tokens=96)
    bits = (2 * (4096 - 128) + 16 * 128) / 4096
    of_row = row("nuq2", 0.1, bits_per_element=bits)
    assert bits_at(of_row, scheme, 4096) == pytest.approx(bits)
    assert bits_at(of_row, scheme, 1 << 17) == pytest.approx(2 + 14 * 128 / (1 << 17))
