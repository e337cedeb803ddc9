"""What replaces a CUDA graph where there is none: a recorder of steps of the torch path, which runs the step again, as it was then.

As with a graph, what the host counts is none of a replay's business, nothing is stored while recording, and input and output are
the same tensors every time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
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


class OperatorPieces(TorchDispatchMode):
    """`Pieces` where there are no graphs: operators are noted while they run, and run again into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[tuple[Any, Any, Any, Tensor]] = []
        self.pieces, self.running = 0, False

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operator(*arguments, **(options or {}))
        if isinstance(result, Tensor):
            self._noted.append((operator, arguments, options or {}, result))
        return result

    def begin(self) -> None:
        self._noted, self.running = [], True
        self.__enter__()

    def end(self) -> Callable[[], object]:
        self.__exit__(None, None, None)
        self.pieces, self.running, noted = self.pieces + 1, False, self._noted

        def replay() -> None:
            for operator, arguments, options, result in noted:
                again = operator(*arguments, **options)
                if again.data_ptr() != result.data_ptr():
                    result.copy_(again)

        return replay

    def abandon(self) -> None:
        if self.running:
            self.__exit__(None, None, None)
            self.running = False
