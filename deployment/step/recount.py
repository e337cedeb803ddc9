"""Reserve room before a CUDA graph that stores tokens is captured, and take over what its replays have counted."""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from deployment.format.room import LOST
from deployment.layer import PackedLayer


def reserve(layer: PackedLayer, tokens: int) -> None:
    """Make room for `tokens` more per row, so that a captured graph of the kernels can store them, and no more.

    Room for outliers is for the worst case, all elements of these tokens. After replays call `recount`.
    """
    from deployment.kernels.packed import prepare

    for packed in layer.packed.values():
        packed.make_room(*layer.reach(tokens), tokens, layer.overflow)
        packed.fix()
        prepare(packed)


def recount(layers: Sequence[PackedLayer]) -> None:
    """Take over what one device has counted of layers; waits for it once.

    Raises RuntimeError if tokens or outliers found no room.
    """
    counted = [
        [layer.stored, layer.overflow.long(), *chain.from_iterable(packed.counts() for packed in layer.packed.values())]
        for layer in layers
    ]
    numbers = list(chain.from_iterable(counted))
    on_host = iter(torch.cat(numbers).cpu().split([len(number) for number in numbers]))
    for layer in layers:
        lengths, overflow = next(on_host).tolist(), int(next(on_host))
        _take_over(layer, lengths, overflow, on_host)


def _take_over(layer: PackedLayer, lengths: list[int], overflow: int, counts: Iterator[Tensor]) -> None:
    if overflow:
        raise RuntimeError(LOST)
    longest = max(lengths, default=0)
    for packed in layer.packed.values():
        if longest > layer.sink_tokens + layer.residual_tokens + packed.tokens_reserved:
            raise RuntimeError(f"a graph was replayed to {longest} tokens; reserve more before capturing it")
        packed.recount(counts)
    layer.slots += longest - max(layer.lengths, default=0)
    layer.lengths = lengths
