"""Tables of the READMEs as lists of lines, each of them from a column's name to its text, and as Markdown."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Line = dict[str, str]


def line(columns: Mapping[str, str], row: Mapping[str, Any], **more: Any) -> Line:
    """The fields of a row, and `more`, in the format that each column has, like `{us:.0f}`."""
    return {name: style.format(**{**row, **more}) for name, style in columns.items()}


def markdown(lines: Sequence[Line]) -> str:
    """A table with its first column to the left and all others to the right; lines may lack columns of the first."""
    header = list(lines[0])
    cells = [
        header,
        ["---", *["--:"] * (len(header) - 1)],
        *([each.get(name, "") for name in header] for each in lines),
    ]
    return "".join(f"| {' | '.join(each)} |\n" for each in cells)


def latest(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    """The last row of each key, in the order in which keys first came."""
    return list({key(row): row for row in rows}.values())


def short(device: str) -> str:
    """`NVIDIA H100 80GB HBM3` as `H100`."""
    return device.removeprefix("NVIDIA ").split()[0]


def percent(share: float, style: str) -> str:
    """`0.065` as `6.5 %`."""
    return format(share, style).replace("%", " %")
