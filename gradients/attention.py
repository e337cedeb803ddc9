"""Swap a model's attention function within a context manager.

Only the text decoder is switched. Other parts of a wrapper model, a vision tower say, keep their own, which may differ from
the decoder's before and after.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from gradients.cli import UserError
from gradients.models import decoder

PREFIX = "kvquant"  # of the names of all attention functions that are ours


@contextmanager
def attending_through(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within the block, the layers of `model`'s decoder attend through the function that is registered as `name`.

    Raises `UserError` if they attend through one of ours already: two would undo each other's work on the keys.
    """
    part = decoder(model)
    before = part.config._attn_implementation
    if before is not None and before.startswith(PREFIX):
        raise UserError(f"the model attends through {before!r} already; leave that block before entering this one")
    try:
        part.set_attn_implementation(name)
        yield
    finally:
        part.set_attn_implementation(before)
