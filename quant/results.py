"""Results are JSONL rows that say where they came from: device, versions, commit."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gradients.cli import UserError, note

# what rows of older versions do not say; where one of a group is said, the others were not meant
_LATER = (("weights",), ("text_digest",), ("moment_windows",), ("calibration_windows", "quantizers"))
_DEFAULTS = {"bos": False, "max_positions": None, "full_attention": False}  # what they were measured with


def results_file(text: str) -> str:
    """argparse type: a JSONL file to append rows to, told before anything is measured for them."""
    path = Path(text).absolute()
    place = next(each for each in (path, *path.parents) if each.exists())
    if path.is_dir() or (place != path and not place.is_dir()) or not os.access(place, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written; give another file")
    return text


def append_row(
    path: str | Path | None, row: dict[str, Any], packages: Sequence[str] = ("torch", "transformers")
) -> None:
    """Append `row` and its provenance to a JSONL file; nothing happens without a path.

    Raises `UserError` when it cannot be written. What a killed or failed writer left of a line stays a line of its own.
    """
    if path is None:
        return
    gpu = torch.cuda.is_available()
    provenance = {
        "device": torch.cuda.get_device_name() if gpu else f"{platform.machine()} cpu",
        **({"driver": _driver()} if gpu else {}),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in packages},
        "commit": commit(),
    }
    line = json.dumps({**row, **provenance}) + "\n"
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                line = "\n" + line
            file.write(line.encode())
    except OSError as error:
        raise UserError(
            f"results {str(path)!r} cannot be written ({error}); make room, or give another file"
        ) from error


def _driver() -> str:
    """The version of the GPU's driver, or `unknown` where its tool is missing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return (run.stdout.split() or ["unknown"])[0]


def read_rows(path: str | Path | None) -> list[dict[str, Any]]:
    """The rows of a JSONL file, none if there is none. Raises `UserError` when it cannot be read or holds anything else."""
    if path is None or not Path(path).exists():
        return []
    try:
        return [json.loads(line) for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"results {str(path)!r} cannot be read ({error}); give a JSONL file or a new name") from error
    except json.JSONDecodeError as error:
        raise UserError(f"results {str(path)!r} holds a line that is no row ({error}); remove that line") from error


def is_of(row: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    """Whether a row holds every field of `identity`, so that it need not be measured again.

    Rows of older versions do not say of which weights, text and calibration windows they are, and are believed, with a note; what
    they measured had no `bos`.
    """
    known = {**_DEFAULTS, **row}
    unsaid = {name for group in _LATER if not known.keys() & set(group) for name in group}
    if not all(known[name] == value if name in known else name in unsaid for name, value in identity.items()):
        return False
    if unsaid & identity.keys():
        _note_old_rows()
    return True


@cache
def _note_old_rows() -> None:
    note(
        "the results hold rows of an older version, which do not say of which weights, text or calibration windows they are; "
        "taken as these"
    )


def commit() -> str:
    """The repository's commit, `-dirty` with uncommitted changes, or `unknown` outside a repository.

    KVQUANT_COMMIT says it where a copy of the files runs whose history is elsewhere.
    """
    if said := os.environ.get("KVQUANT_COMMIT"):
        return said
    command = ["git", "describe", "--always", "--dirty"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip() or "unknown"
