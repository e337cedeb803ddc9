"""Whether the kernels work with another version of Triton than the one that is installed.

    python -m scripts.checks.triton_versions 3.7.1 3.8.0 --jobs 4
    python -m scripts.checks.triton_versions 3.6.0 --with "numpy<2.4"     # which its interpreter needs

For each version a virtual environment is made in a temporary folder: that Triton, what --with names, and everything else from the
environment this runs in. There the kernels are compiled for GPUs that need not be there, and their tests run in the interpreter. Exits with
1 if anything fails. pip must be able to install the version, and takes it from wherever it is configured to.
"""

import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradients.cli import UserError, command_parser, format_table, positive_int, run_command

REPOSITORY = Path(__file__).resolve().parents[2]
COMPILING = "tests/test_kernels_compile.py"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def make_environment(folder: Path, version: str, others: Sequence[str] = ()) -> Path:
    """A virtual environment with few packages of its own; returns its interpreter. Raises `UserError` if pip fails."""
    venv.create(folder)
    names = {"base": str(folder), "platbase": str(folder)}
    own = Path(sysconfig.get_path("purelib", scheme="venv", vars=names))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(own)]
    command += [f"triton=={version}", *others]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
        what = " and ".join([f"triton {version}", *others])
        raise UserError(f"{what} cannot be installed: {reason}; give versions that pip finds")
    # what a .pth file names comes after the environment's own packages
    outside = [path for path in sys.path if Path(path).name.endswith("-packages")]
    (own / "outside.pth").write_text("".join(f"{path}\n" for path in outside))
    return Path(sysconfig.get_path("scripts", scheme="venv", vars=names)) / "python"


def parts() -> dict[str, list[str]]:
    """The files of tests to run, by what they show."""
    kernels = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "tests").glob("test_kernels_*.py"))
    return {"compiled": [COMPILING], "interpreted": [path for path in kernels if path != COMPILING]}


def run_part(python: Path, files: Sequence[str], jobs: int, minutes: int) -> dict[str, Any]:
    """Run tests with an interpreter: how many passed and failed, and how it ended; `output` is what pytest said."""
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    command += ["-n", str(jobs)] if jobs > 1 else []
    started = time.perf_counter()
    try:
        run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60 * minutes)
        code, output = run.returncode, run.stdout + run.stderr
    except subprocess.TimeoutExpired as expired:
        code, output = 1, f"stopped after {minutes} minutes: {expired}"
    found = {kind.rstrip("s"): int(count) for count, kind in _COUNTS.findall((output.strip().splitlines() or [""])[-1])}
    counts = {"passed": found.get("passed", 0), "failed": found.get("failed", 0) + found.get("error", 0)}
    works = code == 0 and counts["passed"] > 0
    return {**counts, "seconds": round(time.perf_counter() - started), "works": works, "output": output}


def installed_version(python: Path) -> str:
    """The Triton that an interpreter imports."""
    command = [str(python), "-c", "import triton; print(triton.__version__)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def check(version: str, others: Sequence[str], jobs: int, minutes: int) -> list[dict[str, Any]]:
    """A row for each part; what failed goes to stderr."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        python = make_environment(Path(folder), version, others)
        if (imported := installed_version(python)) != version:
            raise RuntimeError(f"the environment imports triton {imported}, not {version}")
        for part, files in parts().items():
            row = {"triton": version, "part": part, **run_part(python, files, jobs, minutes)}
            if not row["works"]:
                print(row["output"], file=sys.stderr)
            rows.append({name: value for name, value in row.items() if name != "output"})
    return rows


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.checks.triton_versions", __doc__)
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument(
        "--with", dest="others", nargs="+", default=[], metavar="PACKAGE", help="install these, too, as pip names them"
    )
    parser.add_argument("--jobs", type=positive_int, default=1, help="tests at a time (1)")
    parser.add_argument("--minutes", type=positive_int, default=30, help="limit for each part (30)")
    arguments = parser.parse_args(argv)
    for version in arguments.versions:
        if not _VERSION.fullmatch(version):
            raise UserError(f"version {version!r} is not of the form 3.6.0")
    rows = []
    for version in arguments.versions:
        rows += check(version, arguments.others, arguments.jobs, arguments.minutes)
    print(format_table(rows))
    return {"passed": all(row["works"] for row in rows), "rows": rows}


if __name__ == "__main__":
    run_command(main)
