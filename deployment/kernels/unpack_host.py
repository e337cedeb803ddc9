"""Host side of unpack.cu: what it takes, its parameters, and its launch. Nothing waits for the device, but once for each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deployment.format.layout import PackedTensor
from deployment.format.page import Page
from deployment.format.tables import codebooks_of
from deployment.kernels import launch
from deployment.kernels.decode.compile import available
from deployment.kernels.decode.host import HEAD_DIMS, fixed_of, is_grouped
from deployment.kernels.launch import INT, LONG, POINTER, Run, structure
from deployment.kernels.packed import PackedSegment
from deployment.kernels.phase import Rotary
from quant.quantizer import TokenQuantizer
from quant.storage import BLOCK_TOKENS

_WIDTHS = 5  # 0 to 4 bits
Side = structure(
    "Side",
    ("words ranges slots groups levels result", POINTER),
    ("block_words", LONG),
    ("first_level", INT * (_WIDTHS + 1)),
)
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
        return 4 * 256 * _WIDTHS + 2 * (BLOCK_TOKENS * (self.head_dim + 8) + 4 * 16)


def takes(segment: PackedSegment, rotary: Rotary, key: Tensor) -> bool:
    """Whether unpack.cu can do it, here and now."""
    return key.is_cuda and fits(segment, rotary, key) and available(key.device)


def fits(segment: PackedSegment, rotary: Rotary, key: Tensor) -> bool:
    """Whether unpack.cu has words for it: groups, ranges of keys that are channels', no outliers, all channels rotated, fp16."""
    dim = segment.key.head_dim
    return (
        key.dtype == torch.float16
        and key.shape[-1] == dim
        and dim in HEAD_DIMS
        and rotary.half == dim // 2
        and is_grouped(segment.key)
        and is_grouped(segment.value)
        and not isinstance(segment.key.quantizer, TokenQuantizer)
        and segment.key_page.places == segment.value_page.places == 0
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
    run("unpack", shape, 2 * blocks * rows * (heads // together), dim, shape.shared_bytes, params)


def _side(packed: PackedTensor, page: Page, result: Tensor) -> Any:
    _, slots, groups = fixed_of(packed)
    tensors = {"words": page.words, "slots": slots, "groups": groups, "levels": packed.tables.levels, "result": result}
    if page.scales is not None:
        tensors["ranges"] = page.scales
    side = Side(**{name: tensor.data_ptr() for name, tensor in tensors.items()}, block_words=packed.order.words)
    side.first_level = (INT * (_WIDTHS + 1))(*_first_levels(packed))
    return side


def _first_levels(packed: PackedTensor) -> Sequence[int]:
    """Where the levels of each width begin in `Tables.levels`, -1 for widths that there are not."""
    firsts, first = [-1] * (_WIDTHS + 1), 0
    for width, codebook in codebooks_of(packed.quantizer).items():
        if width < _WIDTHS:
            firsts[width] = first
        first += len(codebook.levels)
    return firsts
