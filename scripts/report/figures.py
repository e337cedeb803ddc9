"""What the plot commands share: their options, how a picture looks, and how it is saved.

matplotlib is the extra `plots` and imported only when something is drawn, so that all else here runs without it.
Colours are those of Okabe and Ito, which stay apart for colour-blind eyes; no picture tells lines apart by colour alone.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradients.atomic import atomic_write
from gradients.cli import UserError, command_parser, non_negative_int
from gradients.models import Kind
from gradients.records import Records
from quant.results import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
INK, GREY, PALE, PALE_BLUE = "#222222", "#7F7F7F", "#D9D9D9", "#BFDCEC"
KIND_COLOURS: dict[Kind, str] = {"key": BLUE, "value": VERMILLION}

_STYLE: Any = {
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same picture everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#EBEBEB",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


def plot_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m scripts.report.plot_{name}`, with `--output`: by default not the picture that the README shows."""
    parser = command_parser(f"scripts.report.plot_{name}", description)
    parser.add_argument("--output", type=Path, default=Path(f"{name}.png"), help=f"the PNG ({name}.png)")
    return parser


def add_records_arguments(parser: argparse.ArgumentParser, layer: bool = True) -> None:
    """`--records`, `--sink-tokens` and, where one `layer` is drawn, `--layer`."""
    parser.add_argument("--records", required=True, help="folder written by `python -m gradients`")
    if layer:
        parser.add_argument("--layer", type=non_negative_int, required=True, help="the layer to draw, from 0")
    parser.add_argument("--sink-tokens", type=non_negative_int, default=1, help="first tokens to leave out (1)")


def open_layer(arguments: argparse.Namespace) -> Records:
    """The records, once it is known that they hold `--layer`. Raises `UserError`."""
    records = Records.open(arguments.records)
    layers = records.manifest.fingerprint.cached_layers
    if arguments.layer not in layers:
        raise UserError(f"--layer {arguments.layer}: records {arguments.records!r} hold {', '.join(map(str, layers))}")
    return records


def model_name(records: Records) -> str:
    """The recorded model's name, for titles."""
    return Path(records.manifest.model).name


def rows_of_one(path: Path, command: str, evaluation: Sequence[str], fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file that `command` wrote, all of one `evaluation`.

    Raises `UserError` when there are none, when one lacks a field, and when they differ in those of the evaluation.
    """
    rows = read_rows(path)
    if not rows:
        raise UserError(f"--results {str(path)!r} holds no rows; run `python -m {command} --results {path}`")
    for name in (*evaluation, *fields):
        if any(name not in row for row in rows):
            raise UserError(f"--results {str(path)!r}: a row lacks {name!r}; give rows of {command}")
    found = sorted({str([row[name] for name in evaluation]) for row in rows})
    if len(found) > 1:
        raise UserError(f"--results {str(path)!r} mixes evaluations, {' and '.join(found)}; give a file of one")
    return rows


@contextmanager
def style() -> Iterator[None]:
    """Everything drawn within looks alike. Raises `UserError` when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(
            f"plots need matplotlib, which cannot be imported ({error}); install it: pip install -e '.[plots]'"
        ) from error
    with matplotlib.rc_context(_STYLE):
        yield


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple["Figure", list[list["Axes"]]]:
    """A figure of `size` in inches and its axes, row by row; `options` are those of `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes.tolist()


def save(figure: "Figure", path: Path) -> None:
    """Write the figure as a PNG, completely or not at all. Raises `UserError` when it cannot be written."""
    with atomic_write(path) as temporary:
        # neither version nor date, so that the same picture is the same file
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})


def spread_out(positions: Sequence[float], gap: float) -> list[float]:
    """The nearest positions (least squares) in the same order of which no two are closer than `gap`: for labels."""
    order = np.argsort(positions, kind="stable")
    steps = gap * np.arange(len(order))
    blocks: list[list[float]] = []  # mean and size of runs that touch
    for wanted in np.asarray(positions, float)[order] - steps:
        blocks.append([float(wanted), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, size), (other, count) = blocks[-2:]
            blocks[-2:] = [[(mean * size + other * count) / (size + count), size + count]]
    placed = np.empty(len(order))
    placed[order] = np.repeat([mean for mean, _ in blocks], [int(size) for _, size in blocks]) + steps
    return placed.tolist()
