"""One step of attention over a packed layer: what of the chunk is padding, then attend and store, with kernels or torch.

Rows of a batch are padded on the left, so a row's padding ends with its first token. Chunks of several tokens have their mask
checked, which waits for the device once. A single token of rows that all hold tokens cannot be padding, whatever the mask
says, and nobody looks: a decode step never waits for the device.
"""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from deployment import native
from deployment.cache import PackedLayer
from deployment.devices import current
from deployment.kernels.attend import Segment, attend_torch
from deployment.kernels.dispatch import Backend, attend_and_store, runs_kernels
from deployment.rope import Rope
from gradients.models import KINDS
from gradients.rope import rotate


def attend_step(
    layer: PackedLayer,
    rope: Rope,
    backend: Backend | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attend over past and chunk, and store the chunk.

    Args:
        query: `[B, H, S, D]`, pre-RoPE; key, value `[B, G, S, D]`, of the chunk.
        mask: `[B or 1, 1, 1, T + S]` bool, False for padding on the left; None if there is none.
        scaling: factor on the scores.

    Returns `[B, S, H, D]` in the query's dtype. Raises ValueError for other masks.
    """
    padding = chunk_padding(mask, layer, query.shape[2])
    if runs_kernels(backend, layer, query.device):
        with current(query.device):
            return attend_and_store(layer, rope, query, key, value, padding, scaling)
    output = _with_torch(layer, rope, query, key, value, padding, scaling)
    return output.transpose(1, 2).to(query.dtype).contiguous()


def chunk_padding(mask: Tensor | None, layer: PackedLayer, new: int) -> list[int]:
    """How many of the chunk's `new` tokens are left padding, for each row. Raises ValueError for other masks."""
    batch = len(layer.lengths)
    if mask is None:
        return [0] * batch
    if mask.shape[2] != 1:
        raise ValueError(
            "a packed cache takes causal attention with left padding, no other mask (packed sequences, say)"
        )
    if new == 1 and all(layer.lengths):
        return [0] * batch
    visible = mask[:, 0, 0].expand(batch, -1)
    holes = (visible.int().diff(dim=-1) < 0).sum(-1)
    padding, hidden = torch.stack([(~visible).sum(-1), holes]).tolist()
    past = [layer.slots - length for length in layer.lengths]
    if any(hidden) or [min(pads, layer.slots) for pads in padding] != past:
        raise ValueError(
            "a packed cache takes left padding only; pad with tokenizer.padding_side = 'left', and keep masks"
        )
    return [min(max(pads - layer.slots, 0), new) for pads in padding]


def _with_torch(
    layer: PackedLayer, rope: Rope, query: Tensor, key: Tensor, value: Tensor, padding: list[int], scaling: float
) -> Tensor:
    """Attend over packed past and chunk, and store the chunk; `[B, H, S, D]` float32."""
    if not layer.exact_chunk:
        before = list(layer.lengths)
        layer.append(key, value, padding)
        return attend_with_torch(layer, rope, query, None, padding, scaling, before)
    output = attend_with_torch(layer, rope, query, (key, value), padding, scaling, layer.lengths)
    layer.append(key, value, padding)
    return output


def attend_with_torch(
    layer: PackedLayer,
    rope: Rope,
    query: Tensor,
    chunk: tuple[Tensor, Tensor] | None,
    padding: list[int],
    scaling: float,
    before: list[int],
) -> Tensor:
    """Attend over what is stored, and over the keys and values of the chunk if they are given.

    `before` is how many tokens each row held before the chunk. Returns `[B, H, S, D]` float32.
    """
    new, device = query.shape[2], query.device
    # of every token of the chunk; negative for padding
    places = tuple(
        tuple(-1 if token < pad else stored + token - pad for token in range(new))
        for stored, pad in zip(before, padding, strict=True)
    )
    length = max(row[-1] + 1 for row in places)
    tables = rope.chunk_tables(places, length, device)
    positions, exact = torch.tensor(places, device=device), None
    if chunk is None:
        rotated = rotate(query.float(), *tables)
    else:
        both = rotate(torch.cat([query.float(), chunk[0].float()], dim=1), *tables)
        rotated, key = both.split([query.shape[1], chunk[0].shape[1]], dim=1)
        visible = (positions[:, None, :] <= positions[:, :, None]) & (positions[:, None, :] >= 0)
        exact = Segment(key, chunk[1].float(), visible)
    if native.takes(layer, query):
        few = _few_segment(layer, rope, exact, positions, length)
        limits = [[min(stored, place + 1) for place in row] for stored, row in zip(layer.lengths, places, strict=True)]
        return native.attend(layer, rope, rotated * scaling, few, limits, length)
    # chained, not listed: a list would hold the whole past dequantized
    segments = chain(_stored_segments(layer, rope, positions, length), [] if exact is None else [exact])
    return attend_torch(rotated, segments, scaling)


def _stored_segments(layer: PackedLayer, rope: Rope, positions: Tensor, length: int) -> Iterator[Segment]:
    """What the layer stores, a stretch at a time, rotated; a query at position p sees the tokens up to p."""
    for stretch in layer.stretches():
        tables = rope.range_tables(stretch.start, stretch.end, length, positions.device)
        visible = _visible(layer, stretch.start, stretch.end, positions)
        yield Segment(rotate(stretch.key, *tables), stretch.value, visible)


def _visible(layer: PackedLayer, start: int, end: int, positions: Tensor) -> Tensor | None:
    """Which of the stored tokens `start`, ..., `end - 1` the queries see; None for all."""
    # with exact chunks the stored tokens all precede the queries
    if end <= min(layer.lengths, default=0) and layer.exact_chunk:
        return None
    lengths = torch.tensor(layer.lengths, device=positions.device)
    token = torch.arange(start, end, device=positions.device)
    return (token < lengths[:, None, None]) & (token <= positions[..., None])


def _few_segment(layer: PackedLayer, rope: Rope, chunk: Segment | None, positions: Tensor, length: int) -> Segment:
    """The tokens that no block holds: sinks, and the chunk if it is given."""
    sinks = min(layer.sink_tokens, max(layer.lengths, default=0))
    key, value = (layer.sinks[kind][:, :, :sinks].float() for kind in KINDS)
    if sinks:
        key = rotate(key, *rope.range_tables(0, sinks, length, positions.device))
    seen = _visible(layer, 0, sinks, positions)
    seen = torch.ones(*positions.shape, sinks, dtype=torch.bool) if seen is None else seen
    if chunk is None:
        return Segment(key, value, seen)
    assert chunk.visible is not None
    pairs = ((key, chunk.key), (value, chunk.value), (seen, chunk.visible))
    return Segment(*(torch.cat([stored, new], dim=2) for stored, new in pairs))
