"""Decode attention on a CPU in C (native.c), for those who ask for it: `KVQUANT_NATIVE=1` compiles it on first use.

For one query the torch path is bound by its many passes over dequantized stretches. Here a block of 64 tokens of one head is
unpacked, rotated and used within the processor's first cache, so that what is read from memory is what is stored.

The library is built with `cc` (or `$CC`) for this very processor and kept in `~/.cache/kvquant` (`$XDG_CACHE_HOME`). It runs on
one thread. Without the variable the torch path does everything, and without a compiler, which is said.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deployment.format.groups import GroupOrder, half_words
from deployment.format.layout import PackedTensor
from deployment.format.order import usual_channels
from deployment.format.page import Page
from deployment.layer import PackedLayer
from deployment.rope import Rope
from deployment.step.reference import Segment
from gradients.cli import UserError
from gradients.models import KINDS
from quant.quantizer import TokenQuantizer
from quant.storage import BLOCK_TOKENS

VARIABLE = "KVQUANT_NATIVE"
_MOST_QUERIES = 16  # of a KV head; for more, matrix products over dequantized stretches are faster
_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-shared", "-fPIC")
_LEVELS = 16
_MOST_DIM = 256
_tables: WeakKeyDictionary[PackedTensor, list[Tensor | None]] = WeakKeyDictionary()


class _Side(ctypes.Structure):
    """`Side` of native.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "which", "columns", "levels", "scale", "zero")),
        *((name, ctypes.c_void_p) for name in ("scales", "index", "value", "ends")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "dim", "blocks", "bits", "keys")),
    ]


class _State(ctypes.Structure):
    """`State` of native.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "highest", "total", "out")),
        *((name, ctypes.c_int64) for name in ("queries", "tokens")),
    ]


def attend(
    layer: PackedLayer,
    rope: Rope,
    query: Tensor,
    exact: Segment,
    limits: list[list[int]],
    length: int,
) -> Tensor:
    """Softmax attention over what a layer has packed and over some tokens in full precision.

    Args:
        layer: one that `takes` says yes to.
        rope: of its keys.
        query: `[B, H, S, D]` float32, rotated and scaled.
        exact: tokens in full precision, rotated; which of them is seen must be said.
        limits: how many of the stored tokens each row's S queries see, the first ones.
        length: of the longest sequence by now.

    Returns `[B, H, S, D]` float32; zeros for a query that sees nothing.
    """
    library = _library()
    assert library is not None
    (batch, heads, tokens, dim), kv_heads = query.shape, layer.packed["key"].heads
    assert exact.visible is not None
    query, key, value, visible = (x.contiguous() for x in (query, exact.key, exact.value, exact.visible))
    highest, total = query.new_full((batch, heads, tokens, 1), -torch.inf), query.new_zeros(batch, heads, tokens, 1)
    out = torch.zeros_like(query)
    pointers = (tensor.data_ptr() for tensor in (query, highest, total, out))
    state = _State(*pointers, heads // kv_heads * tokens, tokens)
    _call(library.exact, state, key, value, visible, batch, kv_heads, dim, key.shape[2])
    longest = max(map(max, limits))
    for pages in zip(layer.packed["key"].pages, layer.packed["value"].pages, strict=True):
        start = layer.sink_tokens + pages[0].start
        blocks = min(-(-(longest - start) // BLOCK_TOKENS), pages[0].blocks)
        if blocks <= 0:
            break
        sides = [_side(layer.packed[kind], page) for kind, page in zip(KINDS, pages, strict=True)]
        seen = torch.tensor([[limit - start for limit in row] for row in limits])
        rotation = rope.block_tables(start, blocks, length, query.device)
        _call(library.stored, *(side for side, _ in sides), state, seen, blocks, *rotation)
    return out.div_(total.masked_fill_(total == 0, 1.0))


def takes(layer: PackedLayer, query: Tensor) -> bool:
    """Whether attention of queries `[B, H, S, D]` over a layer runs natively. Raises `UserError` for what the variable cannot be."""
    if query.device.type != "cpu" or query.dtype == torch.float64 or not _wanted():
        return False
    sides = layer.packed.values()
    if query.shape[1] // layer.packed["key"].heads * query.shape[2] > _MOST_QUERIES:
        return False
    return layer.rotary_half in (None, query.shape[-1] // 2) and all(map(_takes, sides)) and _library() is not None


def _wanted() -> bool:
    said = os.environ.get(VARIABLE) or "0"
    if said not in ("0", "1"):
        raise UserError(f"{VARIABLE}={said} says neither 0 nor 1; set it to one of them")
    return said == "1"


def _takes(side: PackedTensor) -> bool:
    """Whether all codes of a side have one width of 2, 3 or 4 bits, and channels are in their own order."""
    order, dim = side.order, side.head_dim
    if not isinstance(order, GroupOrder) or len(order.occurring) > 1 or order.occurring[0] not in (2, 3, 4):
        return False
    usual = usual_channels(side.heads, dim, order.kind, dim // 2, side.device)
    return dim % 64 == 0 and dim <= _MOST_DIM and order.channels is usual


def _call(function: Any, *arguments: ctypes.Structure | Tensor | int) -> None:
    """A function of native.c: structures and tensors are pointers there, and numbers int64, which travel alike."""
    numbers = [
        ctypes.addressof(one) if isinstance(one, ctypes.Structure) else one if isinstance(one, int) else one.data_ptr()
        for one in arguments
    ]
    function(*map(ctypes.c_void_p, numbers))


def _side(packed: PackedTensor, page: Page) -> tuple[_Side, object]:
    """What native.c is told, and what must outlive the call."""
    streams, order = page.outliers, packed.order
    assert isinstance(order, GroupOrder)
    if streams is not None and streams.starts is not None:  # kernels leave room between streams
        streams = streams.rebuilt(*streams.entries())
    lists = [None] * 3 if streams is None else [streams.index, streams.value, streams.ends]
    # an empty tensor has no address, and then there is nothing to be read
    pointers = [
        None if tensor is None else tensor.data_ptr() or None
        for tensor in (page.words, *_fixed(packed), page.scales, *lists)
    ]
    numbers = (packed.batch, packed.heads, packed.head_dim, page.blocks, order.occurring[0], order.kind == "key")
    return _Side(*pointers, *numbers), streams


def _fixed(packed: PackedTensor) -> list[Tensor | None]:
    """What is the same for all pages: words of rows, levels, scales of channels."""
    if packed not in _tables:
        order, tables = packed.order, packed.tables
        assert isinstance(order, GroupOrder)
        # so that bits above a code, which belong to its neighbours, do not matter
        levels = tables.levels.repeat(_LEVELS // len(tables.levels))
        by_token = isinstance(packed.quantizer, TokenQuantizer)
        scales = [None, None] if by_token else [tables.scale, tables.zero]
        _tables[packed] = [*half_words(order), levels, *scales]
    return _tables[packed]


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
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: nobody's home
        said = getattr(error, "stderr", None) or b""
        reason = (said.decode(errors="replace").strip().splitlines() or [str(error)])[0]
        warnings.warn(f"{VARIABLE}=1, but there is no C library ({reason}): torch attends, more slowly", stacklevel=2)
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
