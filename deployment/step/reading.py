"""Chunks of a prompt: what lies between a model's attentions is recorded in CUDA graphs and replayed.

A forward launches some forty small kernels a layer beside attention, and a host that takes 50 us for each waits longer for itself than for
the GPU. They are the same for every chunk of so many tokens; attention and storing are not, since they depend on how much is stored. So the
forward is recorded in pieces, one between each attention and the next, while it runs: attention itself runs as it is, over tensors that
stay where they are. A replay is a piece, an attention, a piece, ... What all attentions of a chunk do alike is recorded, too, for that chunk
(kernels/repeated.py).

The first two chunks of a shape run as they are, the third is recorded, the others are replayed, over any packed cache. The last shape's
recording is kept, until a decode step comes. What prevents the recording of steps (recording.py) prevents it here.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from deployment.cache import PackedCache
from deployment.devices import current, is_capturing
from deployment.kept import kept
from deployment.kernels.repeated import Recorder, Repeated
from deployment.layer import PackedLayer
from deployment.rope import Rope
from deployment.step.asked import Backend, Step
from deployment.step.attend import attend_step
from deployment.step.compiled import attending_by
from deployment.step.interrupted import held_by
from deployment.step.recording import Assumed, Pieces, obstacle, unpacked, wants_logits_only
from deployment.step.steps import MOST_TOKENS, Forward

_PATIENCE = 2  # chunks of a shape that run as they are before one is recorded

Key = tuple[int, int, int]  # sequences, tokens, logits to keep


@dataclass(frozen=True)
class _Attention:
    """A piece, and the attention behind it, of the layer of this number: its operands and its output stay where they are."""

    replay: Callable[[], object]
    number: int
    rope: Rope
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    output: Tensor

    def run(self, cache: PackedCache, mask: Tensor | None, positions: Tensor | None, backend: Backend | None) -> None:
        """The piece, then the attention over a cache."""
        self.replay()
        layer: Any = cache.layers[self.number]
        layer.expect(self.key, self.value)
        self.attend(layer, mask, positions, backend)

    def attend(
        self, layer: PackedLayer, mask: Tensor | None, positions: Tensor | None, backend: Backend | None
    ) -> None:
        """The attention over a layer that expects the chunk."""
        operands = (self.query, self.key, self.value)
        self.output.copy_(attend_step(Step(layer, self.rope, *operands, self.scaling, mask, positions, backend)))


@dataclass(frozen=True)
class _Recorded:
    """All of a forward of ids `[B, S]`, and the logits that it leaves."""

    ids: Tensor
    attentions: list[_Attention]
    last: Callable[[], object]
    logits: Tensor
    assumed: Assumed
    repeated: Repeated


class Reading:
    """The forward of a model: chunks of more tokens than a decode step has, and steps that are no graph (`unpacked`), are replayed where they can be.

    Args:
        eager: the model's forward as it is.
        pieces: makes what records pieces.
        ready: whether now is a time for recordings: they are shared by all threads.

    `recordings` and `replays` count.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eager: Forward,
        backend: Backend | None,
        pieces: Callable[[], Pieces],
        ready: Callable[[], bool],
    ) -> None:
        self.recordings = self.replays = 0
        self._model, self._eager, self._backend, self._pieces, self._ready = model, eager, backend, pieces, ready
        self._seen: Counter[Key] = Counter()
        self._recorded: dict[Key, _Recorded] = {}
        self._gave_up = False

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """The model's forward, over a packed cache among its options."""
        ids = options.get("input_ids", arguments[0] if arguments else None)
        cache: PackedCache = options["past_key_values"]
        if ids is None or not self._takes(cache, ids, len(arguments), options):
            return self._eager(*arguments, **options)
        wanted = options.get("logits_to_keep") or 0
        key = *ids.shape, wanted
        mask, positions = options.get("attention_mask"), options.get("position_ids")
        mask = None if mask is None else mask[:, None, None]
        logits = self._replayed(key, cache, ids, mask, positions)
        if logits is None:
            self._seen[key] += 1
            return self._eager(*arguments, **options)
        return CausalLMOutputWithPast(logits=logits.clone(), past_key_values=cache)

    def drop(self) -> None:
        """Forget what was recorded, and how often shapes were seen."""
        self._recorded.clear()
        self._seen.clear()

    def _takes(self, cache: PackedCache, ids: Tensor, arguments: int, options: dict[str, Any]) -> bool:
        if ids.shape[-1] <= MOST_TOKENS and unpacked(cache) is None:
            self.drop()  # the prompt has been read
            return False
        if self._gave_up or ids.ndim != 2:
            return False
        return not is_capturing(ids.device) and wants_logits_only(self._model, arguments, options)

    def _replayed(
        self, key: Key, cache: PackedCache, ids: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor | None:
        """Logits that the next chunk overwrites, or None if they must come from the forward itself."""
        if not self._ready():  # others would replay over the same tensors
            return None
        recorded = self._recorded.get(key)
        if recorded is not None and not recorded.assumed.holds:
            self.drop()
            recorded = None
        if recorded is None:
            if self._seen[key] < _PATIENCE:
                return None
            if obstacle(self._model, cache, self._backend) is not None:
                self._gave_up = True
                return None
            if not all(map(_is_filled, cache.layers)):
                return None
            return self._record(key, cache, ids, mask, positions)
        recorded.ids.copy_(ids)
        with current(ids.device), recorded.repeated.chunk():
            for attention in recorded.attentions:
                attention.run(cache, mask, positions, self._backend)
            recorded.last()
        self.replays += 1
        return recorded.logits

    def _record(
        self, key: Key, cache: PackedCache, ids: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor | None:
        """Run a chunk, recording it; None if that fails, with the cache as it was."""
        self._recorded.clear()
        held = [(layer, held_by(layer)) for layer in cache.layers]
        own, assumed, attentions = kept(ids.clone)(), Assumed(self._model), list[_Attention]()
        try:
            with current(ids.device), self._recording() as pieces:

                def attend(step: Step) -> Tensor:
                    attention = _recorded_attention(pieces, step, cache, attentions)
                    attentions.append(attention)
                    attention.attend(step.layer, mask, positions, self._backend)
                    pieces.begin()
                    return attention.output

                with attending_by(attend):
                    output = self._eager(input_ids=own, past_key_values=cache, use_cache=True, logits_to_keep=key[2])
                last = pieces.end()
                last()
        except RuntimeError:
            for layer, before in held:
                layer.put_back(*before)
            self._gave_up = True
            return None
        repeated = Repeated(recorder_of(self._pieces()))
        self._recorded[key] = _Recorded(own, attentions, last, output.logits, assumed, repeated)
        self.recordings += 1
        return output.logits

    @contextmanager
    def _recording(self) -> Iterator[Pieces]:
        pieces = self._pieces()
        try:
            pieces.begin()
            yield pieces
        except BaseException:
            pieces.abandon()
            raise


def recorder_of(pieces: Pieces) -> Recorder:
    """Records work in pieces of their own memory."""

    def record(work: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        try:
            pieces.begin()
            result = work()
            return pieces.end(), result
        except BaseException:
            pieces.abandon()
            raise

    return record


def _is_filled(layer: Any) -> bool:
    """Whether a layer has memory that it may write to, so that expecting a chunk takes none."""
    return bool(layer.is_initialized) and (torch.is_inference_mode_enabled() or not layer.stored.is_inference())


def _recorded_attention(pieces: Pieces, step: Step, cache: PackedCache, others: list[_Attention]) -> _Attention:
    """End the piece before an attention, and run it: the operands are in memory that all layers share."""
    last = others[-1] if others else None
    shared = (None,) * 3 if last is None else (last.query, last.key, last.value)
    pairs = zip((step.query, step.key, step.value), shared, strict=True)
    query, key, value = (_like(states, before).copy_(states) for states, before in pairs)
    replay = pieces.end()
    replay()
    batch, heads, new, dim = query.shape
    output = kept(query.new_empty)(batch, new, heads, dim) if last is None or last.query is not query else last.output
    number = next(number for number, layer in enumerate(cache.layers) if layer is step.layer)
    return _Attention(replay, number, step.rope, query, key, value, step.scaling, output)


def _like(states: Tensor, before: Tensor | None) -> Tensor:
    """Memory for `states`: what is there already, if it is alike."""
    alike = before is not None and (before.shape, before.stride()) == (states.shape, states.stride())
    empty = kept(torch.empty_strided)
    if before is not None and alike:
        return before
    return empty(states.shape, states.stride(), dtype=states.dtype, device=states.device)
