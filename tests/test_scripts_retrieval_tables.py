"""Tables of retrieval: every row in its cell, no packed row among simulated ones, nothing where nothing was measured."""

from typing import Any

from scripts.report.retrieval_tables import needle_table, packed_table, passkey_table, ruler_table


def row(scheme: str, context: int, share: float, mode: str = "simulated", **fields: Any) -> dict[str, Any]:
    bits = {"unquantized": 32.0, "nuq4": 4.5, "nuq2": 2.5}[scheme]
    graded = {"retrieved": share, "found": share, "answer_nll": 4 * share, "nll_per_token": share / 2}
    return {"scheme": scheme, "context": context, "mode": mode, "bits_per_element": bits, **graded, **fields}


def packed(scheme: str, context: int, share: float, exact_chunk: bool, **fields: Any) -> dict[str, Any]:
    return row(scheme, context, share, "packed", **{"exact_chunk": exact_chunk, "prefill_chunk": 128, **fields})


def test_passkeys_by_scheme_and_length() -> None:
    rows = [row("nuq2", 2048, 0.5), row("unquantized", 512, 1), row("nuq2", 512, 0.25), packed("nuq2", 512, 1, True)]
    window = {"scheme": "nuq2 sink_tokens=32 residual_tokens=128"}
    rows += [row("nuq4", 512, 1), row("nuq4", 512, 1) | window | {"bits_per_element": 9.5}]
    rows += [row("nuq4", 2048, 1) | window | {"bits_per_element": 4}]
    header, lines = passkey_table(rows)
    assert header[1:] == ["512 tokens", "2048 tokens"]
    assert lines == [
        ["unquantized", "100 % (4.00)", ""],
        ["nuq4", "100 % (4.00)", ""],
        ["nuq2, 32 and 128 exact", "100 % (4.00)", "100 % (4.00)"],  # as large as in the longest text
        ["nuq2", "25 % (1.00)", "50 % (2.00)"],
    ]


def test_needles_are_averaged_over_depths_that_all_schemes_have() -> None:
    rows = [row(one, 512, share, depth=0.5) for one, share in (("nuq2", 0.5), ("unquantized", 1))]
    rows += [row(one, 512, share, depth=1) for one, share in (("nuq2", 0), ("unquantized", 1))]
    rows += [row("unquantized", 512, 0, depth=0.25), packed("nuq2", 512, 1, True, depth=0.5)]
    rows += [row("unquantized", 1024, 0.5, depth=1)]  # nothing else was asked at this length
    header, lines = needle_table(rows)
    assert header[1:] == ["bits/element", "512 tokens", "1024 tokens"]
    assert lines == [["unquantized", "32.00", "100 % (0.50)", "50 % (0.25)"], ["nuq2", "2.50", "25 % (0.12)", ""]]


def test_ruler_by_length_scheme_and_task() -> None:
    rows = [row("nuq4", 2048, 0.5, task="vt"), row("unquantized", 1024, 1, task="niah_single")]
    rows += [packed("nuq4", 1024, 1, True, task="vt")]
    header, lines = ruler_table(rows)
    assert header[1:] == ["tokens", "niah_single", "vt"]
    assert lines[0] == ["unquantized", "1024", "100 % (0.50)", ""] and lines[1] == ["nuq4", "2048", "", "50 % (0.25)"]
    assert len(lines) == 2  # none for what was not asked


def test_packed_cells_stand_beside_simulated_ones() -> None:
    passkeys = [row("nuq2", 512, 0.25), row("nuq4", 512, 1), row("nuq2", 2048, 0.5)]
    passkeys += [packed("nuq2", 2048, 1, True), packed("nuq2", 512, 0.5, False), packed("nuq2", 512, 0.75, True)]
    passkeys += [packed("nuq2", 512, 1, False, prefill_chunk=512)]
    tasks = [packed("nuq4", 512, 1, True, task="vt"), row("nuq4", 512, 0.5, task="niah_single")]
    of_ten = [packed("nuq2", 2048, 0.5, False), row("nuq2", 2048, 1)]
    header, lines = packed_table(passkeys, of_ten, tasks)
    assert header[3:] == ["simulated", "packed, every token quantized", "packed, chunk exact"]
    assert lines == [
        ["passkey", "512", "nuq2", "25 % (1.00)", "100 % (4.00); 50 % (2.00)", "75 % (3.00)"],
        ["passkey", "2048", "nuq2", "50 % (2.00)", "", "100 % (4.00)"],
        ["passkey, ten", "2048", "nuq2", "100 % (4.00)", "50 % (2.00)", ""],
        ["ruler vt", "512", "nuq4", "", "", "100 % (4.00)"],
    ]
