"""Storing new tokens, host side: quantize, choose outliers, pack, write, without waiting for the device.

One token per sequence takes one launch for keys and values together (step.py), a chunk two for each (chunk.py), and one more
where errors are fed back (feedback.py), which single tokens take too. Codes and
outliers are those of `Quantizer.encode` bit for bit: divisions round as IEEE says, and ties go to the lowest channel. Room
for the outliers must be there already (`PackedTensor.make_room`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from deployment.kernels.chunk import encode_kernel, store_kernel
from deployment.kernels.feedback import feed_back
from deployment.kernels.part import encode_own
from deployment.kernels.step import step_kernel
from deployment.kernels.unpack import source_of
from deployment.layout import PackedTensor, Page
from quant.outliers import outliers_per_end
from quant.quantizer import TokenQuantizer


@dataclass(frozen=True)
class Side:
    """New keys or values `x` `[B, G, S, D]`, and where they go.

    The first `sinks.shape[2]` tokens of a sequence go to `sinks` `[B, G, sink tokens, D]`, others to `pages`: all that may be
    touched.
    """

    packed: PackedTensor
    x: Tensor
    sinks: Tensor
    pages: list[Page]

    @property
    def dynamic(self) -> bool:
        """Whether ranges are the tokens' own."""
        return isinstance(self.packed.quantizer, TokenQuantizer)

    @property
    def is_partial(self) -> bool:
        """Whether a token's range takes heads that are not here."""
        quantizer = self.packed.quantizer
        return isinstance(quantizer, TokenQuantizer) and not quantizer.part.is_whole

    @property
    def per_end(self) -> int:
        """Outliers at each end of a token, where ranges are its own."""
        quantizer = self.packed.quantizer
        channels = self.packed.heads * self.packed.head_dim
        return outliers_per_end(channels, quantizer.scheme.outliers) if self.dynamic else 0

    @property
    def placing(self) -> tuple[int, int]:
        """The order of codes, as unpack.py numbers them, and which planes they have."""
        return source_of(self.packed.order), self.packed.tables.planes

    @property
    def element_bits(self) -> int:
        """Of a number of x."""
        return self.x.element_size() * 8

    def page_pointers(self, page: Page) -> tuple[Tensor, ...]:
        """words, scales, index, value, starts, ends; what a page lacks is never read."""
        streams, unused = page.outliers, page.words
        scales = unused if page.scales is None else page.scales
        if streams is None:
            return (page.words, scales, *(unused,) * 4)
        assert streams.starts is not None
        return page.words, scales, streams.index, streams.value, streams.starts, streams.ends

    def pointers(self, page: Page) -> tuple[Tensor, ...]:
        """Everything that `put_token` (step.py) reads and writes."""
        tables = self.packed.tables
        table = (tables.scale, tables.zero, tables.width, tables.first_boundary, tables.boundaries, tables.offset)
        return (self.x, self.sinks, *self.page_pointers(page), *table, tables.slot)

    def constants(self) -> tuple[int, ...]:
        """In the order in which `put_token` (step.py) wants them."""
        packed = self.packed
        outliers = packed.keeps_outliers
        return (
            self.dynamic,
            self.per_end,
            outliers,
            *self.placing,
            packed.tables.widest,
            packed.span,
            self.element_bits,
        )


def append(sides: Sequence[Side], stored: Tensor, padding: Tensor, overflow: Tensor) -> None:
    """Store new tokens of one or two sides, of which row b's first `padding[b]` are none, behind `stored[b]` others.

    `overflow` `[1]` int32 becomes 1 where a page's streams of outliers have no room.
    """
    sides = [side if side.x.stride(-1) == 1 else _contiguous(side) for side in sides]
    for side in sides:
        if side.is_partial:
            _append_chunk(side, stored, padding, overflow)
    sides = [side for side in sides if not side.is_partial]
    if not sides:
        return
    if sides[0].x.shape[2] == 1 and all(side.packed.feedback is None for side in sides):
        _append_token(sides, stored, padding, overflow)
    else:
        for side in sides:
            _append_chunk(side, stored, padding, overflow)


def _contiguous(side: Side) -> Side:
    return Side(side.packed, side.x.contiguous(), side.sinks, side.pages)


def _append_token(sides: Sequence[Side], stored: Tensor, padding: Tensor, overflow: Tensor) -> None:
    key, value = sides[0], sides[-1]
    batch, heads, _, dim = key.x.shape
    channels = triton.next_power_of_2(heads * dim)
    for key_page, value_page in zip(key.pages, value.pages, strict=True):
        step_kernel[(len(sides) * batch * heads,)](
            key.pointers(key_page),
            value.pointers(value_page),
            *key.x.stride()[:2],
            *value.x.stride()[:2],
            key.packed.order.words,
            value.packed.order.words,
            _places(key_page),
            _places(value_page),
            stored,
            padding,
            overflow,
            key_page.start,
            key_page.blocks,
            batch * heads,
            KEY=key.constants(),
            VALUE=value.constants(),
            SIZES=(heads, dim, max(16, triton.next_power_of_2(dim)), channels, key.sinks.shape[2]),
            num_warps=4 if channels < 2048 else 8,
        )


def _encode(side: Side, stored: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int16 `[B, S, C]` of a chunk, and its tokens' ranges fp16 `[B, S, 2]`; sinks are stored."""
    packed, x, tables = side.packed, side.x, side.packed.tables
    batch, heads, tokens, dim = x.shape
    codes = torch.empty(batch, tokens, heads * dim, dtype=torch.int16, device=x.device)
    ranges = torch.empty(batch, tokens, 2, dtype=torch.float16, device=x.device)
    encode_kernel[(batch * tokens,)](
        x,
        *x.stride()[:3],
        stored,
        padding,
        side.sinks,
        codes,
        ranges,
        tables.scale,
        tables.zero,
        tables.width,
        tables.first_boundary,
        tables.boundaries,
        tokens,
        G=heads,
        D=dim,
        CHANNELS=triton.next_power_of_2(heads * dim),
        SINKS=side.sinks.shape[2],
        DYNAMIC=side.dynamic,
        PER_END=side.per_end,
        OUTLIERS=packed.keeps_outliers,
        WIDEST=tables.widest,
        BITS=side.element_bits,
        num_warps=4,
    )
    return codes, ranges


def _append_chunk(side: Side, stored: Tensor, padding: Tensor, overflow: Tensor) -> None:
    packed, x, tables, order = side.packed, side.x, side.packed.tables, side.packed.order
    batch, heads, tokens, dim = x.shape

    def encode(of: PackedTensor, new: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return _encode(Side(of, new, sinks, []), stored, padding)

    codes, ranges = encode_own(packed, x, side.sinks, encode) if side.is_partial else _encode(side, stored, padding)
    if packed.feedback is not None:
        x = feed_back(packed, x, codes, ranges, side.dynamic)  # what outliers are stored as
    placing: dict[str, Any] = dict(zip(("SOURCE", "PLANES"), side.placing, strict=True))
    for page in side.pages:
        store_kernel[(batch * heads,)](
            x,
            *x.stride()[:3],
            stored,
            padding,
            codes,
            ranges,
            *side.page_pointers(page),
            overflow,
            tables.width,
            tables.offset,
            tables.channel,
            tokens,
            page.start,
            page.blocks,
            order.words,
            side.sinks.shape[2],
            _places(page),
            G=heads,
            D=dim,
            LANES=max(16, triton.next_power_of_2(dim)),
            DYNAMIC=side.dynamic,
            OUTLIERS=page.outliers is not None,
            SPAN=packed.span,
            **placing,
            num_warps=8,
        )


def _places(page: Page) -> int:
    return 0 if page.outliers is None else page.outliers.index.numel()


def takes(packed: PackedTensor) -> bool:
    """Whether the kernels can store what this quantizer makes; a cap on outliers takes a sort they lack."""
    capped = packed.quantizer.scheme.outlier_cap is not None
    return not capped
