"""The arithmetic of `scripts/checks/roofline.py`, with counts made up."""

from typing import Any

import pytest

from gradients.cli import UserError

pytest.importorskip("triton")

from scripts.checks import roofline

MACHINE = roofline.Machine(target=80, multiprocessors=10, clock=1e9, bandwidth=1e12)


@pytest.mark.parametrize(
    ("stored", "instructions", "bound", "speedup"),
    [
        (1.8, 0.1, "memory", 1.111),
        # 1.28e12 bytes of shared memory a second: two of levels take 1.6 ps, two of memory 2 ps
        (0.5, 0.1, "shared", 1.28),
        # 1.28e12 instructions a second: 10 take 7.8 ps
        (0.5, 10.0, "issue", 0.256),
    ],
)
def test_the_slowest_resource_is_the_bound(stored: float, instructions: float, bound: str, speedup: float) -> None:
    row = roofline.bounds(MACHINE, 1e9, stored, instructions)
    assert row["bound"] == bound and row["most_speedup"] == pytest.approx(speedup, abs=1e-3)
    assert row["fp16_us"] == pytest.approx(2000) and row["memory_us"] == pytest.approx(1000 * stored)
    assert row["issue_us"] == pytest.approx(1e6 * instructions / 1280, rel=1e-4)


def test_rows_put_shape_scheme_and_counts_together(monkeypatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def compile_for(*arguments: Any, outliers: float) -> dict[str, float]:
        asked.append((*arguments, outliers))
        return {"whole": 5.0}

    monkeypatch.setattr(roofline, "compile_for", compile_for)
    rows = roofline.roofline(["llama-3-8b"], ["nuq3-1%", "nuq2"], 1000)
    targets = [machine.target for machine in roofline.MACHINES.values()]
    assert asked == [(target, *kernel) for target in targets for kernel in ((3, 4, 0.01), (2, 4, 0.0))]
    first, second = rows[:2]
    assert first["group"] == 4 and first["instructions"] == 5.0
    # codes, ends of lists, a scale in 1024 values; 1 % outliers of keys, and 6 at either end of a token's values
    expected = 3 + 32 / 64 / 128 + 32 / 1024 / 2 + (0.01 + 12 / 1024) * 32 / 2
    assert first["bits_per_element"] == pytest.approx(expected, abs=2e-3)
    assert second["bits_per_element"] == pytest.approx(2 + 32 / 1024 / 2, abs=1e-3)
    # two sides of 1024 channels
    assert first["fp16_us"] == pytest.approx(2 * 1000 * 1024 * 2 / (0.9 * 2039e9) * 1e6, abs=0.01)


def test_another_kernel_is_refused() -> None:
    with pytest.raises(UserError, match="another kernel"):
        roofline.roofline(["llama-7b"], ["rdnuq2.4"], 1000)
