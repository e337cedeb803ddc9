"""Atomic writes: a file appears under its name complete, or not at all.

The content goes to a temporary name in the same folder, is flushed to the disk, and is then renamed: a killed
process or a full disk leaves the earlier file, or none. What a killed process left of a temporary file is removed when
the same file is written again.
"""

import errno
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gradients.cli import UserError

_WRITE_FAILURES = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # no room
    *(errno.EACCES, errno.EPERM, errno.EROFS),  # not allowed
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),  # something else is there
}


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success rename it to `path`, on any failure remove it.

    Raises `UserError` when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    # several processes of several machines may write the same folder
    temporary = path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        if _is_write_failure(error):
            raise UserError(
                f"cannot write {path}: {error}; free or choose another place and run again, earlier files are untouched"
            ) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete temporary files of dead processes of this machine: those of the file `name`, or all in the folder."""
    form = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.(?:{re.escape(_machine())}\.)?(\d+)\.tmp")
    for entry in os.scandir(folder):
        match = form.fullmatch(entry.name)
        if match and not _is_alive(int(match[1])):
            with suppress(OSError):
                os.unlink(entry)


def _machine() -> str:
    return platform.node().split(".")[0][:40] or "localhost"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_write_failure(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _WRITE_FAILURES
    # safetensors wraps the operating system's error in one of its own
    return type(error).__name__ == "SafetensorError" and "os error" in str(error).lower()
