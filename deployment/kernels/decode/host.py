"""Host side of decode.cu: which work it takes, its parameters, and its launches. Nothing waits for the device."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deployment.format.groups import GroupOrder
from deployment.format.layout import PackedTensor
from deployment.format.page import Page
from deployment.kernels import launch
from deployment.kernels.decode.compile import available, most_shared, runner
from deployment.kernels.launch import FLOAT, INT, LONG, POINTER, Run, structure
from deployment.kernels.packed import DenseSegment, PackedSegment, Segment
from deployment.kernels.phase import Rotary
from deployment.kernels.schedule import CHUNK, multiprocessors, parts_of
from quant.quantizer import TokenQuantizer

MOST_QUERIES = 16  # of a KV head; beyond, a block is worth unpacking once for all of them
HEAD_DIMS = (64, 96, 128, 256)
_MOST_BITS = 4
_MOST_PLAIN = (
    512  # tokens, such as 32 sinks, a recent window of 128 and the chunk, that `combine` attends to on the side
)
_FEW_PLAIN = 16  # ... for which a warp to a multiprocessor's scheduler is enough
_LOG2_E = math.log2(math.e)
_fixed: WeakKeyDictionary[PackedTensor, tuple[Tensor, ...]] = WeakKeyDictionary()


Side = structure(
    "Side",
    ("words entries ranges slots groups index value starts ends", POINTER),
    ("block_words", INT),
    ("lowest", FLOAT),
)
Plain = structure(
    "Plain",
    ("key value origins limits", POINTER),
    ("stride_b stride_g stride_t shift", LONG),
    ("tokens half", INT),
)
Params = structure(
    "Params",
    ("key value", Side),
    ("plain", Plain * 2),
    ("query result positions origins limits steps factor turn outputs state", POINTER),
    ("query_b query_h query_s shift", LONG),
    ("scaling", FLOAT),
    ("new_tokens group heads rotary_half tokens blocks splits tiles items first_part parts rows", INT),
)


@dataclass(frozen=True)
class Shape(launch.Shape):
    """What decode.cu is compiled for; widths are bit masks, and flags 0 or 1."""

    FILE = "decode/decode.cu"

    head_dim: int
    queries: int
    teams: int
    key_widths: int
    value_widths: int
    dynamic: int
    key_outliers: int
    value_outliers: int
    bfloat: int
    rounds: int = 2  # of a team's threads, so many outliers of a chunk wait in shared memory

    @property
    def shared_bytes(self) -> int:
        """Shared memory of `attend` with all teams, `sizeof(Shared)`."""
        tables = 128 * sum(len(table) for widths in (self.key_widths, self.value_widths) for table in _bytes_of(widths))
        return _padded(tables + 4 * self.head_dim + self.teams * self.team_bytes, 128)

    @property
    def team_bytes(self) -> int:
        """What each of them takes, `sizeof(Team)`."""
        dim, queries, keys, values = self.head_dim, self.queries, self.key_outliers, self.value_outliers
        team = 2 * (dim // 32 * CHUNK * queries * 4 + queries * (CHUNK + 8) * 2) + dim * 4
        team += sum(
            dim // 32 * 2 * 256 * max(widths.bit_length() - 1, 1) for widths in (self.key_widths, self.value_widths)
        )
        team += 32 * dim if queries < 4 else 0
        team += _padded(4 * (dim // 32 * queries + 2 * queries))
        team += keys * _padded(2 * dim * queries + 8 * CHUNK * queries + (4 + 5 * self.rounds) * dim)
        team += values * _padded(
            8 * queries * dim + 8 * CHUNK * ((queries + 1) // 2) + (4 + 5 * self.rounds) * dim + 8 * CHUNK
        )
        return team


def _padded(size: int, to: int = 16) -> int:
    return -(-size // to) * to


def _bytes_of(widths: int) -> list[Tensor]:
    """The bytes that have entries in a table, for every width that occurs: two codes each, or four of 2 bits; see decode.cu."""
    alone = widths & (widths - 1) == 0
    sizes = {0: 1, 1: 18, 2: 256 if alone else 52, 3: 256 if alone else 120, 4: 256}
    return [torch.arange(size) for width, size in sizes.items() if widths >> width & 1]


def fixed_of(packed: PackedTensor) -> tuple[Tensor, ...]:
    """What is the same for all pages, on the device: `entries`, `slots` and `groups` of decode.cu's `Side`, int32."""
    if packed not in _fixed:
        assert isinstance(packed.order, GroupOrder)
        tables, order = packed.tables, packed.order
        channel = tables.channel.view(packed.heads, -1)
        each = [table.view_as(channel).gather(1, channel.long()) for table in (tables.scale, tables.zero, tables.floor)]
        slots = torch.stack([*(numbers.view(torch.int32) for numbers in each), channel], dim=-1)
        groups = torch.stack([order.offsets, order.widths], dim=-1).int()
        _fixed[packed] = _entries(packed).to(packed.device), slots, groups.to(packed.device)
    return _fixed[packed]


def _entries(packed: PackedTensor) -> Tensor:
    """Pairs of fp16 levels, `[entries]` int32 (`[entries, 2]` if all groups have 2 bits)."""
    assert isinstance(packed.order, GroupOrder)
    tables, widths, parts = packed.tables, packed.order.occurring, []
    for width, byte in zip(widths, _bytes_of(_mask(widths)), strict=True):
        first = int(tables.first_level[tables.width == width][0])
        levels = tables.levels[first : first + 2**width].half().cpu().view(torch.int16).long() & 0xFFFF
        shifts = (0, 2) if widths == (2,) else (0,)
        pairs = [levels[byte >> s & 2**width - 1] | levels[byte >> s + 4 & 2**width - 1] << 16 for s in shifts]
        parts.append(torch.stack([torch.where(pair < 2**31, pair, pair - 2**32) for pair in pairs], dim=-1))
    return torch.cat(parts).int()


def _mask(widths: Sequence[int]) -> int:
    return sum(1 << width for width in widths)


def takes(query: Tensor, segments: Sequence[Segment], rotary: Rotary, kv_heads: int) -> bool:
    """Whether `attend` can do it, here and now; where only the installation is to blame, that is said once."""
    if not query.is_cuda or not fits(query, segments, rotary, kv_heads):
        return False
    return available(query.device) and bool(_shapes(query, segments, kv_heads, most_shared(query.device)))


def fits(query: Tensor, segments: Sequence[Segment], rotary: Rotary, kv_heads: int) -> bool:
    """Whether decode.cu has words for it."""
    packed = [segment for segment in segments if isinstance(segment, PackedSegment)]
    plain = [segment for segment in segments if isinstance(segment, DenseSegment)]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[3] in HEAD_DIMS
        and query.shape[1] // kv_heads * query.shape[2] <= MOST_QUERIES
        and len(packed) > 0
        and len(plain) <= 2
        and sum(segment.tokens for segment in plain) <= _MOST_PLAIN
        and all(segment.key.dtype in (torch.float16, query.dtype) for segment in plain)
        and all(is_grouped(segment.key) and is_grouped(segment.value) for segment in packed[:1])
        and packed[0].key_page.scales is None
        and packed[0].key.rotary_half == rotary.half
    )


def is_grouped(packed: PackedTensor) -> bool:
    """Whether decode.cu has words for the order and the widths."""
    return isinstance(packed.order, GroupOrder) and packed.order.occurring[-1] <= _MOST_BITS


def reads_codes(key: PackedTensor, value: PackedTensor) -> bool:
    """Whether decode.cu and unpack.cu have words for a layer's codes: heads, groups, and ranges of keys that are channels'."""
    ours = key.head_dim in HEAD_DIMS and is_grouped(key) and is_grouped(value)
    return ours and not isinstance(key.quantizer, TokenQuantizer)


def attend(
    query: Tensor, positions: Tensor, segments: Sequence[Segment], rotary: Rotary, scaling: float, kv_heads: int
) -> Tensor:
    """As `attend_packed` (packed.py)."""
    run, memory = runner(query.device), most_shared(query.device)
    return attend_by(run, memory, query, positions, segments, rotary, scaling, kv_heads)


def attend_by(
    run: Run,
    most_shared: int,
    query: Tensor,
    positions: Tensor,
    segments: Sequence[Segment],
    rotary: Rotary,
    scaling: float,
    kv_heads: int,
) -> Tensor:
    """`attend` by any means of running a kernel."""
    batch, heads, new, dim = query.shape
    query = query if query.stride(-1) == 1 else query.contiguous()
    group, packed = heads // kv_heads, [segment for segment in segments if isinstance(segment, PackedSegment)]
    shapes = _shapes(query, segments, kv_heads, most_shared)
    if not shapes:
        raise ValueError(f"no team fits into {most_shared} bytes of shared memory")
    rows = shapes[0].queries
    tiles, streams = -(-new * group // rows), batch * kv_heads
    result = torch.empty(batch, new, heads, dim, dtype=query.dtype, device=query.device)
    params = Params(
        query=query.data_ptr(), result=result.data_ptr(), positions=positions.data_ptr(), steps=rotary.steps.data_ptr(),
        factor=rotary.factor.data_ptr(), turn=rotary.turn.data_ptr(), query_b=query.stride(0), query_h=query.stride(1),
        query_s=query.stride(2), scaling=scaling * _LOG2_E, new_tokens=new, group=group, heads=kv_heads,
        rotary_half=rotary.half, tiles=tiles, rows=streams * tiles,
    )  # fmt: skip
    kept: list[object] = [query, positions]
    plain = [segment for segment in segments if isinstance(segment, DenseSegment)]
    for number, segment in enumerate(plain):
        key, value = _of_equal_strides(segment)
        kept += [key, value]
        params.plain[number] = _plain(segment, key, value)
    count = multiprocessors(query.device)
    splits = [
        parts_of(segment.tokens, streams * tiles, count * shape.teams, count * roomy_teams(shape))
        for segment, shape in zip(packed, shapes, strict=True)
    ]
    params.parts = sum(splits)
    outputs = query.new_empty(params.parts * streams * tiles * rows, dim, dtype=torch.float32)
    state = query.new_empty(params.parts * streams * tiles * rows, 4, dtype=torch.float32)
    params.outputs, params.state = outputs.data_ptr(), state.data_ptr()
    for page, shape, parts in zip(packed, shapes, splits, strict=True):
        params.key, params.value = _side(page.key, page.key_page), _side(page.value, page.value_page)
        params.origins, params.limits = page.origins.data_ptr(), page.limits.data_ptr()
        params.shift, params.tokens, params.blocks = page.start, page.tokens, page.key_page.blocks
        params.splits, params.items = parts, streams * tiles * parts
        blocks = min(count, params.items)
        teams = min(shape.teams, -(-params.items // blocks))  # where few will do, `combine` finds room beside them
        run("attend", shape, blocks, teams * dim, shape.shared_bytes - (shape.teams - teams) * shape.team_bytes, params)
        params.first_part += parts
    slice_width = dim if dim % 64 else 64  # as of combine.h
    warps = 4 if sum(segment.tokens for segment in plain) <= _FEW_PLAIN else 16
    blocks = batch * new * heads * dim // slice_width
    run("combine", shapes[0], blocks, 32 * warps, 4 * warps * (slice_width + 3), params)
    return result


def _shapes(query: Tensor, segments: Sequence[Segment], kv_heads: int, most_shared: int) -> list[Shape]:
    """Of every page: as many queries to a tile as there are and fit into shared memory; none if not even one does."""
    _, heads, new, dim = query.shape
    rows = min(8, 1 << (new * heads // kv_heads - 1).bit_length())
    pages = [segment for segment in segments if isinstance(segment, PackedSegment)]
    while rows:
        shapes = [fitting(dim, rows, *_kind(page), int(query.dtype == torch.bfloat16), most_shared) for page in pages]
        found = [shape for shape in shapes if shape is not None]
        if len(found) == len(pages):
            return found
        rows //= 2
    return []


def _kind(segment: PackedSegment) -> tuple[int, int, int, int, int]:
    """(key_widths, value_widths, dynamic, key_outliers, value_outliers) of a `Shape`."""
    key, value = segment.key.order, segment.value.order
    assert isinstance(key, GroupOrder) and isinstance(value, GroupOrder)
    dynamic, outliers = segment.value_page.scales is not None, (segment.key_page.places, segment.value_page.places)
    return _mask(key.occurring), _mask(value.occurring), int(dynamic), int(outliers[0] > 0), int(outliers[1] > 0)


@cache
def fitting(dim: int, rows: int, keys: int, values: int, dynamic: int, *rest: int) -> Shape | None:
    """As many teams as registers and shared memory are good for, if any; the last of `rest` are the flags of a `Shape`, and bytes there are."""
    *flags, most_shared = rest
    for teams in range(teams_for(dim, rows), 0, -1):
        for rounds in (2, 1):
            shape = replace(Shape(dim, rows, teams, keys, values, dynamic, *flags), rounds=rounds)
            if shape.shared_bytes <= most_shared:
                return shape
    return None


def teams_for(dim: int, queries: int) -> int:
    """Teams of D threads in a block: what was fastest on an H100, one of 2 to 5, with enough registers for each."""
    return max(1, (512 if queries == 1 else 384) // dim)


def roomy_teams(shape: Shape) -> int:
    """How many of them leave registers, of 65,536, for a few blocks of `combine`: where little is to be done, so many teams were fastest."""
    return int(shape.teams * (1 - 160 * shape.head_dim / 65536))


def _of_equal_strides(segment: DenseSegment) -> tuple[Tensor, Tensor]:
    key, value = segment.key, segment.value
    if key.stride() != value.stride() or key.stride(-1) != 1:
        key, value = key.contiguous(), value.contiguous()
    return key, value


def _plain(segment: DenseSegment, key: Tensor, value: Tensor) -> ctypes.Structure:
    limits = None if segment.limits is None else segment.limits.data_ptr()
    pointers = key.data_ptr(), value.data_ptr(), segment.origins.data_ptr(), limits
    return Plain(*pointers, *key.stride()[:3], segment.start, segment.tokens, key.dtype == torch.float16)


def _side(packed: PackedTensor, page: Page) -> ctypes.Structure:
    (words, ranges, *lists), (entries, slots, groups) = page.for_kernels(), fixed_of(packed)
    pointers = (tensor.data_ptr() for tensor in (words, entries, ranges, slots, groups, *lists))
    return Side(*pointers, packed.order.words, packed.tables.lowest)
