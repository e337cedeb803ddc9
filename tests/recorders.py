"""What replaces a CUDA graph where there is none: a recorder of steps of the torch path, which runs the step again, as it was then.

As with a graph, what the host counts is none of a replay's business, nothing is stored while recording, and input and output are
the same tensors every time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deployment.cache import PackedCache

VOCABULARY = 259


class Recording:
    """A `Recorder`; the steps recorded are over the last of `caches`."""

    def __init__(self) -> None:
        self.caches: list[PackedCache] = []
        self.recordings = self.replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        layers, new = self.caches[-1].layers, run.args[1].shape[1]  # type: ignore[attr-defined]
        logits = torch.zeros(len(layers[0].lengths), new, VOCABULARY)
        for layer in layers:
            layer.slots += new
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            after = [(layer.lengths, layer.slots, layer.stored) for layer in layers]
            for layer in layers:  # a device would not know them
                layer.lengths, layer.slots = [length - new for length in layer.lengths], layer.slots - new
            logits.copy_(run())
            for layer, (lengths, slots, stored) in zip(layers, after, strict=True):
                stored.copy_(layer.stored)
                layer.lengths, layer.slots, layer.stored = lengths, slots, stored

        return replay, logits


def generated(model: PreTrainedModel, cache: PackedCache, ids: Tensor, new: int, **options: object) -> Tensor:
    """Tokens, the same of the same seed."""
    torch.manual_seed(3)
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, eos_token_id=None, pad_token_id=2, **options)
