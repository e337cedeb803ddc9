"""One step of attention over a packed layer: what of the chunk is padding (checked.py), then attend and store, with kernels or torch."""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from deployment.devices import current
from deployment.layer import PackedLayer
from deployment.rope import Rope
from deployment.step import native
from deployment.step.append import append, join_window
from deployment.step.asked import Step
from deployment.step.dispatch import attend_and_store, runs_kernels
from deployment.step.reference import Segment, attend_torch
from gradients.models import KINDS
from gradients.precision import widened
from gradients.rope import rotate


def attend_step(step: Step) -> Tensor:
    """Attend over past and chunk, and store the chunk.

    Returns `[B, S, H, D]` in the query's dtype. Raises ValueError for masks and positions that are others (checked.py).
    """
    layer, query = step.layer, step.query
    try:
        absolute = step.rope.length_dependent
        padding = layer.checked.padding(layer, step.mask, step.positions, query.shape[2], absolute)
    except (ValueError, RuntimeError):
        layer.withdraw()
        raise
    # kernels know one window for all queries of a row, which is the wrong one where each has its own
    one_window = layer.exact_chunk or not layer.residual_tokens or query.shape[2] == 1
    if one_window and query.dtype != torch.float64 and runs_kernels(step.backend, layer, query.device):
        with current(query.device):
            return attend_and_store(step, padding)
    return _with_torch(step, padding).transpose(1, 2).to(query.dtype).contiguous()


def _with_torch(step: Step, padding: list[int]) -> Tensor:
    """Attend over packed past and chunk, and store the chunk; `[B, H, S, D]` in float32, or float64 for such a query."""
    layer, key, value = step.layer, step.key, step.value
    joined, before = join_window(layer, key, value, padding), list(layer.lengths)
    if layer.exact_chunk:
        output = attend_with_torch(layer, step.rope, step.query, joined, padding, step.scaling, before)
        append(layer, key, value, padding, joined)
        return output
    append(layer, key, value, padding, joined)
    chunk = joined if layer.residual_tokens else None
    return attend_with_torch(layer, step.rope, step.query, chunk, padding, step.scaling, before)


def attend_with_torch(
    layer: PackedLayer,
    rope: Rope,
    query: Tensor,
    chunk: tuple[Tensor, Tensor] | None,
    padding: list[int],
    scaling: float,
    before: list[int],
) -> Tensor:
    """Attend over what is packed, and over keys and values `chunk` that end where the queries do, if they are given.

    `before` is how many tokens each row held before the chunk. Returns `[B, H, S, D]` in float32, or float64 for such a query.
    """
    new, device = query.shape[2], query.device
    query, more = widened(query), 0 if chunk is None else chunk[0].shape[2] - new  # tokens of the window
    # of every token of window and chunk; negative for padding
    places = tuple(
        tuple(max(-1, stored + token - pad) for token in range(-more, new))
        for stored, pad in zip(before, padding, strict=True)
    )
    length = max(row[-1] + 1 for row in places)
    cos, sin = rope.chunk_tables(places, length, device)
    own = torch.tensor(places, device=device)
    positions, exact = own[:, more:], None
    rotated = rotate(query, cos[:, more:], sin[:, more:])
    if chunk is not None:
        visible = (own[:, None, :] <= positions[:, :, None]) & (own[:, None, :] >= 0)
        if not layer.exact_chunk:
            visible &= own[:, None, :] > positions[:, :, None] - layer.residual_tokens
        exact = Segment(rotate(chunk[0].to(query.dtype), cos, sin), chunk[1].to(query.dtype), visible)
    if native.takes(layer, query):
        few = _few_segment(layer, rope, exact, positions, length)
        back = 0 if layer.exact_chunk else layer.residual_tokens
        rows = zip(layer.past, positions.tolist(), strict=True)
        limits = [[min(past, place + 1 - back) for place in row] for past, row in rows]
        return native.attend(layer, rope, rotated * scaling, few, limits, length)
    # chained, not listed: a list would hold the whole past dequantized
    segments = chain(_stored_segments(layer, rope, positions, length, query.dtype), [] if exact is None else [exact])
    return attend_torch(rotated, segments, scaling)


def _stored_segments(
    layer: PackedLayer, rope: Rope, positions: Tensor, length: int, dtype: torch.dtype
) -> Iterator[Segment]:
    """What the layer has packed, a stretch at a time, rotated; a query at position p sees the tokens up to p, or its own window."""
    for stretch in layer.stretches():
        tables = rope.range_tables(stretch.start, stretch.end, length, positions.device)
        visible = _visible(layer, stretch.start, stretch.end, positions)
        yield Segment(rotate(stretch.key.to(dtype), *tables), stretch.value.to(dtype), visible)


def _visible(layer: PackedLayer, start: int, end: int, positions: Tensor) -> Tensor | None:
    """Which of the stored tokens `start`, ..., `end - 1` the queries see; None for all."""
    # with exact chunks the packed tokens all precede the queries
    if end <= min(layer.past, default=0) and layer.exact_chunk:
        return None
    past = torch.tensor(layer.past, device=positions.device)
    token = torch.arange(start, end, device=positions.device)
    last = positions if layer.exact_chunk else positions - layer.residual_tokens
    return (token < past[:, None, None]) & (token <= last[..., None])


def _few_segment(layer: PackedLayer, rope: Rope, chunk: Segment | None, positions: Tensor, length: int) -> Segment:
    """The tokens that no block holds: sinks, and window and chunk if they are given."""
    sinks = min(layer.sink_tokens, max(layer.past, default=0))
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
