"""Conventions every command of the three stages shares.

A command is a function `main(argv) -> dict`. It prints what a person wants to read, reports progress on
stderr, and its dictionary becomes one JSON object on the last line of stdout. Bad input is a `UserError`: one
line on stderr that names the thing, the value and the remedy, and exit code 2. A check whose dictionary says
`"passed": false` exits with 1. Anything else is a bug of ours and keeps its traceback.
"""

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

EXIT_NOT_PASSED = 1
EXIT_BAD_INPUT = 2
EXIT_NOT_READ = 141  # 128 + SIGPIPE, as a shell has it

_LESS = "ask for fewer tokens at once (--seqlen, --batch, --prefill-chunk), or spread the model (--device-map)"


class UserError(ValueError):
    """Input a user can mend; the message names the thing, the value and the remedy in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see `{self.prog} --help`")


def command_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """An argument parser for `python -m {module}` whose help shows the module's docstring unchanged."""
    return _Parser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    number = _int64(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive integer")
    return number


def non_negative_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    number = _int64(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def _int64(text: str) -> int:
    number = int(text)
    if number >= 2**63:  # torch has no larger ones, be they seeds or sizes
        raise argparse.ArgumentTypeError(f"{number} is too large")
    return number


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def share(text: str) -> float:
    """argparse type: a number above 0, and 1 at most."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0, and 1 at most")
    return number


def note(message: str) -> None:
    """Say on stderr what is worth knowing and no error; of a launcher's processes the first says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {' '.join(message.split())}", file=sys.stderr)


def require_text(text: str, name: str) -> str:
    """`text` as it was given. Raises `UserError` if this process took its bytes for another encoding than they are in."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        encoding = sys.getfilesystemencoding()
        raise UserError(
            f"{name} is no text in the encoding of this process, {encoding}; set PYTHONUTF8=1, or a UTF-8 locale"
        )
    return text


def run_command(main: Callable[[Sequence[str] | None], Mapping[str, Any] | None]) -> None:
    """Run `main` on the process's arguments, print its JSON line, and exit with 0, 1 if a check failed, or 2 for bad input.

    So it does where the memory, of the host or of a GPU, is not enough for it.

    Characters that the terminal or pipe cannot show are printed as `?`, and do not end the command. A pipe that nobody reads any more
    does, with 141.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        summary = main(None)
        if summary is not None:
            print(json.dumps(summary), flush=True)
    except (UserError, NotImplementedError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(f"error: out of memory ({' '.join(str(error).split())[:200]}); {_LESS}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries once more at its end
        sys.exit(EXIT_NOT_READ)
    end_process_group()
    if summary is not None and summary.get("passed") is False:
        sys.exit(EXIT_NOT_PASSED)


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has an error of its own for GPUs, and a message for the host."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def end_process_group() -> None:
    """Part from the other processes of a launcher, if there are any.

    Threads of a group that outlive the interpreter end a process now and then as if it had failed.
    """
    distributed = sys.modules.get("torch.distributed")  # whoever has a group has imported it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def format_table(rows: Sequence[Mapping[str, Any]], columns: str = "") -> str:
    """Rows as an aligned text table of `columns`, names with blanks between them; default: the keys of the first row."""
    header = columns.split() or list(rows[0])
    cells = [header] + [[_format_cell(row.get(key, "")) for key in header] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _format_cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
