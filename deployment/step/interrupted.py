"""A forward that does not come to its end leaves the cache as it found it.

Out of memory, an error in a hook, Ctrl-C: some layers hold the chunk by then and others do not. What every layer held is noted
before a forward, which costs nothing, and put back if it fails: packed tokens are forgotten as cropping does it, and native
layers get back the tensors they had.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.cache_utils import CacheLayerMixin

from deployment.cache import PackedCache
from deployment.layer import PackedLayer


@dataclass
class Forwards:
    """The forwards that are under way, by cache: of which module, and what the cache's layers held before."""

    _begun: dict[PackedCache, tuple[nn.Module, list[Any]]] = field(default_factory=dict)

    def begin(self, cache: PackedCache, module: nn.Module) -> bool:
        """Before a forward, which may be a part of another module's; whether it is not.

        Raises RuntimeError if the last one was interrupted, and the cache is put back only now, and for layers that hold
        different numbers of tokens.
        """
        if cache in self._begun:
            if self._begun[cache][0] is not module:
                return False
            self.put_back(cache)
            raise RuntimeError(
                f"a forward over this cache was interrupted; it holds the {cache.get_seq_length()} tokens from before again, "
                "so call once more with all tokens that follow them"
            )
        tokens = [layer.get_seq_length() for layer in cache.layers]
        if len(set(tokens)) > 1:
            raise RuntimeError(f"the layers of the cache hold {tokens} tokens; reset() it and read the text again")
        self._begun[cache] = module, [held_by(layer) for layer in cache.layers]
        cache.in_forward = True
        return True

    def end(self, cache: PackedCache, module: nn.Module, failed: bool) -> None:
        """After a forward, unless it is a part of another module's.

        Raises RuntimeError if a layer took tokens that its attention did not store, or took none: it has not seen the past either.
        """
        if cache not in self._begun or self._begun[cache][0] is not module:
            return
        layers = [(number, layer) for number, layer in enumerate(cache.layers) if isinstance(layer, PackedLayer)]
        lost = [number for number, layer in layers if layer.announced]
        held = self._begun[cache][1]
        unused = [number for number, layer in layers if layer.slots == held[number][0]]
        if failed or lost:
            self.put_back(cache)
        else:
            del self._begun[cache]
            cache.in_forward = False
        if lost and not failed:
            raise RuntimeError(
                f"attention of layers {lost} was not told of the packed cache, and saw nothing of the past: their modules must "
                "hand arguments they do not know on to the attention function"
            )
        if unused and not failed:
            raise RuntimeError(
                f"layers {unused} were not handed the packed cache, and saw nothing of the past: gradient checkpointing of a model "
                "in training mode drops it; call model.eval() or model.gradient_checkpointing_disable() first"
            )

    def put_back(self, cache: PackedCache) -> None:
        """After a forward that did not come to its end."""
        for layer, held in zip(cache.layers, self._begun.pop(cache)[1], strict=True):
            if isinstance(layer, PackedLayer):
                layer.put_back(*held)
            else:
                vars(layer).clear()
                vars(layer).update(held)
        cache.in_forward = False

    def put_back_all(self) -> None:
        """When no forward can be under way any more."""
        for cache in list(self._begun):
            self.put_back(cache)


def held_by(layer: CacheLayerMixin) -> Any:
    """What a layer holds, by reference: nothing is changed in place that was there before."""
    return (layer.slots, layer.lengths, layer.window) if isinstance(layer, PackedLayer) else dict(vars(layer))
