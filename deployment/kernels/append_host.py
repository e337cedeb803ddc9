"""Host side of append.cu: what it takes, its parameters, and its launches. Nothing waits for the device."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deployment.kernels import launch
from deployment.kernels.decode.compile import available, most_shared, runner
from deployment.kernels.launch import ELEMENTS, INT, LONG, POINTER, Run, addresses, structure
from deployment.kernels.side import Codes, Side
from deployment.kernels.unpack import source_of

_MOST_DIM = 256
_MOST_BITS = 6
_MOST_CHANNELS = 1 << 13
_TILE = 64  # tokens of a block of `feed_back`, which has D threads
_THREADS = 256  # of a block that stores a token
_TABLES = ("scale", "zero", "levels", "boundaries", "width", "first_level", "first_boundary", "offset", "slot")

CSide = structure(
    "CSide",
    ("x sinks scales index value codes targets words ranges matrix starts ends", POINTER),
    ("scale zero levels boundaries width first_level first_boundary offset slot order", POINTER),
    ("stride_b stride_g stride_s block_words places", LONG),
    ("dynamic outliers per_end source span all_levels all_boundaries channels first_head", INT),
)
Params = structure(
    "Params",
    ("side", CSide * 2),
    ("stored padding overflow", POINTER),
    ("page_start blocks streams sinks tokens", LONG),
)


@dataclass(frozen=True)
class Shape(launch.Shape):
    """What append.cu is compiled for."""

    FILE = "append.cu"

    head_dim: int
    heads: int
    x_heads: int
    levels: int
    element: int
    fed: int

    @cached_property
    def token_bytes(self) -> int:
        """Shared memory of `append_token`, `sizeof(Shared)`."""
        dim, tables = self.head_dim, self.fed and self.levels <= 16 and self.head_dim <= 128
        return (
            (2 * dim * dim if self.fed else 16)
            + 8 * (dim * self.levels if tables else 4)
            + 8 * 128
            + 25 * dim
            + 4 * (3 * dim // 32 + 2 * _THREADS // 32)
        )

    @cached_property
    def tile_bytes(self) -> int:
        """Shared memory of `feed_back`, `sizeof(Tile)`."""
        return self.head_dim * (48 + 4 * (_TILE + 1) + 2 * 4 + 3 + _TILE + 4) + 7 * 8 * self.levels


def takes(sides: Sequence[Side]) -> bool:
    """Whether append.cu can do it, here and now; where only the installation is to blame, that is said once."""
    device = sides[0].x.device
    if device.type != "cuda" or not fits(sides):
        return False
    shape = _shape(sides)
    return available(device) and max(shape.token_bytes, shape.tile_bytes) <= most_shared(device)


def fits(sides: Sequence[Side]) -> bool:
    """Whether append.cu has words for it."""
    dim, widest = sides[0].packed.head_dim, max(side.packed.tables.widest for side in sides)
    return (
        dim % 32 == 0
        and dim <= _MOST_DIM
        and max(side.x.shape[1] for side in sides) * dim <= _MOST_CHANNELS
        and widest <= _MOST_BITS
        and all(side.x.dtype in ELEMENTS and side.x.dtype == sides[0].x.dtype for side in sides)
    )


def append_token(sides: Sequence[Side], stored: Tensor, padding: Tensor, overflow: Tensor) -> None:
    """Store one token per sequence, as `append` (append.py)."""
    run, shape = _runner(sides), _shape(sides)
    for pages in zip(*(side.pages for side in sides), strict=True):
        params = _params(sides, **addresses(stored=stored, padding=padding, overflow=overflow))
        params.page_start, params.blocks = pages[0].start, pages[0].blocks
        for number, page in enumerate(pages):
            words, scales, index, value, starts, ends = page.for_kernels()
            found = addresses(words=words, scales=scales, index=index, value=value, starts=starts, ends=ends)
            _set(params.side[number], places=page.places, **found)
        # with a single side the kernel takes its blocks for those of values
        params.side[1] = params.side[len(sides) - 1]
        run("append_token", shape, len(sides) * params.streams, _THREADS, shape.token_bytes, params)


def feed_back(sides: Sequence[Side], found: Sequence[Codes]) -> list[Tensor]:
    """Replace the codes of each side's new tokens; returns their targets, `[B, G, S, D]` fp16."""
    shape, params, results = _shape(sides), _params(sides), []
    for number, each in enumerate(found):
        targets = torch.empty_like(each.codes, dtype=torch.float16)
        _set(params.side[number], **addresses(codes=each.codes, ranges=each.ranges, targets=targets))
        results.append(targets.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2))
    tiles = len(sides) * params.streams * -(-params.tokens // _TILE)
    _runner(sides)("feed_back", shape, tiles, shape.head_dim, shape.tile_bytes, params)
    return results


def _runner(sides: Sequence[Side]) -> Run:
    return runner(sides[0].x.device)


def _shape(sides: Sequence[Side]) -> Shape:
    packed, widest = sides[0].packed, max(side.packed.tables.widest for side in sides)
    heads, fed = max(side.x.shape[1] for side in sides), any(side.packed.feedback is not None for side in sides)
    return Shape(packed.head_dim, packed.heads, heads, 1 << widest, ELEMENTS[sides[0].x.dtype], int(fed))


def _params(sides: Sequence[Side], **more: int | None) -> ctypes.Structure:
    packed, (batch, _, tokens, _) = sides[0].packed, sides[0].x.shape
    params = Params(streams=batch * packed.heads, sinks=sides[0].sinks.shape[2], tokens=tokens, **more)
    for number, side in enumerate(sides):
        packed, tables, fed = side.packed, side.packed.tables, side.packed.feedback
        tensors = {name: getattr(tables, name) for name in _TABLES} | ({} if fed is None else vars(fed))
        strides = dict(zip(("stride_b", "stride_g", "stride_s"), side.x.stride(), strict=False))
        params.side[number] = CSide(
            **addresses(x=side.x, sinks=side.sinks, **tensors), **strides, block_words=packed.order.words, dynamic=side.dynamic,
            outliers=packed.keeps_outliers, per_end=side.per_end, source=source_of(packed.order), span=packed.span,
            all_levels=tables.levels.numel(), all_boundaries=tables.boundaries.numel(),
            channels=side.x.shape[1] * packed.head_dim, first_head=side.first_head,
        )  # fmt: skip
    return params


def _set(structure: ctypes.Structure, **fields: int | None) -> None:
    for name, value in fields.items():
        setattr(structure, name, value)
