"""The READMEs against the tree: links, commands and files exist, the Python runs, the paper's map names what is there."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import REPOSITORY

READMES = sorted(
    path
    for folder in (".", "gradients", "quant", "deployment", "deployment/kernels", "scripts", "scripts/results")
    for path in (REPOSITORY / folder).glob("*.md")
)
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def named(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def anchors(path: Path) -> set[str]:
    """The fragments that a file's headings are reached by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES, ids=named)
def test_links_lead_somewhere(readme: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", readme.read_text())):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        there = (readme.parent / path).resolve() if path else readme
        assert there.exists(), target
        assert not fragment or fragment in anchors(there), target


@pytest.mark.parametrize("readme", READMES, ids=named)
def test_commands_that_are_named_exist(readme: Path) -> None:
    text = readme.read_text()
    for module in re.findall(r"-m ((?:gradients|quant|deployment|scripts)[\w.]*)", text):
        assert find_spec(module.rstrip(".")), module
    for script in re.findall(r"scripts/[\w/]+\.(?:sh|py)", text):
        assert (REPOSITORY / script).exists(), script


def test_the_main_readme_stays_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 180


def test_its_python_runs_as_written(llama_folder, quantizers_file, capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    quickstart = re.findall(r'"(\.quickstart/[^"]*)"', code)
    assert len(quickstart) == 3
    for path in quickstart:
        own = quantizers_file if path.endswith(".safetensors") else llama_folder
        code = code.replace(f'"{path}"', f'"{own}"')
    variables: dict = {}
    exec(code, variables)
    said = capsys.readouterr().out
    assert "A list comprehension in Python is" in said
    assert variables["cache"].get_seq_length() == variables["output"].shape[1] - 1  # the last token was not read


@pytest.mark.parametrize("stage", ["gradients", "quant", "deployment"])
def test_a_stages_readme_lists_its_files_and_no_others(stage: str) -> None:
    listing = (REPOSITORY / stage / "README.md").read_text().split("\n## Files\n")[1]
    listed = set(re.findall(r"`([\w/]+\.(?:py|c))`", listing))
    files = [
        path.relative_to(REPOSITORY / stage) for end in ("py", "c") for path in (REPOSITORY / stage).rglob(f"*.{end}")
    ]
    present = {path.as_posix() for path in files if path.name != "__init__.py" and path.parts[0] != "kernels"}
    assert listed == present


def test_the_readme_of_kernels_lists_its_files() -> None:
    folder = REPOSITORY / "deployment" / "kernels"
    table = (folder / "README.md").read_text().split("\nWhat was measured")[0]
    listed = set(re.findall(r"`([\w/]+\.(?:py|cu|h))`", table)) - {"dispatch.py", "reference.py"}
    files = [path.relative_to(folder) for end in ("py", "cu", "h") for path in folder.rglob(f"*.{end}")]
    assert listed == {path.as_posix() for path in files if path.name != "__init__.py"}


def test_the_papers_map_names_what_the_code_has() -> None:
    section = (
        (REPOSITORY / "quant" / "README.md").read_text().split("## From the paper to the code")[1].split("\n## ")[0]
    )
    places = re.findall(r"`([\w/]+(?:\.py|/))`((?: `\w+`,?)*)", section)
    assert len(places) > 9
    for path, names in places:
        assert (REPOSITORY / path).exists(), path
        if path.endswith(".py"):
            tree = ast.parse((REPOSITORY / path).read_text())
            defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
            assert set(re.findall(r"\w+", names)) <= defined, path
