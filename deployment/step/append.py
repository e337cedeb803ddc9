"""Store a chunk in a packed layer: what leaves the recent window becomes sinks and codes, with torch or with the kernels."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deployment.devices import is_capturing
from deployment.format.layout import Rows
from deployment.kept import ungraphed
from deployment.layer import PackedLayer
from gradients.models import KINDS, Kind
from quant.quantizer import as_stored


@ungraphed
def join_window(
    layer: PackedLayer, key: Tensor, value: Tensor, padding: Sequence[int], with_kernels: bool = False
) -> tuple[Tensor, Tensor]:
    """The window and a chunk of keys and values `[B, G, S, D]` behind it: `[B, G, N + S, D]`, the last of each row at the end.

    While a CUDA graph is captured the window itself has moved on then: to be called once for every chunk.
    """
    if layer.window is None:
        return key, value
    chunk: dict[Kind, Tensor] = {"key": key, "value": value}
    if min(layer.lengths) < layer.sink_tokens:
        token = (layer.stored - layer.pads_of(padding))[:, None] + torch.arange(key.shape[2], device=layer.device)
        sinks = (token < layer.sink_tokens)[:, None, :, None]
        chunk = {kind: as_stored(x).to(x.dtype).where(sinks, x) for kind, x in chunk.items()}
    if not with_kernels or key.shape[2] > 1:
        return layer.window.joined("key", chunk["key"]), layer.window.joined("value", chunk["value"])
    recent = [layer.window.recent[kind] for kind in KINDS]
    moved = [
        torch.cat((held[:, :, 1:], chunk[kind].to(held.dtype)), 2) for kind, held in zip(KINDS, recent, strict=True)
    ]
    if is_capturing(layer.device):  # a graph finds it where it was
        moved = [held.copy_(new) for held, new in zip(recent, moved, strict=True)]
    return moved[0], moved[1]


@ungraphed
def append(
    layer: PackedLayer,
    key: Tensor,
    value: Tensor,
    padding: Sequence[int],
    joined: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Store a chunk `[B, G, S, D]` of which row b's first `padding[b]` tokens are left padding.

    `joined` is what `join_window` has returned for it, if it was asked.
    """
    joined = join_window(layer, key, value, padding) if joined is None else joined
    new = key.shape[2]
    for kind, states in zip(KINDS, joined, strict=True):
        tokens = states[:, :, :new].transpose(1, 2).flatten(2)  # [B, S, C]: all that leave the window
        for rows, held, skipped in _aligned_rows(layer, padding, new):
            _append_rows(layer, kind, rows, held, tokens[rows, skipped:])
    _count(layer, joined, new, padding)
    layer.stored = torch.tensor(layer.lengths, device=layer.device)


def append_with_kernels(
    layer: PackedLayer,
    key: Tensor,
    value: Tensor,
    padding: Sequence[int],
    joined: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The same on the device, which is not waited for.

    Raises RuntimeError if outliers of earlier tokens were lost, which takes a graph replayed too often.
    """
    from deployment.kernels.append import Side
    from deployment.kernels.append import append as append_sides

    joined = join_window(layer, key, value, padding, with_kernels=True) if joined is None else joined
    new, pads, capturing = key.shape[2], layer.pads_of(padding), is_capturing(layer.device)
    reach = layer.reach(new)
    sides = []
    for kind, states in zip(KINDS, joined, strict=True):
        packed = layer.packed[kind]
        pages = packed.pages_of(reach[0]) if capturing else packed.make_room(*reach, new, layer.overflow)
        sides.append(Side(packed, states[:, :, :new], layer.sinks[kind], pages))
    append_sides(sides, *_leaving(layer, new, padding, pads), layer.overflow)
    if not capturing:
        for packed in layer.packed.values():
            packed.used_room(*reach, new, layer.overflow)
    layer.stored += new - pads if any(padding) else new
    _count(layer, joined, new, padding)


def _leaving(layer: PackedLayer, new: int, padding: Sequence[int], pads: Tensor) -> tuple[Tensor, Tensor]:
    """`[B]` int64 twice: what sinks and codes hold, and how many of the next `new` tokens to leave are none or there already."""
    if layer.window is None:
        return layer.stored, pads
    begins = layer.window_begins()
    if layer.coded == [length - layer.residual_tokens for length in layer.lengths] and not any(padding):
        return begins, layer.no_padding  # and so it will be for as long as tokens are only added
    held = torch.maximum(begins, layer.window.floor)
    return held, (held - begins + pads).clamp(max=new)


def _aligned_rows(layer: PackedLayer, padding: Sequence[int], new: int) -> Iterator[tuple[Rows, int, int]]:
    """Groups of rows, (rows, tokens that sinks and codes hold, how many of the next `new` to leave are none or there already).

    All rows are one group, but for left-padded batches.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (length, held, pad) in enumerate(zip(layer.lengths, layer.coded, padding, strict=True)):
        skipped = min(held - (length - layer.residual_tokens) + pad, new)
        groups.setdefault((held, skipped), []).append(row)
    for (held, skipped), rows in groups.items():
        yield (slice(None) if len(groups) == 1 else torch.tensor(rows, device=layer.device)), held, skipped


def _append_rows(layer: PackedLayer, kind: Kind, rows: Rows, length: int, tokens: Tensor) -> None:
    """Store tokens `[R, n, C]` of rows of whose tokens sinks and codes hold `length`."""
    sinks = min(max(layer.sink_tokens - length, 0), tokens.shape[1])
    if sinks:
        exact = as_stored(tokens[:, :sinks]).unflatten(-1, (-1, layer.sinks[kind].shape[-1])).transpose(1, 2)
        layer.sinks[kind][rows, :, length : length + sinks] = exact
    if tokens.shape[1] > sinks:
        start = length + sinks - layer.sink_tokens
        layer.packed[kind].write(rows, start, layer.encode(kind, tokens[:, sinks:]))


def _count(layer: PackedLayer, joined: tuple[Tensor, Tensor], new: int, padding: Sequence[int]) -> None:
    """A chunk is stored: count it, and let the window be the last tokens of `joined`."""
    layer.announced = False
    if layer.window is not None:
        window = layer.window.after(dict(zip(KINDS, joined, strict=True)))
        if is_capturing(layer.device):
            for kind, recent in window.recent.items():
                if recent.data_ptr() != layer.window.recent[kind].data_ptr():
                    layer.window.recent[kind].copy_(recent)
        else:
            layer.window = window
    layer.lengths = [length + new - pad for length, pad in zip(layer.lengths, padding, strict=True)]
    layer.slots += new
