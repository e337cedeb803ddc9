"""Decode steps recorded in a CUDA graph: the host launches one thing per token instead of thousands.

Within `packed_attention` this happens by itself (automatic.py). Asked for, for one cache, from its second step on, and
with a warning where nothing can be recorded:

    with packed_attention(model), graphed(model, cache):
        model.generate(ids, past_key_values=cache, ...)        # sampling, streaming, stopping: all as before

Steps over that cache are replayed (steps.py); forwards over other caches are what they were. On other devices than CUDA, and for
models whose step depends on more than the recorded tensors (recording.py), everything runs as it is.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from deployment.cache import PackedCache
from deployment.step.asked import Backend
from deployment.step.recording import Recorder, record
from deployment.step.steps import Steps
from gradients.cli import UserError
from gradients.replaced import replaced

_STEPS = 256  # tokens that a recording has room for: outliers get it for the worst case, 16 KiB a token, side and layer of 7B


@contextmanager
def graphed(
    model: PreTrainedModel,
    cache: PackedCache,
    steps: int = _STEPS,
    backend: Backend | None = None,
    recorder: Recorder = record,
) -> Iterator[Steps]:
    """Within the block, `model`'s steps over `cache` are replayed. To be entered within `packed_attention`.

    Args:
        steps: tokens that room is made for at once.
        backend: as given to `packed_attention`.
        recorder: what records a step.

    Raises `UserError` for `steps` below 1, and within another such block of the model, which might end before this one.
    """
    if steps < 1:
        raise UserError(f"steps={steps} of a recording is not positive; give at least 1")
    outer = model.forward
    if hasattr(outer, "recorded_steps"):
        raise UserError("the model's decode steps are recorded already; leave that block before entering this one")
    automatic = getattr(outer, "automatic", None)
    eager = outer if automatic is None else automatic.eager
    if automatic is not None:
        automatic.settle(cache)
    replayed = Steps(model, cache, eager, steps, backend, recorder)

    @functools.wraps(outer)  # `generate` looks at its signature
    def forward(*arguments: Any, **options: Any) -> Any:
        ours = options.get("past_key_values") is cache
        return replayed.forward(cache, arguments, options) if ours else outer(*arguments, **options)

    forward.recorded_steps = replayed  # type: ignore[attr-defined]
    with replaced(model, "forward", forward):
        try:
            yield replayed
        finally:
            replayed.settle()
