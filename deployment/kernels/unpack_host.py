"""Host side of unpack.cu: what it takes, its parameters, and its launch. Nothing waits for the device, but once for each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deployment.format.layout import PackedTensor
from deployment.format.page import Page
from deployment.format.tables import codebooks_of
from deployment.kernels import launch
from deployment.kernels.decode.compile import available
from deployment.kernels.decode.host import fixed_of, reads_codes
from deployment.kernels.launch import INT, LONG, POINTER, Run, addresses, structure
from deployment.kernels.packed import PackedSegment
from deployment.kernels.phase import Rotary
from quant.quantizer import TokenQuantizer
from quant.storage import BLOCK_TOKENS

_WIDTHS = 5  # 0 to 4 bits
_OF_PAGE = "words ranges index value starts ends"
Side = structure(
    "Side",
    (f"{_OF_PAGE} slots groups levels result", POINTER),
    ("block_words", LONG),
    ("first_level", INT * _WIDTHS),
    ("outliers", INT),
)
_sides: WeakKeyDictionary[PackedTensor, Any] = WeakKeyDictionary()  # what is the same of all pages
Params = structure(
    "Params",
    ("side", Side * 2),
    ("origins limits steps turn", POINTER),
    ("shift", LONG),
    ("blocks first count row0 rows room at heads", INT),
)


@dataclass(frozen=True)
class Shape(launch.Shape):
    """What unpack.cu is compiled for."""

    FILE = "unpack.cu"

    head_dim: int
    heads: int  # of a block of threads
    dynamic: int

    @property
    def shared_bytes(self) -> int:
        """`sizeof(Shared)`."""
        tables = 4 * 256 * _WIDTHS + self.heads * (33 * self.head_dim // 2 + 8)
        return -(-(tables + 2 * (BLOCK_TOKENS * (self.head_dim + 8) + 4 * 16)) // 16) * 16


def takes(segment: PackedSegment, rotary: Rotary, key: Tensor) -> bool:
    """Whether unpack.cu can do it here and now; what it can do it does faster than unpack.py (LOG.md)."""
    return key.is_cuda and fits(segment, rotary, key) and available(key.device)


def fits(segment: PackedSegment, rotary: Rotary, key: Tensor) -> bool:
    """Whether unpack.cu has words for it: groups, ranges of keys that are channels', all channels rotated, fp16."""
    dim = segment.key.head_dim
    return (
        key.dtype == torch.float16
        and key.shape[-1] == dim
        and rotary.half == dim // 2
        and reads_codes(segment.key, segment.value)
    )


def unpack_by(
    run: Run,
    segment: PackedSegment,
    rotary: Rotary,
    first: int,
    blocks: int,
    row0: int,
    key: Tensor,
    value: Tensor,
    at: int,
) -> None:
    """As `unpack` (unpacking.py), by any means of running a kernel."""
    rows, room, heads, dim = key.shape
    together = next(count for count in (4, 2, 1) if heads % count == 0)
    sides = ((segment.key, segment.key_page, key), (segment.value, segment.value_page, value))
    params = Params(
        origins=segment.origins.data_ptr(), limits=segment.limits.data_ptr(), steps=rotary.steps.data_ptr(),
        turn=rotary.by_token.data_ptr(), shift=segment.start, blocks=segment.key_page.blocks, first=first, count=blocks,
        row0=row0, rows=rows, room=room, at=at, heads=heads,
    )  # fmt: skip
    for number, (packed, page, result) in enumerate(sides):
        params.side[number] = _side(packed, page, result)
    shape = Shape(dim, together, int(isinstance(segment.value.quantizer, TokenQuantizer)))
    run("unpack", shape, 2 * blocks * rows * (heads // together), 2 * dim, shape.shared_bytes, params)


def _side(packed: PackedTensor, page: Page, result: Tensor) -> Any:
    held = _sides.get(packed)
    if held is None:
        _, slots, groups = fixed_of(packed)
        held = _sides[packed] = Side(**addresses(slots=slots, groups=groups, levels=packed.tables.levels))
        held.block_words, held.first_level = packed.order.words, (INT * _WIDTHS)(*_first_levels(packed))
    side = Side.from_buffer_copy(held)
    side.result, side.outliers = result.data_ptr(), int(page.places > 0)
    for name, tensor in zip(_OF_PAGE.split(), page.for_kernels(), strict=True):
        setattr(side, name, tensor.data_ptr())
    return side


def _first_levels(packed: PackedTensor) -> Sequence[int]:
    """Where the levels of each width begin in `Tables.levels`, -1 for widths that there are not."""
    firsts, first = [-1] * _WIDTHS, 0
    for width, codebook in codebooks_of(packed.quantizer).items():
        if width < _WIDTHS:
            firsts[width] = first
        first += len(codebook.levels)
    return firsts
