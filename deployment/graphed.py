"""Decode steps recorded in a CUDA graph: the host launches one thing per token instead of thousands.

    with packed_attention(model), graphed(model, cache):
        model.generate(ids, past_key_values=cache, ...)        # sampling, streaming, stopping: all as before

Within the block a forward of one new token per sequence over `cache` is replayed from a graph; any other forward (a
chunk of the prompt, another cache) runs as it is. A step goes through three stages:

    first      runs as it is, so that kernels are compiled and tables made
    second     room for `steps` tokens is reserved, the forward recorded, and replayed
    others     token ids copied into the recorded input, replayed, counted on the host; after `steps` there is new room,
               and a new recording if that moved anything

Whatever else happens to the cache in between (a crop, a chunk, another batch) shows in its counts or tensors, and the
graph is made anew. Masks and positions are not part of a recording: that they ask for nothing else is checked before
every step (checked.py), which does not wait for the device either.

On other devices than CUDA, and for models whose step depends on more than the recorded tensors, everything runs as it
is, and a warning says why.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from deployment.cache import PackedCache, PackedLayer
from deployment.devices import current
from deployment.kept import kept
from deployment.kernels.dispatch import Backend, runs_kernels
from deployment.rope import Rope
from gradients.cli import UserError
from gradients.models import decoder
from gradients.placement import input_device

_STEPS = 256  # tokens that a recording has room for: outliers get it for the worst case, 16 KiB a token, side and layer of 7B
_KNOWN = {
    "input_ids",
    "past_key_values",
    "attention_mask",
    "position_ids",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """(what repeats `run` on the current CUDA device, the tensor that its result is in after each repetition).

    `run` must have run before, must not wait for the device, and reads and writes the same tensors every time.
    """
    graph = torch.cuda.CUDAGraph()
    # relaxed: a kernel that is loaded only now would be an error otherwise
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        output = run()
    return graph.replay, output


@contextmanager
def graphed(
    model: PreTrainedModel,
    cache: PackedCache,
    steps: int = _STEPS,
    backend: Backend | None = None,
    recorder: Recorder = record,
) -> Iterator["Steps"]:
    """Within the block, `model`'s forwards of one token over `cache` are replayed. To be entered within `packed_attention`.

    Args:
        steps: tokens that room is made for at once.
        backend: as given to `packed_attention`.
        recorder: what records a step.

    Raises `UserError` for `steps` below 1, and within another such block of the model, which might end before this one.
    """
    if steps < 1:
        raise UserError(f"steps={steps} of a recording is not positive; give at least 1")
    before = model.__dict__.get("forward")  # of a hook's; usually the class's
    if hasattr(before, "recorded_steps"):
        raise UserError("the model's decode steps are recorded already; leave that block before entering this one")
    replayed = Steps(model, cache, steps, backend, recorder)
    model.forward = replayed.forward  # type: ignore[method-assign]
    try:
        yield replayed
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before  # type: ignore[method-assign]
        replayed.settle()


class Steps:
    """The decode steps of one model over one cache: recorded when possible.

    `recordings` and `replays` count; `obstacle` says why nothing is recorded, None if nothing is in the way.
    """

    def __init__(
        self, model: PreTrainedModel, cache: PackedCache, steps: int, backend: Backend | None, recorder: Recorder
    ) -> None:
        self.cache, self.steps, self.recordings, self.replays = cache, steps, 0, 0
        self.obstacle: str | None = None
        self._model, self._backend, self._recorder, self._original = model, backend, recorder, model.forward

        @functools.wraps(model.forward)  # `generate` looks at its signature
        def forward(*arguments: Any, **options: Any) -> Any:
            return self._forward(*arguments, **options)

        forward.recorded_steps = self  # type: ignore[attr-defined]
        self.forward = forward
        self._layers = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
        self._warm = False
        self._left = 0  # steps that there is room for
        self._replay: Callable[[], object] | None = None
        self._places: list[int] = []  # what the recording reads and writes

    def _forward(self, *arguments: Any, **options: Any) -> Any:
        """The model's forward, replayed where it is one step."""
        logits = None
        ids = options.get("input_ids", arguments[0] if arguments else None)
        if ids is not None and self._is_step(ids, len(arguments), options):
            logits = self._step(ids, options.get("attention_mask"), options.get("position_ids"))
        elif options.get("past_key_values") is self.cache:
            self.settle()
        if logits is None:
            return self._original(*arguments, **options)
        return CausalLMOutputWithPast(logits=logits, past_key_values=self.cache)

    def _is_step(self, ids: Tensor, arguments: int, options: dict[str, Any]) -> bool:
        """Whether these are the arguments of a step of sequences all of which hold tokens: none can be padding."""
        if arguments > 1 or ids.shape[1] != 1 or options.get("past_key_values") is not self.cache:
            return False
        mask = options.get("attention_mask")
        if mask is not None and (mask.ndim != 2 or mask.is_floating_point()):
            return False
        if options.get("use_cache") is False or options.get("return_dict") is False:
            return False
        asked = {name for name, value in options.items() if value is not None and value is not False}
        holding = all(len(layer.lengths) == len(ids) and all(layer.lengths) for layer in self._layers)
        return holding and asked <= _KNOWN

    def _step(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
        """Logits `[B, 1, V]` of the next token, or None if they must come from the forward itself."""
        if not self._warm:
            self._warm = True
            self._give_up(obstacle(self._model, self.cache, self._backend))
            return None
        if self.obstacle is not None:
            return None
        if self._replay is not None and not self._as_recorded(ids):
            self.settle()
        if self._left == 0 and not self._prepare(ids):
            return None
        assert self._replay is not None
        first = self._layers[0]
        seen = None if mask is None else mask[:, None, None]
        first.checked.padding(first, seen, positions, 1)
        self._ids.copy_(ids)
        self._replay()
        self.replays += 1
        self._left -= 1
        self._slots += 1
        for layer in self._layers:  # the device counts for itself
            layer.lengths, layer.slots = [length + 1 for length in layer.lengths], layer.slots + 1
        return self._logits.clone()

    def _give_up(self, reason: str | None) -> None:
        self.obstacle = reason
        if reason is not None:
            warnings.warn(f"decode steps run without a CUDA graph: {reason}", stacklevel=2)

    def _as_recorded(self, ids: Tensor) -> bool:
        """Whether nobody but the replays has touched the cache since."""
        first = self._layers[0]
        return first.stored is self._stored and first.slots == self._slots and ids.shape == self._ids.shape

    def _prepare(self, ids: Tensor) -> bool:
        """Make room for further steps, and record one unless the last recording still holds; whether there is one."""
        if self._replay is not None:
            self._recount()
        first = self._layers[0]
        room = self.steps if first.capacity is None else min(self.steps, first.capacity - first.slots)
        if room < 1:  # the forward says so better
            return False
        for layer in self._layers:
            layer.reserve(room)
        places = [tensor.data_ptr() for layer in self._layers for tensor in layer.tensors()]
        if (self._replay is None or places != self._places) and not self._record(ids):
            return False
        self._left, self._slots, self._stored, self._places = room, first.slots, first.stored, places
        return True

    def _record(self, ids: Tensor) -> bool:
        counts = [(list(layer.lengths), layer.slots) for layer in self._layers]
        self._ids, self._replay = kept(ids.clone)(), None
        try:
            with current(ids.device):
                self._replay, self._logits = self._recorder(self._run)
            self.recordings += 1
        except RuntimeError as error:
            self._give_up(f"recording failed ({str(error).strip().splitlines()[0]})")
        for layer, (lengths, slots) in zip(self._layers, counts, strict=True):  # nothing was stored
            layer.lengths, layer.slots, layer._handed_on = lengths, slots, False
        return self._replay is not None

    def _run(self) -> Tensor:
        with self._layers[0].checked.trusting():
            output = self._original(input_ids=self._ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits

    def _recount(self) -> None:
        for layer in self._layers:
            layer.recount()

    def settle(self) -> None:
        """Drop the recording, and take over what the device has counted; waits for it.

        Raises RuntimeError if a token found no room, which would be a bug here.
        """
        if self._replay is None:
            return
        self._replay, self._left = None, 0
        self._recount()
        for layer in self._layers:
            for packed in layer.packed.values():
                for page in packed.pages:
                    if page.room is not None:
                        page.room.fixed = False  # no graph relies on it any more


def obstacle(model: PreTrainedModel, cache: PackedCache, backend: Backend | None = None) -> str | None:
    """Why decode steps over a filled cache cannot be recorded; None if they can."""
    device = input_device(model)
    if device.type != "cuda":
        return f"the model is on {device}, graphs are recorded on CUDA devices"
    if {parameter.device for parameter in model.parameters()} != {device}:
        return "the model is spread over devices"
    layers = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
    if len(layers) < len(cache.layers):
        return f"{len(cache.layers) - len(layers)} of {len(cache.layers)} layers are not packed (sliding windows, or no quantizers)"
    if any(not runs_kernels(backend, layer, device) for layer in layers):
        return "the torch path counts on the host; the Triton kernels do not"
    rotary = decoder(model).rotary_emb
    kinds = list(rotary.rope_type) if isinstance(rotary.rope_type, dict) else [None]
    if any(Rope(rotary, kind).length_dependent for kind in kinds):
        return "the rotary embedding's frequencies change with the length of the text"
    return None
