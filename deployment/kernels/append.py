"""Storing new tokens, host side: quantize, choose outliers, pack, write, without waiting for the device.

One token per sequence takes one launch for keys and values together, in CUDA C++ (append.cu). Chunks, and whatever that does not take, are two
launches in Triton for each (encode.py, store.py), and where errors are fed back one between them. Codes and
outliers are those of `Quantizer.encode` bit for bit: divisions round as IEEE says, and ties go to the lowest channel. Room
for the outliers must be there already (`PackedTensor.make_room`).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
from torch import Tensor

from deployment.format.layout import PackedTensor
from deployment.kernels import append_host
from deployment.kernels.encode import encode_kernel
from deployment.kernels.side import Codes, Side
from deployment.kernels.store import store_kernel
from deployment.kernels.unpack import source_of
from quant.feedback_kernel import launch


def append(sides: Sequence[Side], stored: Tensor, padding: Tensor, overflow: Tensor) -> None:
    """Store new tokens of one or two sides, of which row b's first `padding[b]` are none, behind `stored[b]` others.

    `overflow` `[1]` int32 becomes 1 where a page's streams of outliers have no room.
    """
    sides = [side.with_all_heads() for side in sides]
    if sides[0].x.shape[2] == 1 and append_host.takes(sides):
        append_host.append_token(sides, stored, padding, overflow)
        return
    found = [_encode(side, stored, padding) for side in sides]
    sides = [side.with_own_heads() for side in sides]
    if fed := [number for number, side in enumerate(sides) if side.packed.feedback is not None]:
        given = [sides[number] for number in fed], [found[number] for number in fed]
        targets = append_host.feed_back(*given) if append_host.takes(given[0]) else list(map(_feed_back, *given))
        for number, exact in zip(fed, targets, strict=True):  # what outliers are stored as
            sides[number] = replace(sides[number], x=exact)
    for side, codes in zip(sides, found, strict=True):
        _store(side, codes, stored, padding, overflow)


def _encode(side: Side, stored: Tensor, padding: Tensor) -> Codes:
    """What is found of a chunk, whose sinks are stored."""
    packed, x, tables, found = side.packed, side.x, side.packed.tables, Codes.empty(side)
    batch, heads, tokens, dim = x.shape
    encode_kernel[(batch * tokens,)](
        x, *x.stride()[:3], stored, padding, side.sinks, found.codes, found.ranges, found.counts, tables.scale, tables.zero, tables.width,
        tables.first_boundary, tables.boundaries, tokens, G=packed.heads, D=dim, X_HEADS=heads, FIRST=side.first_head,
        HEADS=triton.next_power_of_2(heads), LANES=triton.next_power_of_2(dim), SINKS=side.sinks.shape[2], DYNAMIC=side.dynamic,
        PER_END=side.per_end, OUTLIERS=packed.keeps_outliers, FED=packed.feedback is not None, WIDEST=tables.widest, num_warps=4,
    )  # fmt: skip
    return found


def _feed_back(side: Side, found: Codes) -> Tensor:
    """Replace the codes of a side's new tokens; returns their targets, `[B, G, S, D]` fp16."""
    packed, tables, fed, targets = (
        side.packed,
        side.packed.tables,
        side.packed.feedback,
        torch.empty_like(found.codes, dtype=torch.float16),
    )
    assert fed is not None
    books = (tables.width, tables.first_boundary, tables.boundaries, tables.first_level, tables.levels)
    given = (tables.scale, tables.zero, *books, fed.order, fed.matrix)
    launch(side.x, found.codes, found.ranges if side.dynamic else None, targets, given, tables.widest, marked=True)
    return targets.unflatten(-1, (-1, packed.head_dim)).transpose(1, 2)


def _store(side: Side, found: Codes, stored: Tensor, padding: Tensor, overflow: Tensor) -> None:
    packed, x, tables = side.packed, side.x, side.packed.tables
    batch, heads, tokens, dim = x.shape
    for page in side.pages:
        # what a program reads no other must have written
        before = page.words if page.outliers is None else page.outliers.ends.clone()
        store_kernel[(batch * heads, triton.cdiv(tokens, 64) + 1)](
            x, *x.stride()[:3], stored, padding, found.codes, found.ranges, found.counts, before, *page.for_kernels(), overflow, tables.width,
            tables.offset, tables.channel, tokens, page.start, page.blocks, packed.order.words, side.sinks.shape[2], page.places, G=heads, D=dim,
            LANES=max(16, triton.next_power_of_2(dim)), SOURCE=source_of(packed.order), PLANES=tables.planes, DYNAMIC=side.dynamic,
            OUTLIERS=page.outliers is not None, SPAN=packed.span, num_warps=8,
        )  # fmt: skip


def takes(packed: PackedTensor) -> bool:
    """Whether the kernels can store what this quantizer makes; a cap on outliers takes a sort they lack."""
    return packed.quantizer.scheme.outlier_cap is None
