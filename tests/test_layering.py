"""Imports point back along the data flow: gradients <- quant <- deployment."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

STAGES = ["gradients", "quant", "deployment"]


def imported_names(source: str) -> Iterator[str]:
    """Every absolute module name that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def violations(root: Path) -> list[str]:
    """Imports under `root` of a later stage, of tests or scripts, or by a relative path out of a stage."""
    found = []
    for position, stage in enumerate(STAGES):
        forbidden = {*STAGES[position + 1 :], "tests", "scripts", "conftest"}
        for path in sorted((root / stage).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            found += [
                f"{path.relative_to(root)} imports {name}"
                for name in imported_names(source)
                if name.split(".")[0] in forbidden
            ]
            depth = len(path.relative_to(root).parts) - 1
            found += [
                f"{path.relative_to(root)} imports out of its stage"
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.ImportFrom) and node.level > depth
            ]
    return found


def test_imports_point_back() -> None:
    assert all(list((REPOSITORY / stage).glob("*.py")) for stage in STAGES[:2])
    assert violations(REPOSITORY) == []


STATE = {"cache", "layer", "window", "rope", "checked", "kept", "devices", "handles"}
ROOMS = {  # of deployment: what each may import of it
    "format": {"format"},
    "kernels": {"format", "kernels"},
    **dict.fromkeys(STATE, {"format", "kernels"} | STATE),
    "step": {"format", "kernels", "step"} | STATE,
    "text": {"format", "step", "text", "attention"} | STATE,
    "measure": {"format", "kernels", "step", "measure"} | STATE,
}


def rooms_of(source: str) -> set[str]:
    """The rooms of deployment, or modules on its top floor, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "deployment":
            found |= {alias.name for alias in node.names}
    return found | {name.split(".")[1] for name in imported_names(source) if name.startswith("deployment.")}


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_of_deployment_imports_what_it_may(room: str) -> None:
    place = REPOSITORY / "deployment" / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    for path in files:
        assert rooms_of(path.read_text(encoding="utf-8")) <= ROOMS[room], path.name


def test_there_is_no_drawer_for_everything() -> None:
    names = {path.name for stage in STAGES for path in (REPOSITORY / stage).rglob("*.py")}
    assert names.isdisjoint({"utils.py", "common.py", "helpers.py", "misc.py"})
