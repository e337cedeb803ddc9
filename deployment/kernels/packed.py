"""Host side of the attention kernels: segments of the context in, the output of all queries out.

`attend_packed` is the Triton twin of `attend_torch` (attend.py): the same softmax over the same segments, but it takes
packed pages as they are. Nothing here waits for the device or depends on how full the cache is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from deployment.kernels.combine import combine_kernel
from deployment.kernels.few import FEW
from deployment.kernels.lookup import PERMUTES, SHARED
from deployment.kernels.pairs import TABLE_BYTES
from deployment.kernels.phase import Rotary
from deployment.kernels.ring import slot_bytes
from deployment.kernels.schedule import DECODED_ROWS, Plan, weights_bytes
from deployment.kernels.shared import allow_shared_memory
from deployment.kernels.split import LIFT, split_kernel
from deployment.kernels.tiles import CHANNEL_ORDER, DENSE, FRAGMENT_ORDER
from deployment.kernels.tuning import Tuning, tuning_of
from deployment.layout import PackedTensor, Page
from deployment.order import FragmentOrder, Order

_LOG2_E = math.log2(math.e)
_DECLARED_BYTES = 48 * 1024  # of shared memory, which is all that inline PTX may declare
_PARTS = 16  # put together at a time


@dataclass(frozen=True)
class DenseSegment:
    """Tokens as they are, pre-RoPE: `key` and `value` `[B, G, n, D]` of equal strides.

    Row b's first token is at position `start` + `origins[b]` (int64); before 0 lies padding. Tokens from position
    `limits[b]` (int64) on are not there yet; None for a segment that is full.
    """

    key: Tensor
    value: Tensor
    origins: Tensor
    limits: Tensor | None
    start: int = 0

    @property
    def tokens(self) -> int:
        """There is room for so many per sequence."""
        return self.key.shape[2]


@dataclass(frozen=True)
class PackedSegment:
    """A page of keys and one of values; `origins`, `limits` and `start` as above."""

    key: PackedTensor
    key_page: Page
    value: PackedTensor
    value_page: Page
    origins: Tensor
    limits: Tensor
    start: int = 0

    @property
    def tokens(self) -> int:
        """There is room for so many per sequence."""
        return self.key_page.end - self.key_page.start


Segment = DenseSegment | PackedSegment


def attend_packed(
    query: Tensor, positions: Tensor, segments: Sequence[Segment], rotary: Rotary, scaling: float, kv_heads: int
) -> Tensor:
    """Causal softmax attention over segments.

    Args:
        query: `[B, H, S, D]`, pre-RoPE; query head h reads KV head h // (H / G).
        positions: `[B, S]` int64 of the queries; a query sees the tokens up to its own position, one at -1 none.
        scaling: factor on the scores.

    Returns `[B, S, H, D]` in the query's dtype.
    """
    batch, heads, new, dim = query.shape
    if new * heads // kv_heads > DECODED_ROWS:
        from deployment.kernels.prefill import attend_many

        return attend_many(query, positions, segments, rotary, scaling, kv_heads)
    if query.stride(-1) != 1:
        query = query.contiguous()
    if query.is_cuda:
        allow_shared_memory()
    few, segments = _apart(segments)
    lengths = [segment.tokens for segment in segments]
    plan = Plan.of(new * heads // kv_heads, batch * kv_heads, lengths, dim, query.device)
    precise, tuning = query.dtype == torch.float32, tuning_of(query.device)
    scratch = _Scratch.of(plan, dim, query.device, torch.float32 if precise else torch.float16)
    parts, streams = sum(plan.splits), batch * kv_heads
    outputs = query.new_empty(parts, streams, plan.tiles * plan.rows, dim, dtype=torch.float32)
    maxima, sums = (query.new_empty(parts, streams, plan.tiles * plan.rows, dtype=torch.float32) for _ in range(2))
    options, part = _options(dim, tuning), 0
    for segment, splits in zip(segments, plan.splits, strict=True):
        fast = _fast(segment, precise, plan, tuning)
        turn = 64 if isinstance(segment, DenseSegment) else _turn(segment.key.order, plan.rows)
        works = streams * plan.tiles * splits
        split_kernel[(min(works, plan.programs),)](
            query=query,
            query_stride_b=query.stride(0),
            query_stride_h=query.stride(1),
            query_stride_s=query.stride(2),
            positions=positions,
            origins=segment.origins,
            shift=segment.start,
            limits=segment.origins if segment.limits is None else segment.limits,
            steps=rotary.steps,
            factor=rotary.factor,
            turn=rotary.turn,
            scaling=scaling * _LOG2_E,
            new=new,
            segment_tokens=segment.tokens,
            **_segment_arguments(segment),
            **vars(scratch),
            outputs=outputs,
            maxima=maxima,
            sums=sums,
            part0=part,
            splits=splits,
            tiles=plan.tiles,
            works=works,
            H=heads,
            G=kv_heads,
            D=dim,
            ROWS=plan.rows,
            CHUNK=plan.chunk,
            PAIRS=max(16, triton.next_power_of_2(dim // 2)),
            CHANNELS=max(16, triton.next_power_of_2(dim)),
            ROTARY_HALF=rotary.half,
            LIMITED=segment.limits is not None,
            PRECISE=precise,
            ENTRIES=tuning.entries,
            TURN=turn,
            QUICK=query.is_cuda and not precise,
            **fast,
            **options,
        )
        part += splits
    result = torch.empty(batch, new, heads, dim, dtype=query.dtype, device=query.device)
    combine_kernel[(batch * new * heads,)](
        outputs=outputs,
        maxima=maxima,
        sums=sums,
        result=result,
        query=query,
        query_stride_b=query.stride(0),
        query_stride_h=query.stride(1),
        query_stride_s=query.stride(2),
        positions=positions,
        steps=rotary.steps,
        factor=rotary.factor,
        scaling=scaling * _LOG2_E,
        **_few_arguments("front", few[0], query, positions),
        **_few_arguments("back", few[1], query, positions),
        new=new,
        parts=parts,
        tiles=plan.tiles,
        batch=batch,
        H=heads,
        G=kv_heads,
        D=dim,
        ROWS=plan.rows,
        PAIRS=triton.next_power_of_2(dim // 2),
        CHANNELS=triton.next_power_of_2(dim),
        ROTARY_HALF=rotary.half,
        PARTS=_PARTS,
        LIFT=0.0 if precise else LIFT.value,
        QUICK=query.is_cuda and not precise,
        num_warps=4,
    )
    return result


def _apart(segments: Sequence[Segment]) -> tuple[list[DenseSegment | None], list[Segment]]:
    """(two plain segments of few tokens, None where there are fewer; all others)."""
    few = [segment for segment in segments if isinstance(segment, DenseSegment) and segment.tokens <= FEW.value][:2]
    others = [segment for segment in segments if not any(segment is small for small in few)]
    return [*few, None, None][:2], others


def _few_arguments(name: str, segment: DenseSegment | None, query: Tensor, positions: Tensor) -> dict[str, Any]:
    if segment is None:
        key, value, origins, limits, shift, tokens = query, query, positions, None, 0, 0
    else:
        key, value = _of_equal_strides(segment)
        origins, limits, shift, tokens = segment.origins, segment.limits, segment.start, segment.tokens
    tensors = {"key": key, "value": value, "origins": origins, "limits": origins if limits is None else limits}
    strides = dict(zip(("stride_b", "stride_g", "stride_t"), key.stride()[:3], strict=True))
    lower = {**tensors, **strides, "shift": shift, "tokens": tokens}
    limited = {f"{name.upper()}_LIMITED": limits is not None}
    return {**{f"{name}_{argument}": x for argument, x in lower.items()}, **limited}


@dataclass(frozen=True)
class _Scratch:
    """Memory that a program's phases pass results through."""

    own: Tensor
    rotated: Tensor
    scores: Tensor
    weights: Tensor
    scaled: Tensor
    extra: Tensor
    parked: Tensor
    rescale: Tensor

    @classmethod
    def of(cls, plan: Plan, dim: int, device: torch.device, operand: torch.dtype) -> "_Scratch":
        pairs, channels = (max(16, triton.next_power_of_2(n)) for n in (dim // 2, dim))

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(plan.programs, *shape, dtype=dtype, device=device)

        return cls(
            own=new(2, plan.rows, 2, pairs),
            rotated=new(max(16, plan.chunk // 32 * plan.rows), 2, pairs, dtype=operand),
            scores=new(plan.rows, plan.chunk),
            weights=new(plan.chunk, plan.rows, dtype=operand),
            scaled=new(2, plan.rows, plan.chunk, dtype=operand),
            extra=new(channels, plan.rows),
            parked=new(plan.rows, channels),
            rescale=new(plan.rows),
        )


def _fast(segment: Segment, precise: bool, plan: Plan, tuning: Tuning) -> dict[str, int]:
    """How either side's levels are looked up by inline PTX, and how many blocks of its words are on their way.

    That is for fragments in half precision, on a GPU. Tables in shared memory take fewer instructions than byte permutes, but what shared
    memory answers in a clock is limited, too: keys, which also read rotated queries, take permutes where these are cheap.
    """
    found = {"KEY_FAST": 0, "VALUE_FAST": 0, "KEY_STAGES": 0, "VALUE_STAGES": 0}
    if isinstance(segment, DenseSegment) or precise or not segment.key_page.words.is_cuda:
        return found
    for side, order in (("KEY", segment.key.order), ("VALUE", segment.value.order)):
        if isinstance(order, FragmentOrder):
            stages = stages_of(order, plan.rows, plan.chunk, tuning)
            found |= {f"{side}_FAST": lookup_of(order), f"{side}_STAGES": stages}
    return found


def lookup_of(order: FragmentOrder) -> int:
    """`PERMUTES` or `SHARED`: what was faster on an H100."""
    return (PERMUTES if order.role == "key" and order.bits < 4 else SHARED).value


def stages_of(order: FragmentOrder, rows: int, chunk: int, tuning: Tuning) -> int:
    """Blocks on their way: as the tuning says, if shared memory has room for them beside the table and the weights."""
    room = _DECLARED_BYTES - TABLE_BYTES.value - weights_bytes(rows, chunk)
    fitting = room // slot_bytes(order.bits, order.geometry.constants())
    return min(tuning.stages, 1 << fitting.bit_length() >> 1)  # a power of two


def _turn(order: Order, rows: int) -> int:
    """Tokens that one rotation of the queries serves: what the warps' tensor cores take along n, or a block."""
    return 8 * order.geometry.warps if isinstance(order, FragmentOrder) and rows <= 8 else 64


def _options(dim: int, tuning: Tuning) -> dict[str, int]:
    """How the kernel is compiled: as many warps as the fragments were laid out for."""
    return {"num_warps": 8 if dim > 128 else 4, "num_stages": 1, "maxnreg": tuning.registers}


def _segment_arguments(segment: Segment) -> dict[str, Any]:
    if isinstance(segment, DenseSegment):
        return _dense_arguments(segment)
    page_arguments = {
        **_packed_arguments("key", segment.key, segment.key_page),
        **_packed_arguments("value", segment.value, segment.value_page),
        "blocks": segment.key_page.blocks,
    }
    unused = segment.key_page.words
    return {
        **page_arguments,
        "key_dense": unused,
        "value_dense": unused,
        "dense_stride_b": 0,
        "dense_stride_g": 0,
        "dense_stride_t": 0,
    }


def _of_equal_strides(segment: DenseSegment) -> tuple[Tensor, Tensor]:
    key, value = segment.key, segment.value
    if key.stride() != value.stride() or key.stride(-1) != 1:
        key, value = key.contiguous(), value.contiguous()
    return key, value


_PACKED_NAMES = "words scales levels_at bytes scale zero floor width offset first_level index value starts ends".split()  # noqa: SIM905


def _dense_arguments(segment: DenseSegment) -> dict[str, Any]:
    key, value = _of_equal_strides(segment)
    arguments: dict[str, Any] = {f"{side}_{name}": key for side in ("key", "value") for name in _PACKED_NAMES}
    for side in ("KEY", "VALUE"):
        arguments |= {f"{side}_SOURCE": DENSE, f"{side}_BITS": 0, f"{side}_GEOMETRY": (), f"{side}_DYNAMIC": False}
        arguments |= {f"{side}_OUTLIERS": False, f"{side.lower()}_block_words": 0}
    strides = dict(zip(("dense_stride_b", "dense_stride_g", "dense_stride_t"), key.stride()[:3], strict=True))
    return {**arguments, **strides, "key_dense": key, "value_dense": value, "blocks": 0}


def _packed_arguments(side: str, packed: PackedTensor, page: Page) -> dict[str, Any]:
    tables, order, upper = packed.tables, packed.order, side.upper()
    if page.outliers is not None:
        page.outliers = page.outliers.with_starts()
    streams = page.outliers
    unused = page.words
    tensors = {
        "words": page.words,
        "scales": unused if page.scales is None else page.scales,
        "levels_at": tables.levels,
        **{name: getattr(tables, name) for name in _PACKED_NAMES[3:10]},
        "index": unused if streams is None else streams.index,
        "value": unused if streams is None else streams.value,
        "starts": unused if streams is None else streams.starts,
        "ends": unused if streams is None else streams.ends,
    }
    return {
        **{f"{side}_{name}": tensor for name, tensor in tensors.items()},
        f"{side}_block_words": order.words,
        f"{upper}_SOURCE": FRAGMENT_ORDER if isinstance(order, FragmentOrder) else CHANNEL_ORDER,
        f"{upper}_BITS": order.bits if isinstance(order, FragmentOrder) else tables.planes,
        f"{upper}_GEOMETRY": order.geometry.constants() if isinstance(order, FragmentOrder) else (),
        f"{upper}_DYNAMIC": page.scales is not None,
        f"{upper}_OUTLIERS": streams is not None and streams.index.numel() > 0,
    }
