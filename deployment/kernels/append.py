"""Storing new tokens, host side: quantize, choose outliers, pack, write, without waiting for the device.

One token per sequence takes one launch for keys and values together, in CUDA C++ (append.cu). Chunks, and whatever that does not take, are two
launches in Triton for each (chunk.py), and where errors are fed back one between them. Codes and
outliers are those of `Quantizer.encode` bit for bit: divisions round as IEEE says, and ties go to the lowest channel. Room
for the outliers must be there already (`PackedTensor.make_room`).
"""

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor

from deployment.format.layout import PackedTensor
from deployment.kernels import append_host
from deployment.kernels.chunk import encode_kernel, store_kernel
from deployment.kernels.feedback import feed_back
from deployment.kernels.part import encode_own, with_all_heads
from deployment.kernels.side import Codes, Side, contiguous, places


def append(sides: Sequence[Side], stored: Tensor, padding: Tensor, overflow: Tensor) -> None:
    """Store new tokens of one or two sides, of which row b's first `padding[b]` are none, behind `stored[b]` others.

    `overflow` `[1]` int32 becomes 1 where a page's streams of outliers have no room.
    """
    sides = [side if side.x.stride(-1) == 1 else contiguous(side) for side in sides]
    if sides[0].x.shape[2] == 1 and append_host.takes(sides):
        whole = [with_all_heads(side) if side.is_partial else side for side in sides]
        append_host.append_token(whole, stored, padding, overflow)
    else:
        _append_chunk(sides, stored, padding, overflow)


def _append_chunk(sides: Sequence[Side], stored: Tensor, padding: Tensor, overflow: Tensor) -> None:
    fed = [side for side in sides if side.packed.feedback is not None]
    found = {id(side): _encode(side, stored, padding) for side in sides}
    if fed and append_host.takes(fed):
        targets = append_host.feed_back(fed, [found[id(side)] for side in fed])
    else:
        targets = [feed_back(side, found[id(side)]) for side in fed]
    # what outliers are stored as
    exact = {id(side): of_side for side, of_side in zip(fed, targets, strict=True)}
    for side in sides:
        _store(side, exact.get(id(side), side.x), found[id(side)], stored, padding, overflow)


def _encode(side: Side, stored: Tensor, padding: Tensor) -> Codes:
    """What is found of a chunk, whose sinks are stored; of tokens whose other heads are elsewhere, after they were gathered."""
    if not side.is_partial:
        return _encode_all(side, stored, padding)
    return encode_own(side, lambda whole: _encode_all(whole, stored, padding))


def _encode_all(side: Side, stored: Tensor, padding: Tensor) -> Codes:
    packed, x, tables = side.packed, side.x, side.packed.tables
    batch, heads, tokens, dim = x.shape
    found = Codes.empty(x)
    encode_kernel[(batch * tokens,)](
        x,
        *x.stride()[:3],
        stored,
        padding,
        side.sinks,
        found.codes,
        found.ranges,
        found.counts,
        tables.scale,
        tables.zero,
        tables.width,
        tables.first_boundary,
        tables.boundaries,
        tokens,
        G=heads,
        D=dim,
        HEADS=triton.next_power_of_2(heads),
        LANES=triton.next_power_of_2(dim),
        SINKS=side.sinks.shape[2],
        DYNAMIC=side.dynamic,
        PER_END=side.per_end,
        OUTLIERS=packed.keeps_outliers,
        FED=packed.feedback is not None,
        WIDEST=tables.widest,
        BITS=side.element_bits,
        num_warps=4,
    )
    return found


def _store(side: Side, exact: Tensor, found: Codes, stored: Tensor, padding: Tensor, overflow: Tensor) -> None:
    packed, tables = side.packed, side.packed.tables
    batch, heads, tokens, dim = exact.shape
    placing: dict[str, Any] = dict(zip(("SOURCE", "PLANES"), side.placing, strict=True))
    for page in side.pages:
        store_kernel[(batch * heads, triton.cdiv(tokens, 64) + 1)](
            exact,
            *exact.stride()[:3],
            stored,
            padding,
            found.codes,
            found.ranges,
            found.counts,
            # what a program reads no other must have written
            page.words if page.outliers is None else page.outliers.ends.clone(),
            *side.page_pointers(page),
            overflow,
            tables.width,
            tables.offset,
            tables.channel,
            tokens,
            page.start,
            page.blocks,
            packed.order.words,
            side.sinks.shape[2],
            places(page),
            G=heads,
            D=dim,
            LANES=max(16, triton.next_power_of_2(dim)),
            DYNAMIC=side.dynamic,
            OUTLIERS=page.outliers is not None,
            SPAN=packed.span,
            **placing,
            num_warps=8,
        )


def takes(packed: PackedTensor) -> bool:
    """Whether the kernels can store what this quantizer makes; a cap on outliers takes a sort they lack."""
    capped = packed.quantizer.scheme.outlier_cap is not None
    return not capped
