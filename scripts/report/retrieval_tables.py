"""The README's tables of retrieval, from rows of `scripts.retrieval.passkey`, `scripts.retrieval.needle` and `scripts.retrieval.ruler`.

A cell shows the share of the answers found and, in
brackets, the NLL of the expected answer in nats: what is found says whether a cache is usable, the NLL how far it is from
that, also where so few questions are asked, or so hard ones, that nothing is found at all.
"""

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

from scripts.report.cells import Line, Row
from scripts.retrieval.tasks import TASKS

WAYS = ("simulated", "every token quantized", "chunk exact")
_COLUMNS = (WAYS[0], *(f"packed, {way}" for way in WAYS[1:]))


def passkey_table(rows: Sequence[Row]) -> list[Line]:
    """The share of pass keys retrieved and the NLL of their digits, a column for each context; simulated."""
    cells, schemes = simulated_cells(rows, "context")
    contexts = sorted({context for _, context, _ in cells})
    return [
        {"retrieved (NLL of the answer)": brief(scheme)}
        | {
            f"{one} tokens": shown([cells[scheme, one, one]] if (scheme, one, one) in cells else [], "retrieved")
            for one in contexts
        }
        for scheme in schemes
    ]


def needle_table(rows: Sequence[Row]) -> list[Line]:
    """A sentence hidden in a long text: a column for each length, over the depths that all schemes asked there were asked."""
    cells, schemes = simulated_cells(rows, "depth")
    lengths = sorted({length for _, length, _ in cells})
    asked = {length: [{key[2] for key in cells if key[:2] == (one, length)} for one in schemes] for length in lengths}
    depths = {length: set.intersection(*filter(None, of_schemes)) for length, of_schemes in asked.items()}
    lines = []
    for scheme in schemes:
        own = {
            length: [cells[scheme, length, depth] for depth in depths[length] if (scheme, length, depth) in cells]
            for length in lengths
        }
        bits = next(some for some in reversed(own.values()) if some)[0]["bits_per_element"]
        grades = {f"{length} tokens": shown(some, "found", "nll_per_token") for length, some in own.items()}
        lines.append({"found (NLL per token)": brief(scheme), "bits/element": f"{bits:.2f}"} | grades)
    return lines


def ruler_table(rows: Sequence[Row]) -> list[Line]:
    """RULER's synthetic tasks: a line for each length and scheme, a column for each task."""
    cells, schemes = simulated_cells(rows, "task")
    tasks, lengths = {task for *_, task in cells}, sorted({length for _, length, _ in cells})
    shown_tasks = [task for task in TASKS if task in tasks]
    lines = []
    for length, scheme in product(lengths, schemes):
        own = {task: cells[scheme, length, task] for task in shown_tasks if (scheme, length, task) in cells}
        if own:
            grades = {task: shown([own[task]] if task in own else [], "found", "nll_per_token") for task in shown_tasks}
            lines.append({"found (NLL per token)": brief(scheme), "tokens": str(length)} | grades)
    return lines


def packed_table(passkey: Sequence[Row], passkey_ten: Sequence[Row], ruler: Sequence[Row]) -> list[Line]:
    """Cells that ran through the packed cache, beside the same cells simulated.

    With `--no-exact-chunk` every token reads a quantized past, as simulated, and the length of a chunk is a matter of
    speed alone: where it varies, all runs stand in the cell, the longest chunk first.
    """
    rows = [("passkey", "retrieved", row) for row in passkey]
    rows += [("passkey, ten", "retrieved", row) for row in passkey_ten]
    rows += [(f"ruler {row['task']}", "found", row) for row in ruler]
    cells: dict[tuple[str, int, str], dict[str, dict[int, str]]] = {}
    for test, share, row in rows:
        runs = cells.setdefault((test, row["context"], row["scheme"]), {}).setdefault(way(row), {})
        runs[row.get("prefill_chunk", 0)] = shown([row], share)
    lines = []
    for (test, context, scheme), found in sorted(cells.items(), key=lambda cell: cell[0][:2]):
        if found.keys() & set(WAYS[1:]):
            runs_of = {name: found.get(one, {}) for name, one in zip(_COLUMNS, WAYS, strict=True)}
            texts = {name: "; ".join(runs[n] for n in sorted(runs, reverse=True)) for name, runs in runs_of.items()}
            lines.append({"test": test, "tokens": str(context), "scheme": brief(scheme)} | texts)
    return lines


def way(row: Row) -> str:
    """How a row ran; a chunk of the prompt that sees itself exactly is another way than one that is quantized first."""
    if row["mode"] != "packed":
        return str(row["mode"])
    return WAYS[2] if row["exact_chunk"] else WAYS[1]


def simulated_cells(rows: Sequence[Row], part: str) -> tuple[dict[Any, Row], list[str]]:
    """Rows by scheme, length and `part` of a test, and the schemes, the largest first; packed ones left out.

    A scheme is as large as in its longest text, where tokens that stay exact weigh least.
    """
    simulated = [row for row in rows if row["mode"] != "packed"]
    bits: dict[str, float] = {}
    for row in simulated:
        bits[row["scheme"]] = min(row["bits_per_element"], bits.get(row["scheme"], row["bits_per_element"]))
    cells = {(row["scheme"], row["context"], row[part]): row for row in simulated}
    return cells, sorted(bits, key=lambda scheme: -bits[scheme])


def brief(scheme: str) -> str:
    """`nuq2+fb sink_tokens=32 residual_tokens=128` as `nuq2+fb, 32 and 128 exact`."""
    return re.sub(r" sink_tokens=(\d+) residual_tokens=(\d+)", r", \1 and \2 exact", scheme)


def shown(rows: Sequence[Row], share: str, nll: str = "answer_nll") -> str:
    """The means of two fields over rows, `75 % (0.20)`; nothing of none."""
    if not rows:
        return ""
    found, cost = (sum(row[field] for row in rows) / len(rows) for field in (share, nll))
    return f"{100 * found:.0f} % ({cost:.2f})"
