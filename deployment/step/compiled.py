"""The attention step as one `torch.library` operator, opaque to `torch.compile`.

    torch.ops.kvquant.attend_step(query, key, value, mask, effects, layer, rope, backend, scaling, positions)

What happens inside, growing pages and counting tokens, is no business of a compiler, but that something happens is: the
operator declares to write to `effects` of the layer (see `handles.py`). It is marked unsafe for the CUDA graphs that a
compiler records by itself, since the host must count along; recount.py is for those who record their own.
Outside of compilation the step is called directly. There is no backward: the cache holds codes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

import torch
from torch import Tensor

from deployment.handles import find
from deployment.step.asked import Backend, Step
from deployment.step.attend import attend_step

_way: ContextVar[Callable[[Step], Tensor] | None] = ContextVar("way", default=None)


@contextmanager
def attending_by(way: Callable[[Step], Tensor]) -> Iterator[None]:
    """Within the block, which is one thread's, `way` takes the place of `attend_step`."""
    token = _way.set(way)
    try:
        yield
    finally:
        _way.reset(token)


def attend(step: Step) -> Tensor:
    """`attend_step`, through the operator while a compiler looks on."""
    if not torch.compiler.is_compiling():
        return (_way.get() or attend_step)(step)
    state = step.layer.effects, step.layer.number, step.rope.number
    tokens = step.query, step.key, step.value, step.mask
    return registered_step(*tokens, *state, step.backend or "", step.scaling, step.positions)


@torch.library.custom_op("kvquant::attend_step", mutates_args=("effects",), tags=(torch.Tag.cudagraph_unsafe,))
def registered_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    effects: Tensor,
    layer: int,
    rope: int,
    backend: str,
    scaling: float,
    positions: Tensor | None = None,
) -> Tensor:
    """`attend_step` of the layer and the rotary embedding of these numbers; `backend` "" leaves the choice open."""
    cache_layer, chosen = find(layer, "cache"), cast(Backend, backend) if backend else None
    cache_layer.withdraw()  # where a graph breaks before the attention, `update` has announced the chunk by itself
    cache_layer.expect(key, value)
    return attend_step(Step(cache_layer, find(rope, "model"), query, key, value, scaling, mask, positions, chosen))


@registered_step.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    batch, heads, new, dim = query.shape
    return query.new_empty(batch, new, heads, dim)
