"""Decode attention on a CPU in C (native.c), for those who ask for it: `KVQUANT_NATIVE=1` compiles it on first use.

For one query the torch path is bound by its many passes over dequantized stretches. Here a block of 64 tokens of one head is
unpacked, rotated and used within the processor's first cache, so that what is read from memory is what is stored.

The library is built with `cc` (or `$CC`) for this very processor and kept in `~/.cache/kvquant` (`$XDG_CACHE_HOME`). It runs on
one thread. Without a compiler, or the variable, the torch path does everything.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from deployment.layout import PackedTensor, Page
from deployment.order import FragmentOrder, fragment_words
from quant.storage import BLOCK_TOKENS

VARIABLE = "KVQUANT_NATIVE"
NATIVE_BLOCKS = 128  # of a segment: scores are held for so many at a time
_MOST_QUERIES = 16  # of a KV head; for more, matrix products over dequantized stretches are faster
_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-shared", "-fPIC")
_MOST_LEVELS = 16


class _Side(ctypes.Structure):
    """`Side` of native.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "which", "columns", "levels", "scale", "zero")),
        *((name, ctypes.c_void_p) for name in ("index", "value", "begin", "end")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "dim", "blocks", "first", "last", "bits")),
        *((name, ctypes.c_int64) for name in ("by_token", "keys")),
    ]


@dataclass(frozen=True)
class NativeSegment:
    """Blocks `first`, ..., `last - 1` of a page of keys and one of values; see `Segment` (kernels/attend.py).

    `rotation` is what `Rope.block_tables` says of these blocks.
    """

    key: PackedTensor
    value: PackedTensor
    pages: tuple[Page, Page]
    first: int
    last: int
    rotation: tuple[Tensor, ...]
    visible: Tensor | None

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.key.heads

    def scores(self, query: Tensor) -> Tensor:
        """`[B, G, Q, n]` of rotated queries `[B, G, Q, D]` float32."""
        query = query.contiguous()
        out = query.new_empty(*query.shape[:3], (self.last - self.first) * BLOCK_TOKENS)
        side, held = _side(self.key, self.pages[0], self.first, self.last)
        tables = [table.data_ptr() for table in self.rotation]
        _call("scores", side, query.data_ptr(), query.shape[2], *tables, out.data_ptr())
        del held
        return out

    def attended(self, weights: Tensor) -> Tensor:
        """`[B, G, Q, D]` of weights `[B, G, Q, n]` float32."""
        weights = weights.contiguous()
        out = weights.new_zeros(*weights.shape[:3], self.value.head_dim)
        side, held = _side(self.value, self.pages[1], self.first, self.last)
        _call("attended", side, weights.data_ptr(), weights.shape[2], out.data_ptr())
        del held
        return out


def takes(sides: Sequence[PackedTensor], queries: int, device: torch.device) -> bool:
    """Whether attention of `queries` queries to a KV head over these keys and values runs natively."""
    if device.type != "cpu" or queries > _MOST_QUERIES or os.environ.get(VARIABLE) != "1":
        return False
    return all(isinstance(side.order, FragmentOrder) for side in sides) and _library() is not None


def _call(name: str, side: _Side, *arguments: int) -> None:
    library = _library()
    assert library is not None
    # pointers and int64 counts travel alike
    getattr(library, name)(ctypes.byref(side), *(ctypes.c_void_p(number) for number in arguments))


def _side(packed: PackedTensor, page: Page, first: int, last: int) -> tuple[_Side, list[Tensor]]:
    """What native.c is told, and the tensors that must outlive the call."""
    order, tables = packed.order, packed.tables
    assert isinstance(order, FragmentOrder)
    levels = torch.zeros(_MOST_LEVELS)
    levels[: len(tables.levels)] = tables.levels
    scale, zero = tables.scale, tables.zero
    if page.scales is not None:
        inside = page.scales[:, first * BLOCK_TOKENS : last * BLOCK_TOKENS]
        scale, zero = inside.float().unbind(-1)
        scale, zero = scale.contiguous(), zero.contiguous()
    held = [page.words, *fragment_words(order), levels, scale, zero]
    pointers = [tensor.data_ptr() for tensor in held]
    outliers: list[int | None] = [None] * 4
    if page.outliers is not None:
        streams = page.outliers
        begin, end = streams.places()
        lists = [streams.index, streams.value, begin, end]
        # an empty tensor has no address, and then there is nothing to be read
        outliers = [tensor.data_ptr() or None for tensor in lists]
        held += lists
    numbers = (packed.batch, packed.heads, packed.head_dim, page.blocks, first, last, order.bits)
    return _Side(*pointers, *outliers, *numbers, page.scales is not None, order.role == "key"), held


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, built if it is not there yet; None where that cannot be done."""
    try:
        compiler = shlex.split(os.environ.get("CC", "cc"))
        parts = (_SOURCE.read_text(), *compiler, *_FLAGS, _processor())
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvquant"
        library = folder / f"native-{digest[:16]}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as build:
                made = Path(build) / library.name
                command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                made.replace(library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: nobody's home
        return None


def _processor() -> str:
    """What tells processors apart, since a home folder may be shared by several machines."""
    try:
        flags = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))
        ]
    except OSError:
        flags = []
    return flags[0] if flags else f"{platform.machine()} {platform.processor()}"
