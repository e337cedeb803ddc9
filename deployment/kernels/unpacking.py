"""Host side of reading words: what kernels must know of a page, and the launch that unpacks some of it."""

from weakref import WeakKeyDictionary

import triton
from torch import Tensor

from deployment.format.groups import GroupOrder
from deployment.format.layout import PackedTensor
from deployment.format.page import Page
from deployment.kernels import unpack_host
from deployment.kernels.decode.compile import runner
from deployment.kernels.packed import PackedSegment
from deployment.kernels.phase import Rotary
from deployment.kernels.unpack import source_of, unpack_kernel
from quant.scheme import GROUP_CHANNELS

_HEADS = (4, 2, 1)  # heads of a program share what turns their keys
_permuted: WeakKeyDictionary[PackedTensor, bool] = WeakKeyDictionary()


def unpack(
    segment: PackedSegment, rotary: Rotary, first: int, blocks: int, row0: int, key: Tensor, value: Tensor, at: int
) -> None:
    """Unpack blocks `first`, ..., `first + blocks - 1` of a page, keys rotated, to `key` and `value` from token `at` on.

    Both are `[R, room, G, pitch]`, of the sequences `row0`, ..., `row0 + R - 1`. What a sequence does not hold of these blocks becomes some
    finite numbers.
    """
    if unpack_host.takes(segment, rotary, key):
        unpack_host.unpack_by(runner(key.device), segment, rotary, first, blocks, row0, key, value, at)
        return
    rows, room, heads, pitch = key.shape
    for packed, page, result in ((segment.key, segment.key_page, key), (segment.value, segment.value_page, value)):
        keys = result is key
        together = next(count for count in _HEADS if heads % count == 0) if keys else 1
        unpack_kernel[(blocks, rows * heads // together)](
            page_tensors(packed, page), segment.origins, segment.start, segment.limits, rotary.steps, rotary.by_token, row0, first, page.blocks,
            packed.order.words, room, at, result, KIND=page_kind(packed, page), SHAPE=head_shape(packed, rotary), PITCH=pitch, HEADS=together,
            ROTATED=keys, num_warps=16 if keys else 4, maxnreg=64 if keys else None,  # so that two programs share a multiprocessor
        )  # fmt: skip


def page_tensors(packed: PackedTensor, page: Page) -> tuple[Tensor, ...]:
    """words, scales; levels, scale, zero, width, offset, first_level, slot, channel of `Tables`; index, value, starts, ends of outliers."""
    tables, (words, scales, *lists) = packed.tables, page.for_kernels()
    table = (tables.levels, tables.scale, tables.zero, tables.width, tables.offset, tables.first_level, tables.slot)
    return (words, scales, *table, tables.channel, *lists)


def page_kind(packed: PackedTensor, page: Page) -> tuple[int, ...]:
    """What there is to know of a page before it is read.

    Order of codes; whether groups have channels in another order than their own; the union of all widths' binary digits; the width of all groups, 0 if
    they have several; whether ranges are tokens'; whether there are outliers.
    """
    order = packed.order
    width = order.occurring[0] if isinstance(order, GroupOrder) and len(order.occurring) == 1 else 0
    return source_of(order), is_permuted(packed), packed.tables.planes, width, page.scales is not None, page.places > 0


def head_shape(packed: PackedTensor, rotary: Rotary) -> tuple[int, ...]:
    """KV heads, D, half of the channels that rotate, D / 2 and D rounded up."""
    dim = packed.head_dim
    rounded = (max(16, triton.next_power_of_2(size)) for size in (dim // 2, dim))
    return packed.heads, dim, rotary.half, *rounded


def is_permuted(packed: PackedTensor) -> bool:
    """Whether channels lie in groups in another order than their own; asks the device, once."""
    if packed not in _permuted:
        _permuted[packed] = isinstance(packed.order, GroupOrder) and not _ascend(packed.order)
    return _permuted[packed]


def _ascend(order: GroupOrder) -> bool:
    channels = order.channels.unflatten(1, (-1, GROUP_CHANNELS))
    if order.kind == "key":  # second halves of pairs come as the first do
        channels = channels[:, ::2]
    return bool((channels.flatten(1).diff() > 0).all())
