"""Host side of append.cu: what it takes, its parameters, and its launches. Nothing waits for the device."""

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from deployment.format.page import Page
from deployment.kernels.decode.host import Run, structure
from deployment.kernels.side import Codes, Side, places
from quant.quantizer import TokenQuantizer

_MOST_DIM = 256
_MOST_BITS = 6
_MOST_CHANNELS = 1 << 13
_TILE = 64  # tokens of a block of `feed_back`, which has D threads
_THREADS = 256  # of a block that stores a token
_ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}

_LONG, _INT = ctypes.c_int64, ctypes.c_int
CSide = structure(
    "CSide",
    ("x sinks scales index value codes targets words ranges matrix starts ends", ctypes.c_void_p),
    ("scale zero levels boundaries width first_level first_boundary offset slot order", ctypes.c_void_p),
    ("stride_b stride_g stride_s block_words places", _LONG),
    ("dynamic outliers per_end source span all_levels all_boundaries channels first_head", _INT),
)
Params = structure(
    "Params",
    ("side", CSide * 2),
    ("stored padding overflow", ctypes.c_void_p),
    ("page_start blocks streams sinks tokens", _LONG),
)


@dataclass(frozen=True)
class Shape:
    """What append.cu is compiled for."""

    head_dim: int
    heads: int
    x_heads: int
    levels: int
    element: int
    fed: int

    @property
    def source(self) -> Path:
        """append.cu."""
        return Path(__file__).with_name("append.cu")

    def defines(self) -> dict[str, int]:
        """As macros."""
        return {name.upper(): value for name, value in asdict(self).items()}

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
    if not sides[0].x.is_cuda or not fits(sides):
        return False
    from deployment.kernels.decode.compile import available, most_shared

    shape = _shape(sides)
    return available(sides[0].x.device) and max(shape.token_bytes, shape.tile_bytes) <= most_shared(sides[0].x.device)


def fits(sides: Sequence[Side]) -> bool:
    """Whether append.cu has words for it."""
    dim, widest = sides[0].packed.head_dim, max(side.packed.tables.widest for side in sides)
    return (
        dim % 32 == 0
        and dim <= _MOST_DIM
        and max(_heads_of(side) for side in sides) * dim <= _MOST_CHANNELS
        and widest <= _MOST_BITS
        and all(side.x.dtype in _ELEMENTS and side.x.dtype == sides[0].x.dtype for side in sides)
    )


def append_token(sides: Sequence[Side], stored: Tensor, padding: Tensor, overflow: Tensor) -> None:
    """Store one token per sequence, as `append` (append.py)."""
    append_token_by(_runner(sides), sides, stored, padding, overflow)


def feed_back(sides: Sequence[Side], found: Sequence[Codes]) -> list[Tensor]:
    """Replace the codes of each side's new tokens; returns their targets, as `feed_back` (feedback.py)."""
    return feed_back_by(_runner(sides), sides, found)


def _runner(sides: Sequence[Side]) -> Run:
    from deployment.kernels.decode.compile import runner

    return runner(sides[0].x.device)


def append_token_by(run: Run, sides: Sequence[Side], stored: Tensor, padding: Tensor, overflow: Tensor) -> None:
    """`append_token` by any means of running a kernel."""
    shape = _shape(sides)
    for pages in zip(*(side.pages for side in sides), strict=True):
        params = _params(sides)
        params.stored, params.padding, params.overflow = stored.data_ptr(), padding.data_ptr(), overflow.data_ptr()
        params.page_start, params.blocks = pages[0].start, pages[0].blocks
        for number, (side, page) in enumerate(zip(sides, pages, strict=True)):
            _put_page(params.side[number], side, page)
        # with a single side the kernel takes its blocks for those of values
        params.side[1] = params.side[len(sides) - 1]
        run("append_token", shape, len(sides) * params.streams, _THREADS, shape.token_bytes, params)


def feed_back_by(run: Run, sides: Sequence[Side], found: Sequence[Codes]) -> list[Tensor]:
    """`feed_back` by any means of running a kernel."""
    shape, params, results = _shape(sides), _params(sides), []
    for number, each in enumerate(found):
        targets = torch.empty(each.codes.shape, dtype=torch.float16, device=each.codes.device)
        side = params.side[number]
        side.codes, side.ranges, side.targets = each.codes.data_ptr(), each.ranges.data_ptr(), targets.data_ptr()
        batch, heads, tokens, dim = sides[number].x.shape
        results.append(targets.view(batch, tokens, heads, dim).transpose(1, 2))
    tiles = len(sides) * params.streams * -(-params.tokens // _TILE)
    run("feed_back", shape, tiles, shape.head_dim, shape.tile_bytes, params)
    return results


def _shape(sides: Sequence[Side]) -> Shape:
    packed, widest = sides[0].packed, max(side.packed.tables.widest for side in sides)
    heads, element = max(side.x.shape[1] for side in sides), _ELEMENTS[sides[0].x.dtype]
    return Shape(packed.head_dim, packed.heads, heads, 1 << widest, element, int(_is_fed(sides)))


def _heads_of(side: Side) -> int:
    """Of a token, those that are elsewhere among them where its range takes these."""
    quantizer = side.packed.quantizer
    return side.x.shape[1] * (quantizer.part.count if side.is_partial and isinstance(quantizer, TokenQuantizer) else 1)


def _is_fed(sides: Sequence[Side]) -> bool:
    return any(side.packed.feedback is not None for side in sides)


def _params(sides: Sequence[Side]) -> ctypes.Structure:
    batch, tokens, heads = len(sides[0].x), sides[0].x.shape[2], sides[0].packed.heads
    params = Params(streams=batch * heads, sinks=sides[0].sinks.shape[2], tokens=tokens)
    for number, side in enumerate(sides):
        tables, fed = side.packed.tables, side.packed.feedback
        tensors = {"x": side.x, "sinks": side.sinks}
        tensors |= {} if fed is None else {"order": fed.order, "matrix": fed.matrix}
        names = "scale zero levels boundaries width first_level first_boundary offset slot"
        tensors |= {name: getattr(tables, name) for name in names.split()}
        stride_b, stride_g, stride_s, _ = side.x.stride()
        params.side[number] = CSide(
            **{name: tensor.data_ptr() for name, tensor in tensors.items()}, stride_b=stride_b, stride_g=stride_g,
            stride_s=stride_s, block_words=side.packed.order.words, dynamic=side.dynamic,
            outliers=side.packed.keeps_outliers, per_end=side.per_end, source=side.placing[0], span=side.packed.span,
            all_levels=tables.levels.numel(), all_boundaries=tables.boundaries.numel(),
            channels=side.x.shape[1] * side.packed.head_dim, first_head=side.first_head,
        )  # fmt: skip
    return params


def _put_page(to: ctypes.Structure, side: Side, page: Page) -> None:
    names = ("words", "scales", "index", "value", "starts", "ends")
    for name, tensor in zip(names, side.page_pointers(page), strict=True):
        setattr(to, name, tensor.data_ptr())
    to.places = places(page)
