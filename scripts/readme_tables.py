"""Write the result tables of the READMEs from the rows in `scripts/results/`.

    python -m scripts.readme_tables            # rewrite README.md and those of results, quant and the kernels
    python -m scripts.readme_tables --check    # exit with 2 if one of them differs from the rows

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME picks a function below.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from gradients.cli import UserError, command_parser, run_command
from quant.results import read_rows
from scripts.experiments.paper_tables import TABLES as TABLES_OF_THE_PAPER
from scripts.experiments.paper_tables import cell_table, corpus_table
from scripts.report import default_tables, gpu_tables, long_tables, retrieval_tables, summary
from scripts.report.cells import Line, Row, latest, line, markdown, percent

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "scripts/results/README.md", "quant/README.md", "deployment/kernels/README.md")
_MARKED = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rows_of(name: str) -> list[Row]:
    """The rows of `scripts/results/{name}.jsonl`."""
    return read_rows(REPOSITORY / "scripts" / "results" / f"{name}.jsonl")


def scheme_table(name: str) -> list[Line]:
    """Simulated loss of every row of a file, fewest stored bits first."""
    columns = {"scheme": "{scheme}", "bits/element": "{bits_per_element:.2f}", "perplexity": "{perplexity:.2f}"}
    columns |= {"change": "{change}", "KL (nats)": "{kl:.4f}", "top-1 agreement": "{agreement}"}
    rows = rows_of(name)
    unquantized = math.exp(rows[0]["baseline_nll"])
    lines = [dict(zip(columns, ["unquantized", "32", f"{unquantized:.2f}", "", "0", "100 %"], strict=True))]
    for row in sorted(rows, key=lambda row: float(row["bits_per_element"])):
        change = percent(row["perplexity"] / unquantized - 1, "+.1%")
        lines.append(line(columns, row, change=change, agreement=percent(row["top1_agreement"], ".1%")))
    return lines


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
            f"**{table.title}** ({table.source})\n\n{markdown(cell_table([rows[table.name, label] for label in labels]))}"
        )
    return "\n".join(parts)


PACKED = {
    "scheme": "{scheme}",
    "context": "{seqlen}",
    "chunk": "{prefill_chunk}",
    "NLL simulated": "{simulated[nll]:.4f}",
    "NLL packed": "{nll:.4f}",
    "relative difference": "{difference:.1e}",
    "bits simulated": "{simulated[bits_per_element]:.3f}",
    "bits held": "{bits_per_element:.3f}",
    "smaller than fp16": "{smaller:.2f}x",
}


def packed() -> list[Line]:
    """NLL through the packed cache beside the simulated one, and the bytes held."""
    simulated: dict[tuple[str, int, str | None], Row] = {}
    for row in rows_of("sparse") + rows_of("simulated") + rows_of("schemes"):
        simulated[row["scheme"], row["tokens"], row.get("records")] = row
        simulated[row["scheme"], row["tokens"], None] = row  # packed rows of old do not say which records
    lines = []
    for row in rows_of("packed"):
        expected = simulated[row["scheme"], row["tokens"], row.get("records")]
        difference, smaller = abs(row["nll"] / expected["nll"] - 1), row["fp16_bytes"] / row["cache_bytes"]
        lines.append(line(PACKED, row, simulated=expected, difference=difference, smaller=smaller))
    return lines


def speed() -> list[Line]:
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
    for row in latest(rows_of("benchmark_simulation"), lambda row: row["scheme"]):
        what = f"{row['scheme']}: a forward of {row['seqlen']} tokens, simulated"
        cells.append([what, "the unquantized forward", f"{row['median_ratio']:.2f}x its time"])
    for row in latest(rows_of("fit_shape"), lambda row: row["scheme"]):
        channels, tokens = row["heads"] * row["head_dim"], row["windows"] * row["seqlen"]
        what = f"{row['scheme']}: a fit of {row['of_layers']} layers, C = {channels}, {tokens} tokens"
        minutes = f"{row['scaled_minutes']:.1f} minutes, {row['peak_gb']:.1f} GB"
        cells.append([what, f"{row['layers']} layers measured, time scaled", minutes])
    return [dict(zip(("what", "against", "result"), each, strict=True)) for each in cells]


def allocation() -> list[Line]:
    """Held-out error of ways to spend bits, a column for each width of the paper's scheme."""
    columns = {"error (bits per element)": "{idea}"}
    return pivoted(rows_of("allocation"), columns, "{bits} bits", "{error_ratio:.2f} ({bits_per_element:.2f})")


def feedback() -> list[Line]:
    """Held-out error under the whole Fisher matrix, a column for each scheme."""
    return pivoted(rows_of("feedback"), {"error of d^T F d": "{idea}"}, "{scheme}", "{error_ratio:.2f}")


def pivoted(rows: Sequence[Row], columns: Line, name: str, cell: str) -> list[Line]:
    """A line for each idea, and a column for each `name` that its rows have."""
    lines: dict[str, Line] = {}
    for row in rows:
        lines.setdefault(row["idea"], line(columns, row)).update(line({name.format(**row): cell}, row))
    return list(lines.values())


INSTRUCTIONS = {
    "GPU": "{target}",
    "bits": "{widths}",
    "queries": "{queries}",
    "teams": "{teams}",
    "loop": "{loop:.2f}",
    "outliers": "{outliers:.2f}",
    "whole": "{whole:.2f}",
    "registers": "{registers}",
    "spills in loops": "{usual_spills}",
    "shared memory, KiB": "{kib:.0f}",
}


def instructions() -> list[Line]:
    """Machine instructions per element, as counted last."""
    rows = [row for row in rows_of("instructions") if "teams" in row]  # those of the kernel in Triton had other columns
    return [
        line(INSTRUCTIONS, row, widths=row["bits"] or "2, 3, 4", kib=row["shared"] / 1024)
        for row in latest(rows, lambda row: (row["target"], row["bits"], row["queries"]))
    ]


ROOFLINE = {
    "GPU": "{machine}",
    "shape": "{shape}",
    "queries to a KV head": "{group}",
    "scheme": "{scheme}",
    "instructions": "{instructions:.1f}",
    "memory, us": "{memory_us:.0f}",
    "shared memory, us": "{shared_us:.0f}",
    "issue, us": "{issue_us:.0f}",
    "fp16, us": "{fp16_us:.0f}",
    "bound": "{bound}",
    "at most": "{most_speedup:.1f}x",
}


def roofline() -> list[Line]:
    """What memory and instructions allow at most, as counted last."""
    rows = [row for row in rows_of("roofline") if "shared_us" in row]
    return [line(ROOFLINE, row) for row in latest(rows, lambda row: (row["machine"], row["shape"], row["scheme"]))]


TABLES: dict[str, Callable[[], list[Line]]] = {
    "summary_quality": lambda: summary.quality_table(rows_of("schemes")),
    "summary_speed": lambda: summary.speed_table(rows_of("gpu-benchmark")),
    "summary_long": lambda: summary.long_table(
        rows_of("gpu-generate"), rows_of("gpu-multi-sharded") + rows_of("gpu-tensor-parallel"), rows_of("long")
    ),
    "schemes": lambda: scheme_table("schemes"),
    "gemma": lambda: scheme_table("gemma"),
    "sparse": lambda: default_tables.sparse_table(rows_of("sparse"), rows_of("gpu-sparse")),
    "window": lambda: default_tables.window_table(rows_of("window")),
    "passkey_ten": lambda: retrieval_tables.passkey_table(rows_of("passkey-ten")),
    "needle_long": lambda: retrieval_tables.needle_table(rows_of("needle-long")),
    "ruler_long": lambda: retrieval_tables.ruler_table(rows_of("ruler-long")),
    "packed": packed,
    "speed": speed,
    "long": lambda: long_tables.all_measured(rows_of("long")),
    "long_float32": lambda: long_tables.decoding_in_float32(rows_of("long")),
    "passkey": lambda: retrieval_tables.passkey_table(rows_of("passkey")),
    "needle": lambda: retrieval_tables.needle_table(rows_of("needle")),
    "ruler": lambda: retrieval_tables.ruler_table(rows_of("ruler")),
    "retrieval_packed": lambda: retrieval_tables.packed_table(
        rows_of("passkey"), rows_of("passkey-ten"), rows_of("ruler")
    ),
    "gpu": lambda: gpu_tables.speed_table(rows_of("gpu-benchmark")),
    "gpu_other_ops": lambda: gpu_tables.other_ops_table(rows_of("gpu-benchmark")),
    "gpu_generate": lambda: gpu_tables.generate_table(rows_of("gpu-generate")),
    "gpu_prefill": lambda: gpu_tables.prefill_table(rows_of("gpu-generate")),
    "gpu_sharded": lambda: gpu_tables.sharded_table(rows_of("gpu-multi-sharded")),
    "gpu_parallel": lambda: gpu_tables.parallel_table(rows_of("gpu-tensor-parallel")),
    "gpu_processes": lambda: gpu_tables.processes_table(rows_of("gpu-multi-processes")),
    "gpu_device": lambda: gpu_tables.device_table(rows_of("gpu-device")),
    "instructions": instructions,
    "roofline": roofline,
    "allocation": allocation,
    "feedback": feedback,
}
TEXTS: dict[str, Callable[[], str]] = {
    "headline": lambda: summary.headline(rows_of("schemes"), rows_of("gpu-benchmark")),
    "laboratory": laboratory,
}


def made(name: str) -> str:
    """What stands between the marks of that name."""
    return TEXTS[name]() if name in TEXTS else markdown(TABLES[name]())


def with_tables(text: str) -> str:
    """The text with every marked table made anew."""
    return _MARKED.sub(lambda match: match[1] + made(match["name"]) + match[3], text)


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
