"""The paper's perplexity and ablation tables as data: what to run for each cell, and what the paper reports.

Figures are those of KVQuant's version 6 (arXiv 2401.18079), WikiText-2 perplexity: Table 18 for the methods, Table 11
for datatypes, section 3 and the appendices for the other ablations (LLaMA-7B). Cells without a figure are asked by the
paper's text, or by its users, but not answered with a number there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quant.scheme import Scheme
from scripts.report.cells import Line, Row, line

MODELS = (
    "llama-7b",
    "llama-13b",
    "llama-30b",
    "llama-65b",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3-8b",
    "llama-3-70b",
    "mistral-7b",
)


@dataclass(frozen=True)
class Cell:
    """One figure of a table: a scheme, how it was calibrated and evaluated, and the paper's figure by model."""

    label: str
    scheme: str | None  # None: the unquantized model
    options: Mapping[str, Any] = field(default_factory=dict)
    calibration_windows: int | None = None  # None: all recorded
    seqlen: int | None = None  # None: as the command says
    corpus: str | None = None  # None: --records; else one of --other-records
    paper: Mapping[str, float] = field(default_factory=dict)

    def parse(self) -> Scheme | None:
        """The scheme."""
        return None if self.scheme is None else Scheme.parse(self.scheme, **self.options)


@dataclass(frozen=True)
class Table:
    """`source` names the place in the paper."""

    name: str
    title: str
    source: str
    cells: Sequence[Cell]


_PER_TOKEN = {"key_axis": "token", "key_rope": "post"}
_NO_SINK = {"sink_tokens": 0}
_BASELINES = {**_PER_TOKEN, **_NO_SINK}


def _all_models(figures: str) -> dict[str, float]:
    return dict(zip(MODELS, map(float, figures.split()), strict=True))


def _llama(figure: float) -> dict[str, float]:
    return {"llama-7b": figure}


# the paper keeps the first token in fp16 for its own method only
_METHODS = (
    Cell("fp16", None, paper=_all_models("5.68 5.09 4.10 3.53 5.12 4.57 3.12 5.54 2.59 4.76")),
    Cell("int4", "int4", _BASELINES, paper=_all_models("5.98 5.32 4.34 3.73 5.66 5.01 3.31 7.89 14.03 4.97")),
    Cell("nf4", "nf4", _BASELINES, paper=_all_models("5.87 5.23 4.25 3.63 5.47 4.90 3.22 6.42 3.86 4.91")),
    Cell("ATOM 4 bit", "atom4", _NO_SINK, paper=_all_models("5.77 5.16 4.16 3.57 5.32 4.71 3.16 5.78 2.73 4.82")),
    Cell("FlexGen 4 bit", "flexgen4", _NO_SINK, paper=_all_models("5.73 5.14 4.14 3.56 5.25 4.66 3.14 5.68 2.66 4.80")),
    Cell("nuq4", "nuq4", paper=_all_models("5.72 5.13 4.13 3.55 5.16 4.60 3.13 5.60 2.62 4.80")),
    Cell("nuq4-1%", "nuq4-1%", paper=_all_models("5.69 5.10 4.11 3.54 5.13 4.58 3.13 5.56 2.60 4.78")),
    Cell("int3", "int3", _BASELINES, paper=_all_models("10.87 8.69 6.82 6.37 22.71 18.26 7.68 125 158 7.64")),
    Cell("nf3", "nf3", _BASELINES, paper=_all_models("7.33 6.21 5.46 4.44 9.96 9.50 4.06 61.07 98.64 6.30")),
    Cell("ATOM 3 bit", "atom3", _NO_SINK, paper=_all_models("6.17 5.47 4.44 3.78 6.15 5.34 3.33 7.50 4.11 5.16")),
    Cell("FlexGen 3 bit", "flexgen3", _NO_SINK, paper=_all_models("5.93 5.29 4.26 3.66 5.64 4.98 3.23 6.38 3.23 5.00")),
    Cell("nuq3", "nuq3", paper=_all_models("5.87 5.25 4.25 3.63 5.34 4.71 3.18 5.84 2.72 4.98")),
    Cell("nuq3-1%", "nuq3-1%", paper=_all_models("5.75 5.14 4.15 3.57 5.17 4.61 3.15 5.64 2.63 4.82")),
    Cell("int2", "int2", _BASELINES, paper=_all_models("11779 69965 1470 7272 4708 3943 976 2841 2164 573")),
    Cell("nf2", "nf2", _BASELINES, paper=_all_models("3210 5786 2044 5367 13601 4036 3680 30492 9486 903")),
    Cell("ATOM 2 bit", "atom2", _NO_SINK, paper=_all_models("37.37 41.77 16.49 13.63 118 93.09 18.31 200 2092 51.96")),
    Cell(
        "FlexGen 2 bit",
        "flexgen2",
        _NO_SINK,
        paper=_all_models("11.09 9.84 6.60 5.54 25.69 26.83 5.93 57.82 43.69 12.47"),
    ),
    Cell("nuq2", "nuq2", paper=_all_models("7.23 5.82 4.87 4.03 7.03 9.59 3.45 7.04 3.49 6.84")),
    Cell("nuq2-1%", "nuq2-1%", paper=_all_models("6.01 5.36 4.35 3.70 5.41 4.78 3.26 6.04 2.82 5.14")),
)

_AXES = (
    Cell("int3, keys per token after RoPE, values per token", "int3", _BASELINES, paper=_llama(10.87)),
    Cell("int3, keys per channel after RoPE", "int3", {"key_rope": "post", **_NO_SINK}, paper=_llama(7.05)),
    Cell("int3, keys per channel before RoPE", "int3", _NO_SINK, paper=_llama(6.23)),
    Cell("int3, keys per token before RoPE", "int3", {"key_axis": "token", **_NO_SINK}),
    Cell("int3, keys and values per channel", "int3", {"value_axis": "channel", **_NO_SINK}, paper=_llama(223)),
)

_DATATYPES = (
    Cell("int3", "int3", _NO_SINK, paper=_llama(6.23)),
    Cell("nf3", "nf3", _NO_SINK, paper=_llama(6.05)),
    Cell("nuq3, k-means without weights", "nuq3", {"weights": "none", **_NO_SINK}, paper=_llama(6.84)),
    Cell("nuq3, Fisher", "nuq3", {"weights": "fisher", **_NO_SINK}, paper=_llama(6.01)),
    Cell("nuq3, Fisher s^2", "nuq3", _NO_SINK, paper=_llama(5.94)),
)

_OUTLIERS = (
    Cell("none", "nuq3", _NO_SINK, paper=_llama(5.94)),
    Cell("1 %, thresholds per matrix", "nuq3-1%", {"thresholds": "matrix", **_NO_SINK}, paper=_llama(5.85)),
    Cell("1 %, thresholds per vector", "nuq3-1%", _NO_SINK, paper=_llama(5.75)),
    *(Cell(f"{share} %, thresholds per vector", f"nuq3-{share}%", _NO_SINK) for share in ("0.1", "0.5", "2", "5")),
    *(Cell(f"1 %, at most {cap} per token", "nuq3-1%", {"outlier_cap": cap, **_NO_SINK}) for cap in (2, 4)),
)

_SINKS = (
    Cell("nuq2, no sink", "nuq2", _NO_SINK, paper=_llama(8.47)),
    Cell("nuq2, 1 sink token", "nuq2", paper=_llama(7.23)),
    Cell("nuq2, 5 sink tokens", "nuq2", {"sink_tokens": 5}),
    Cell("nuq2-1%, no sink", "nuq2-1%", _NO_SINK, paper=_llama(6.05)),
    Cell("nuq2-1%, 1 sink token", "nuq2-1%", paper=_llama(6.01)),
    Cell("nuq2-1%, 5 sink tokens", "nuq2-1%", {"sink_tokens": 5}),
    Cell("nuq3, no sink", "nuq3", _NO_SINK, paper=_llama(5.94)),
    Cell("nuq3, 1 sink token", "nuq3", paper=_llama(5.87)),
)

_ONLINE = {"channel_range": "online", **_NO_SINK}
_RANGES = (
    Cell("nuq3, calibrated", "nuq3", _NO_SINK, paper=_llama(5.94)),
    Cell("nuq3, online", "nuq3", _ONLINE, paper=_llama(5.91)),
    Cell("nuq3-1%, calibrated", "nuq3-1%", _NO_SINK, paper=_llama(5.75)),
    Cell("nuq3-1%, online", "nuq3-1%", _ONLINE, paper=_llama(5.75)),
)

_Q_NORM = tuple(
    Cell(f"{name}, {'with' if q_norm else 'without'} Q-Norm", name, {"q_norm": q_norm})
    for name in ("nuq2", "nuq2-1%", "nuq3-1%")
    for q_norm in (False, True)
)

_FEEDBACK = tuple(
    Cell(f"{name}, feedback {'on' if feedback else 'off'}", name, {"feedback": feedback})
    for name in ("nuq4", "nuq4-1%", "nuq3", "nuq3-1%", "nuq2", "nuq2-1%", "rdnuq3.4", "rdnuq2.4")
    for feedback in (False, True)
)

_CALIBRATION = tuple(
    Cell(f"{name}, {windows or 'all'} windows", name, calibration_windows=windows)
    for name in ("nuq3-1%", "rdnuq3.4+fb")
    for windows in (1, 4, None)
)

_SEQLENS = tuple(
    Cell(f"{name or 'unquantized'}, {seqlen} tokens", name, seqlen=seqlen)
    for seqlen in (128, 256, 1024, 2048)
    for name in (None, "nuq3-1%", "nuq2-1%", "rdnuq3.4+fb", "rdnuq2.4+fb")
)

TABLES = (
    Table("methods", "Methods", "Table 18", _METHODS),
    Table("axes", "Axes and the side of the rotary embedding", "section 3.1 and 3.2, Table 10, appendix G", _AXES),
    Table("datatypes", "Datatypes and the weights of the k-means", "Table 11", _DATATYPES),
    Table("outliers", "Outliers", "section 3.4", _OUTLIERS),
    Table("sinks", "Attention sinks", "section 3.5, Tables 11 and 18", _SINKS),
    Table("ranges", "Calibrated or online ranges of keys", "section 3.6", _RANGES),
    Table("q_norm", "Q-Norm", "first versions of the paper, no table", _Q_NORM),
    Table("feedback", "Error feedback", "not in the paper", _FEEDBACK),
    Table("calibration", "Size of the calibration", "no table", _CALIBRATION),
    Table("seqlens", "Sequence lengths", "no table", _SEQLENS),
)


def corpus_table(corpora: Sequence[str]) -> Table:
    """The calibration corpus, as in the paper's Table 21: one cell for each of `--other-records`."""
    cells: Iterator[Cell] = (
        Cell(f"{name}, calibrated on {corpus or 'the main text'}", name, corpus=corpus)
        for name in ("nuq3-1%", "rdnuq3.4+fb")
        for corpus in (None, *corpora)
    )
    return Table("corpora", "Calibration corpus", "Table 21", tuple(cells))


def cell_table(rows: Sequence[Row]) -> list[Line]:
    """Cells of one table, with the paper's figures where it has that model."""
    columns = {"": "{cell}", "bits/element": "{bits_per_element:.2f}", "perplexity": "{perplexity:.2f}"}
    papers = any(row["paper"] is not None for row in rows)
    lines = []
    for row in rows:
        change = "" if row["scheme"] == "unquantized" else f"{row['nll'] - row['baseline_nll']:+.4f}"
        paper = {"paper": f"{row['paper']:.2f}" if row["paper"] is not None else ""}
        lines.append(line(columns, row) | {"NLL change": change} | (paper if papers else {}))
    return lines
