"""Write the result tables of the READMEs from the rows in `scripts/results/`.

    python -m scripts.readme_tables            # rewrite README.md and those of results, quant and the kernels
    python -m scripts.readme_tables --check    # exit with 2 if one of them differs from the rows

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME picks a function below.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gradients.cli import UserError, command_parser, run_command
from quant.results import read_rows
from scripts.experiments.paper_tables import TABLES as TABLES_OF_THE_PAPER
from scripts.experiments.paper_tables import corpus_table
from scripts.report import summary
from scripts.report.default_tables import sparse_table, window_table
from scripts.report.gpu_tables import (
    device_table,
    generate_table,
    other_ops_table,
    parallel_table,
    prefill_table,
    processes_table,
    sharded_table,
    speed_table,
)
from scripts.report.long_tables import all_measured, decoding_in_float32
from scripts.report.retrieval_tables import needle_table, packed_table, passkey_table, ruler_table

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "scripts/results/README.md", "quant/README.md", "deployment/kernels/README.md")
_MARKED = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    """The rows of `scripts/results/{name}.jsonl`."""
    return read_rows(REPOSITORY / "scripts" / "results" / f"{name}.jsonl")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its first column to the left and all others to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def scheme_table(rows: Sequence[Row]) -> str:
    """Simulated loss of every row, fewest stored bits first."""
    unquantized = math.exp(rows[0]["baseline_nll"])
    cells = [["unquantized", "32", f"{unquantized:.2f}", "", "0", "100 %"]]
    cells += [
        [
            row["scheme"],
            f"{row['bits_per_element']:.2f}",
            f"{row['perplexity']:.2f}",
            percent(row["perplexity"] / unquantized - 1, "+.1%"),
            f"{row['kl']:.4f}",
            percent(row["top1_agreement"], ".1%"),
        ]
        for row in sorted(rows, key=lambda row: float(row["bits_per_element"]))
    ]
    return markdown(["scheme", "bits/element", "perplexity", "change", "KL (nats)", "top-1 agreement"], cells)


def percent(share: float, style: str) -> str:
    """`0.065` as `6.5 %`."""
    return format(share, style).replace("%", " %")


def schemes() -> str:
    """Everything that ran on the same windows."""
    return scheme_table(rows_of("schemes"))


def laboratory() -> str:
    """The paper's tables, one after the other, as `scripts.reproduce_tables` filled them."""
    rows = {(row["table"], row["cell"]): row for row in rows_of("tables")}
    parts = []
    for table in [*TABLES_OF_THE_PAPER, corpus_table([])]:
        order = [cell.label for cell in table.cells]
        labels = [label for name, label in rows if name == table.name]
        if not labels:
            continue
        labels.sort(key=lambda label: order.index(label) if label in order else len(order))
        parts.append(
            f"**{table.title}** ({table.source})\n\n{cell_table([rows[table.name, label] for label in labels])}"
        )
    return "\n".join(parts)


def cell_table(rows: Sequence[Row]) -> str:
    """Cells of one table, with the paper's figures where it has that model."""
    papers = any(row["paper"] is not None for row in rows)
    cells = []
    for row in rows:
        change = "" if row["scheme"] == "unquantized" else f"{row['nll'] - row['baseline_nll']:+.4f}"
        own = [row["cell"], f"{row['bits_per_element']:.2f}", f"{row['perplexity']:.2f}", change]
        cells.append([*own, *([f"{row['paper']:.2f}" if row["paper"] is not None else ""] if papers else [])])
    return markdown(["", "bits/element", "perplexity", "NLL change", *(["paper"] if papers else [])], cells)


def packed() -> str:
    """NLL through the packed cache beside the simulated one, and the bytes held."""
    simulated: dict[tuple[str, int, str | None], Row] = {}
    for row in rows_of("sparse") + rows_of("simulated") + rows_of("schemes"):
        simulated[row["scheme"], row["tokens"], row.get("records")] = row
        simulated[row["scheme"], row["tokens"], None] = row  # packed rows of old do not say which records
    cells = []
    for row in rows_of("packed"):
        expected = simulated[row["scheme"], row["tokens"], row.get("records")]
        cells.append(
            [
                row["scheme"],
                str(row["seqlen"]),
                str(row["prefill_chunk"]),
                f"{expected['nll']:.4f}",
                f"{row['nll']:.4f}",
                f"{abs(row['nll'] / expected['nll'] - 1):.1e}",
                f"{expected['bits_per_element']:.3f}",
                f"{row['bits_per_element']:.3f}",
                f"{row['fp16_bytes'] / row['cache_bytes']:.2f}x",
            ]
        )
    header = ["scheme", "context", "chunk", "NLL simulated", "NLL packed", "relative difference"]
    return markdown([*header, "bits simulated", "bits held", "smaller than fp16"], cells)


def speed() -> str:
    """The benchmarks of fitting and recording."""
    fit, recording = rows_of("benchmark_fit")[-1], rows_of("benchmark_recording")[-1]
    sides, worse = fit["layer_sides"], fit["larger_error_than_sklearn"]
    baseline = "scikit-learn KMeans, same points and weights"
    cells = [
        [f"{fit['scheme']}: the search for {sides} codebooks", baseline, f"{fit['sklearn_over_search']:.0f}x faster"],
        [
            f"{fit['scheme']}: the whole fit, ranges and outliers too",
            baseline,
            f"{fit['sklearn_over_fit']:.0f}x faster",
        ],
        ["weighted error of these codebooks", baseline, f"larger in {worse} of {sides}"],
        [
            f"recording windows of {recording['seqlen']} tokens",
            "forward + backward alone, parameters frozen",
            f"{recording['median_ratio']:.2f}x its time",
        ],
    ]
    for row in {row["scheme"]: row for row in rows_of("benchmark_simulation")}.values():
        what = f"{row['scheme']}: a forward of {row['seqlen']} tokens, simulated"
        cells.append([what, "the unquantized forward", f"{row['median_ratio']:.2f}x its time"])
    for row in {row["scheme"]: row for row in rows_of("fit_shape")}.values():
        shape = (
            f"{row['of_layers']} layers, C = {row['heads'] * row['head_dim']}, {row['windows'] * row['seqlen']} tokens"
        )
        minutes = f"{row['scaled_minutes']:.1f} minutes, {row['peak_gb']:.1f} GB"
        cells.append([f"{row['scheme']}: a fit of {shape}", f"{row['layers']} layers measured, time scaled", minutes])
    return markdown(["what", "against", "result"], cells)


def retrieval_packed() -> str:
    """Retrieval through the packed cache beside simulated."""
    return markdown(*packed_table(rows_of("passkey"), rows_of("passkey-ten"), rows_of("ruler")))


def allocation() -> str:
    """Held-out error of ways to spend bits, a column for each width of the paper's scheme."""
    rows = {(row["idea"], row["bits"]): row for row in rows_of("allocation")}
    widths = sorted({bits for _, bits in rows})
    cells = []
    for idea in dict.fromkeys(idea for idea, _ in rows):
        of_idea = [rows[idea, bits] for bits in widths]
        cells.append([idea, *(f"{row['error_ratio']:.2f} ({row['bits_per_element']:.2f})" for row in of_idea)])
    return markdown(["error (bits per element)", *(f"{bits} bits" for bits in widths)], cells)


def feedback() -> str:
    """Held-out error under the whole Fisher matrix, a column for each scheme."""
    rows = {(row["idea"], row["scheme"]): row for row in rows_of("feedback")}
    names = list(dict.fromkeys(scheme for _, scheme in rows))
    cells = [
        [idea, *(f"{rows[idea, name]['error_ratio']:.2f}" for name in names)]
        for idea in dict.fromkeys(idea for idea, _ in rows)
    ]
    return markdown(["error of d^T F d", *names], cells)


def of_gpus(name: str, table: Callable[[list[Row]], tuple[list[str], list[list[str]]]]) -> str:
    """A table of `gpu_tables`, or that there is nothing yet."""
    rows = rows_of(name)
    return markdown(*table(rows)) if rows else "Not measured yet.\n"


def instructions() -> str:
    """Machine instructions per element, as counted last."""
    cells = []
    rows = [row for row in rows_of("instructions") if "teams" in row]  # those of the kernel in Triton had other columns
    for row in {(row["target"], row["bits"], row["queries"]): row for row in rows}.values():
        what = [row["target"], str(row["bits"] or "2, 3, 4"), str(row["queries"]), str(row["teams"])]
        counts = [f"{row[part]:.2f}" for part in ("loop", "outliers", "whole")]
        cells.append([*what, *counts, str(row["registers"]), str(row["usual_spills"]), f"{row['shared'] / 1024:.0f}"])
    header = ["GPU", "bits", "queries", "teams", "loop", "outliers", "whole", "registers", "spills in loops"]
    return markdown([*header, "shared memory, KiB"], cells)


def roofline() -> str:
    """What memory and instructions allow at most, as counted last."""
    cells = []
    rows = [row for row in rows_of("roofline") if "shared_us" in row]
    for row in {(row["machine"], row["shape"], row["scheme"]): row for row in rows}.values():
        what = [row["machine"], row["shape"], str(row["group"]), row["scheme"], f"{row['instructions']:.1f}"]
        times = [f"{row[name]:.0f}" for name in ("memory_us", "shared_us", "issue_us", "fp16_us")]
        cells.append([*what, *times, row["bound"], f"{row['most_speedup']:.1f}x"])
    header = [
        "GPU",
        "shape",
        "queries to a KV head",
        "scheme",
        "instructions",
        "memory, us",
        "shared memory, us",
        "issue, us",
    ]
    return markdown([*header, "fp16, us", "bound", "at most"], cells)


TABLES: dict[str, Callable[[], str]] = {
    "headline": lambda: summary.headline(rows_of("schemes"), rows_of("gpu-benchmark")),
    "summary_quality": lambda: markdown(*summary.quality_table(rows_of("schemes"))),
    "summary_speed": lambda: markdown(*summary.speed_table(rows_of("gpu-benchmark"))),
    "summary_long": lambda: markdown(
        *summary.long_table(
            rows_of("gpu-generate"), rows_of("gpu-multi-sharded") + rows_of("gpu-tensor-parallel"), rows_of("long")
        )
    ),
    "schemes": schemes,
    "gemma": lambda: scheme_table(rows_of("gemma")),
    "sparse": lambda: markdown(*sparse_table(rows_of("sparse"), rows_of("gpu-sparse"))),
    "window": lambda: markdown(*window_table(rows_of("window"))),
    "passkey_ten": lambda: markdown(*passkey_table(rows_of("passkey-ten"))),
    "needle_long": lambda: markdown(*needle_table(rows_of("needle-long"))),
    "ruler_long": lambda: markdown(*ruler_table(rows_of("ruler-long"))),
    "laboratory": laboratory,
    "packed": packed,
    "speed": speed,
    "long": lambda: markdown(*all_measured(rows_of("long"))),
    "long_float32": lambda: markdown(*decoding_in_float32(rows_of("long"))),
    "passkey": lambda: markdown(*passkey_table(rows_of("passkey"))),
    "needle": lambda: markdown(*needle_table(rows_of("needle"))),
    "ruler": lambda: markdown(*ruler_table(rows_of("ruler"))),
    "retrieval_packed": retrieval_packed,
    "gpu": lambda: of_gpus("gpu-benchmark", speed_table),
    "gpu_other_ops": lambda: of_gpus("gpu-benchmark", other_ops_table),
    "gpu_generate": lambda: of_gpus("gpu-generate", generate_table),
    "gpu_prefill": lambda: of_gpus("gpu-generate", prefill_table),
    "gpu_sharded": lambda: of_gpus("gpu-multi-sharded", sharded_table),
    "gpu_parallel": lambda: of_gpus("gpu-tensor-parallel", parallel_table),
    "gpu_processes": lambda: of_gpus("gpu-multi-processes", processes_table),
    "gpu_device": lambda: of_gpus("gpu-device", device_table),
    "instructions": instructions,
    "roofline": roofline,
    "allocation": allocation,
    "feedback": feedback,
}


def with_tables(text: str) -> str:
    """The text with every marked table made anew."""
    return _MARKED.sub(lambda match: match[1] + TABLES[match["name"]]() + match[3], text)


def main(argv: Sequence[str] | None = None) -> Row:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.readme_tables", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a README is out of date")
    arguments = parser.parse_args(argv)
    changed = []
    for name in DOCUMENTS:
        before = (REPOSITORY / name).read_text()
        after = with_tables(before)
        if after != before:
            changed.append(name)
        if not arguments.check:
            (REPOSITORY / name).write_text(after)
    if arguments.check and changed:
        raise UserError(f"{changed[0]} differs from the rows in scripts/results; run `python -m scripts.readme_tables`")
    return {"documents": list(DOCUMENTS), "changed": changed}


if __name__ == "__main__":
    run_command(main)
