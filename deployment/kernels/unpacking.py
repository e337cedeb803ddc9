"""Host side of unpacking: which arguments `unpack_kernel` needs for a page of keys and one of values."""

from typing import Any
from weakref import WeakKeyDictionary

import triton
from torch import Tensor

from deployment.format.groups import GroupOrder
from deployment.format.layout import PackedTensor, Page
from deployment.kernels.packed import PackedSegment
from deployment.kernels.phase import Rotary
from deployment.kernels.unpack import source_of, unpack_kernel
from quant.scheme import GROUP_CHANNELS

_ENTRIES = 256  # outliers at a time
_HEADS = (4, 2, 1)  # heads of a program share what turns their keys
_TABLES = ("levels", "scale", "zero", "width", "offset", "first_level", "slot")
_permuted: WeakKeyDictionary[PackedTensor, bool] = WeakKeyDictionary()


def unpack(
    segment: PackedSegment, rotary: Rotary, first: int, blocks: int, row0: int, key: Tensor, value: Tensor, at: int
) -> None:
    """Unpack blocks `first`, ..., `first + blocks - 1` of a page, keys rotated, to `key` and `value` from token `at` on.

    Both are `[R, room, G, pitch]`, of the sequences `row0`, ..., `row0 + R - 1`. What a sequence does not hold of these blocks becomes some
    finite numbers.
    """
    rows, room, heads, pitch = key.shape
    dim = segment.key.head_dim
    together = next(count for count in _HEADS if heads % count == 0)
    for packed, page, result in (
        (segment.key, segment.key_page, key),
        (segment.value, segment.value_page, value),
    ):
        unpack_kernel[(blocks, rows * heads // together)](
            **_of_page(packed, page),
            origins=segment.origins,
            shift=segment.start,
            limits=segment.limits,
            steps=rotary.steps,
            turn=rotary.by_token,
            row0=row0,
            first_block=first,
            room=room,
            at=at,
            result=result,
            G=heads,
            D=dim,
            PITCH=pitch,
            HEADS=together,
            PAIRS=max(16, triton.next_power_of_2(dim // 2)),
            CHANNELS=max(16, triton.next_power_of_2(dim)),
            ROTARY_HALF=rotary.half,
            ROTATED=result is key,
            ENTRIES=_ENTRIES,
            num_warps=16 if result is key else 8,
            maxnreg=64 if result is key else None,  # so that two programs share a multiprocessor
        )


def _of_page(packed: PackedTensor, page: Page) -> dict[str, Any]:
    tables, order, unused = packed.tables, packed.order, page.words
    if page.outliers is not None:
        page.outliers = page.outliers.with_starts()
    streams = page.outliers
    lists = (unused,) * 4 if streams is None else (streams.index, streams.value, streams.starts, streams.ends)
    return {
        "words": page.words,
        "scales": unused if page.scales is None else page.scales,
        **{name: getattr(tables, name) for name in _TABLES},
        "channel_at": tables.channel,
        **dict(zip(("index", "value", "starts", "ends"), lists, strict=True)),
        "blocks": page.blocks,
        "block_words": order.words,
        "SOURCE": source_of(order),
        "PERMUTED": _is_permuted(packed),
        "PLANES": tables.planes,
        "WIDTH": order.occurring[0] if isinstance(order, GroupOrder) and len(order.occurring) == 1 else 0,
        "DYNAMIC": page.scales is not None,
        "OUTLIERS": streams is not None and streams.index.numel() > 0,
    }


def _is_permuted(packed: PackedTensor) -> bool:
    """Whether channels lie in groups in another order than their own; asks the device once."""
    if packed not in _permuted:
        _permuted[packed] = isinstance(packed.order, GroupOrder) and not _ascend(packed.order)
    return _permuted[packed]


def _ascend(order: GroupOrder) -> bool:
    channels = order.channels.unflatten(1, (-1, GROUP_CHANNELS))
    if order.kind == "key":  # second halves of pairs come as the first do
        channels = channels[:, ::2]
    return bool((channels.flatten(1).diff() > 0).all())
