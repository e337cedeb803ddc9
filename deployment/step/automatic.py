"""Within `packed_attention` on CUDA, decode steps are recorded in a CUDA graph and replayed without being asked for.

The model's forward is wrapped. A forward of one new token per sequence over a packed cache, or of up to 16, which records no gradients and
is asked for nothing that `generate` does not ask for, is a step. The first two steps of a given length run as they are; the third is recorded
(steps.py), the others are replayed. Everything else ends the recordings: chunks of a prompt, which are recorded in their own way (reading.py), beams that change places.
Where recordings are replayed too rarely to pay, twice as many steps must come before the next, 64 at most. `generate` thus says the same
with and without graphs.

Steps that cannot be recorded run as they are (recording.py says which), silently: layers of sliding windows, adapters, hooks of others on
the model's modules, a model on several devices. While several threads are within blocks nothing is recorded, since torch's random
numbers are not to be drawn meanwhile; what has been recorded is still replayed.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from deployment.cache import PackedCache
from deployment.format.room import GRAPH_TOKENS
from deployment.step.asked import Backend
from deployment.step.reading import Reading
from deployment.step.recording import GraphPieces, record
from deployment.step.steps import Steps
from gradients.models import decoder
from gradients.placement import input_device
from gradients.replaced import replaced

_PATIENCE = 2


class Automatic:
    """The forward of a model, steps over each of its caches replayed where they can be.

    `stopped` counts the blocks that want none of it; `ready` is whether now is a time for recording.
    """

    def __init__(self, model: PreTrainedModel, backend: Backend | None, ready: Callable[[], bool]) -> None:
        self.eager, self.stopped = model.forward, 0
        self.reading = Reading(model, self.eager, backend, lambda: GraphPieces(), ready)
        self._model, self._backend, self._ready = model, backend, ready
        self._steps: WeakKeyDictionary[PackedCache, Steps] = WeakKeyDictionary()

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The model's forward."""
        cache = options.get("past_key_values")
        if torch.compiler.is_compiling() or not isinstance(cache, PackedCache) or cache.is_native:
            return self.eager(*arguments, **options)
        if self.stopped:
            self.settle(cache)
            return self.eager(*arguments, **options)
        return self.steps_of(cache).forward(cache, arguments, options)

    def steps_of(self, cache: PackedCache) -> Steps:
        """The steps over a cache."""
        steps = self._steps.get(cache)
        if steps is None:
            steps = self._steps[cache] = Steps(
                self._model,
                cache,
                self.reading.forward,
                GRAPH_TOKENS,
                self._backend,
                record,
                patience=_PATIENCE,
                quietly=True,
                ready=self._ready,
            )
        return steps

    def settle(self, cache: PackedCache) -> None:
        """Drop what was recorded over a cache; waits for the device if there is something."""
        if cache in self._steps:
            self._steps[cache].settle()

    def settle_all(self) -> None:
        """Drop everything that was recorded."""
        self.reading.drop()
        for steps in list(self._steps.values()):
            steps.settle()


def possible(model: PreTrainedModel) -> bool:
    """Whether the model is where graphs are, and has a head."""
    return decoder(model) is not model and input_device(model).type == "cuda"


@contextmanager
def replaying(model: PreTrainedModel, automatic: Automatic) -> Iterator[None]:
    """Within the block the model's forward is that of `automatic`."""

    @functools.wraps(automatic.eager)  # `generate` looks at its signature
    def forward(*arguments: Any, **options: Any) -> Any:
        return automatic.forward(*arguments, **options)

    forward.automatic = automatic  # type: ignore[attr-defined]
    with replaced(model, "forward", forward):
        try:
            yield
        finally:
            automatic.settle_all()
