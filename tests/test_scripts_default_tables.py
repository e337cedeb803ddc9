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


def test_a_line_for_every_window() -> None:
    name = "nuq2+fb sink_tokens=32 residual_tokens=128"
    header, (line,) = window_table([row(name, 0.1, bits_per_element=2.65, top1_agreement=0.9)])
    assert header[3:5] == ["bits at 4K", "bits at 128K"]
    assert line[:4] == ["nuq2+fb", "32", "128", "2.650"] and line[5:] == ["+0.1000", "0.0100", "90.0 %"]


def test_exact_tokens_weigh_less_the_longer_the_context() -> None:
    scheme = Scheme.parse("nuq2", sink_tokens=32, residual_tokens=96)
    bits = (2 * (4096 - 128) + 16 * 128) / 4096
    of_row = row("nuq2", 0.1, bits_per_element=bits)
    assert bits_at(of_row, scheme, 4096) == pytest.approx(bits)
    assert bits_at(of_row, scheme, 1 << 17) == pytest.approx(2 + 14 * 128 / (1 << 17))
