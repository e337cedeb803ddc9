"""The decode steps of a model over one cache: run as they are, recorded in CUDA graphs, replayed.

A forward of one new token per sequence over `cache` that records no gradients is replayed from a graph, and so is one of up to 16,
as prompt lookup makes them, each number from a graph of its own; any other forward (a chunk of the prompt, another cache) runs as it is. A
step goes through three stages:

    first      runs as it is, so that kernels are compiled and tables made
    second     room for `steps` tokens is reserved, the forward recorded, and replayed
    others     token ids copied into the recorded input, replayed, counted on the host; after `steps` there is new room,
               and a new recording if that moved anything

Whatever else happens to the cache in between (a chunk, another batch) shows in its counts or tensors, and the graph is made
anew; but for a crop of what came since there was room, after which replays go on from where it ends. Masks and positions are not
part of a recording: that they ask for nothing else is checked with every step (checked.py), without waiting for the device.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from deployment.cache import PackedCache
from deployment.devices import current, is_capturing
from deployment.kept import kept
from deployment.layer import PackedLayer
from deployment.step.asked import Backend
from deployment.step.recording import Assumed, Recorder, obstacle, unpacked, wants_logits_only
from deployment.step.recount import recount, reserve

MOST_TOKENS = 16  # of a step, for each sequence: guesses are read at once
_WORTH = 16  # replays that have paid for a recording
_PATIENCE = 64  # steps before a recording at most, where recordings have not paid
Forward = Callable[..., Any]


@dataclass(frozen=True)
class _Recorded:
    """A step of a number of tokens: what repeats it, its input `[B, S]` and output `[B, S, V]`, and the slots held when recorded."""

    replay: Callable[[], object]
    ids: Tensor
    logits: Tensor
    slots: int


@dataclass
class _Before:
    """What the first layer held before a step (`Counts` of checked.py)."""

    slots: int
    lengths: list[int]
    stored: Tensor
    leads: bool = True


class Steps:
    """The decode steps of one model over one cache, which is not kept alive: recorded when possible.

    Args:
        eager: the model's forward as it is.
        steps: tokens that room is made for at once.
        patience: steps that run as they are before one is recorded. With a warning for what cannot be recorded, once in all;
            or `quietly`, every time something has happened to the cache, and more of them if the last recordings did not pay.
        ready: whether now is a time for recording.

    `recordings` and `replays` count; `obstacle` says why nothing is recorded, None if nothing is in the way.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PackedCache,
        eager: Forward,
        steps: int,
        backend: Backend | None,
        recorder: Recorder,
        patience: int = 1,
        quietly: bool = False,
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self.steps, self.recordings, self.replays = steps, 0, 0
        self.obstacle: str | None = None
        self._model, self._eager, self._backend, self._recorder = model, eager, backend, recorder
        self._least = self._patience = patience
        self._quietly, self._ready = quietly, ready
        self._layers = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
        self._looked = False
        self._eagerly: Counter[int] = Counter()  # steps that ran as they are since something happened, by their tokens
        self._after: tuple[Tensor, int] | None = None  # what the last of them left
        self._recorded: dict[int, _Recorded] = {}  # by tokens
        self._paid = 0  # replays of these
        self._places: list[tuple[int, int]] = []  # what they read and write
        self._begin = self._end = self._slots = (
            0  # slots when room was made, those there is room for, those that are held
        )

    def forward(self, cache: PackedCache, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The model's forward over the cache, replayed where it is one step."""
        ids = options.get("input_ids", arguments[0] if arguments else None)
        if ids is None or not self._is_step(ids, len(arguments), options):
            self.settle()
            return self._eager(*arguments, **options)
        logits = self._step(cache, ids, options.get("attention_mask"), options.get("position_ids"))
        if logits is not None:
            wanted = options.get("logits_to_keep") or 0  # 0 for all
            return CausalLMOutputWithPast(logits=logits[:, -wanted:].clone(), past_key_values=cache)
        if self._recorded and self._layers[0].slots + ids.shape[1] > self._end:
            self.settle()  # it takes room of its own
        output = self._eager(*arguments, **options)
        self._eagerly[ids.shape[1]] += 1
        self._after = self._layers[0].stored, self._layers[0].slots
        return output

    def _is_step(self, ids: Tensor, arguments: int, options: dict[str, Any]) -> bool:
        """Whether these are the arguments of a step of sequences all of which hold tokens: none can be padding."""
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= MOST_TOKENS or not self._layers:
            return False
        if is_capturing(ids.device):
            return False
        if not wants_logits_only(self._model, arguments, options):
            return False
        lengths = self._layers[0].lengths
        return len(lengths) == len(ids) and all(lengths)

    def _step(self, cache: PackedCache, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
        """Logits `[B, S, V]` that the next step overwrites, or None if they must come from the forward itself."""
        if self.obstacle is not None:
            return None
        if self._recorded and not self._as_recorded(ids):
            self.settle()
        new, first = ids.shape[1], self._layers[0]
        recorded = self._recorded.get(new)
        if recorded is None or first.slots < recorded.slots or first.slots + new > self._end:
            recorded = self._prepare(cache, ids)
        if recorded is None:
            return None
        slots, held = first.slots, first.lengths
        lengths = [length + new for length in held]
        for layer in self._layers:  # before the device does: who is interrupted now counts back, as after any forward
            layer.lengths, layer.slots = lengths, slots + new
        self._slots += new
        recorded.ids.copy_(ids)
        recorded.replay()
        self.replays, self._paid = self.replays + 1, self._paid + 1
        # behind the replay, since the device is waiting for it; what is wrong is counted back like any failure
        if first.window is None and not self._assumed.unchanged:
            for layer in self._layers:
                layer.crop(-new)
            self.settle()
            return None
        seen = None if mask is None else mask[:, None, None]
        first.checked.padding(_Before(slots, held, first.stored - new), seen, positions, new, none=True)
        return recorded.logits

    def _give_up(self, reason: str | None, expected: bool = True) -> None:
        self.obstacle = reason
        if reason is not None and not (self._quietly and expected):
            warnings.warn(f"decode steps run without a CUDA graph: {reason}", stacklevel=2)

    def _as_recorded(self, ids: Tensor) -> bool:
        """Whether all is where it was, whatever has been cropped or stored in the room there is, and the model what it was."""
        first = self._layers[0]
        if first.stored is not self._stored or self._floor_now() is not self._floor or not self._assumed.in_place:
            return False
        if first.window is not None and not self._assumed.unchanged:  # others find out behind the replay (`_step`)
            return False
        if first.slots != self._slots:  # not what the last replay left
            if not self._begin <= first.slots <= self._end or self._places != self._places_now():
                return False
            self._slots = first.slots
        return True

    def _places_now(self) -> list[tuple[int, int]]:
        return [(tensor.data_ptr(), tensor.numel()) for layer in self._layers for tensor in layer.tensors()]

    def _floor_now(self) -> Tensor | None:
        """Another after every crop into a window, whose tokens may be where they once were."""
        window = self._layers[0].window
        return None if window is None else window.floor

    def _prepare(self, cache: PackedCache, ids: Tensor) -> _Recorded | None:
        """The recording of a step, for which there is room: made if need be, unless this is no time for that."""
        first, new = self._layers[0], ids.shape[1]
        if new not in self._recorded and not self._is_time(cache, new):
            return None
        if any(layer.lengths != first.lengths for layer in self._layers):  # the forward says so better
            return None
        if (not self._recorded or first.slots + new > self._end) and not self._make_room(new):
            return None
        recorded = self._recorded.get(new)
        if recorded is None or first.slots < recorded.slots:
            recorded = self._record(cache, ids) if self._ready() else None
        if not self._recorded:
            self._unfix()
        return recorded

    def _make_room(self, new: int) -> bool:
        """Make room for further steps, of `new` tokens and others; recordings are dropped if that moves anything."""
        first = self._layers[0]
        room = max(new, self.steps)
        room = room if first.capacity is None else min(room, first.capacity - first.slots)
        if room < new:  # the forward says so better
            return False
        if self._recorded:
            recount(self._layers)
        try:
            for layer in self._layers:
                reserve(layer, room)
        except torch.OutOfMemoryError:
            self.settle()
            self._unfix()
            self._give_up(f"there is no memory for the outliers of {room} tokens", expected=False)
            return False
        places = self._places_now()
        if places != self._places:
            self._recorded.clear()
        self._begin, self._end, self._slots = first.slots, first.slots + room, first.slots
        self._stored, self._floor, self._places = first.stored, self._floor_now(), places
        return True

    def _is_time(self, cache: PackedCache, new: int) -> bool:
        """Whether a step of `new` tokens is to be recorded: enough have run as they are, and nothing is in the way."""
        first = self._layers[0]
        if self._quietly and self._after is not None and not self._recorded:
            stored, slots = self._after
            if first.stored is not stored or first.slots > slots:  # a crop alone leaves it where it is
                self._eagerly.clear()
        if self._eagerly[new] < self._patience or not self._ready():
            return False
        if not self._looked:
            self._looked = True
            self._give_up(obstacle(self._model, cache, self._backend) or unpacked(cache))
        return self.obstacle is None

    def _record(self, cache: PackedCache, ids: Tensor) -> _Recorded | None:
        counts = [(layer.lengths, layer.slots) for layer in self._layers]
        recorded, own, failure = None, kept(ids.clone)(), ""
        try:
            self._assumed = Assumed(self._model)
            with current(ids.device):
                replay, logits = self._recorder(functools.partial(self._run, cache, own))
            recorded = _Recorded(replay, own, logits, counts[0][1])
        except RuntimeError as error:
            failure = str(error).strip().splitlines()[0]
        for layer, (lengths, slots) in zip(self._layers, counts, strict=True):  # nothing was stored
            layer.lengths, layer.slots, layer.announced = lengths, slots, False
        if recorded is None:
            self.settle()
            self._give_up(f"recording failed ({failure})", expected=False)
            return None
        self._recorded[ids.shape[1]] = recorded
        self.recordings += 1
        return recorded

    def _run(self, cache: PackedCache, ids: Tensor) -> Tensor:
        with self._layers[0].checked.trusting():
            output = self._eager(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=0)
        logits: Tensor = output.logits
        return logits

    def settle(self) -> None:
        """Drop what was recorded, and take over what the device has counted; waits for it.

        Raises RuntimeError if a token found no room, which would be a bug here.
        """
        if self._quietly:
            self._eagerly.clear()
        if not self._recorded:
            return
        if self._quietly:
            self._patience = self._least if self._paid >= _WORTH else min(2 * self._patience, _PATIENCE)
        self._recorded.clear()
        self._paid = 0
        recount(self._layers)
        self._unfix()

    def _unfix(self) -> None:
        """No graph relies any more on where streams of outliers are."""
        for layer in self._layers:
            for packed in layer.packed.values():
                for page in packed.pages:
                    if page.room is not None:
                        page.room.fixed = False
