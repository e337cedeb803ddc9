"""Progress bars: on stderr, and off where nobody sees them or TQDM_DISABLE is set."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers.utils import logging


def shown() -> bool:
    """Whether bars are shown: stderr is a terminal, and TQDM_DISABLE unset or 0."""
    return os.environ.get("TQDM_DISABLE", "") in ("", "0") and sys.stderr.isatty()


def progress(iterable: Iterable[Any] | None = None, disable: bool = False, **options: Any) -> Any:
    """tqdm's bar with its options; `disable` can hide one that would be shown."""
    return tqdm(iterable, disable=disable or not shown(), **options)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block, transformers shows its own bars only where ours would be."""
    if shown() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
