"""A forward recorded in a CUDA graph: how, what prevents it, and what of the model it takes for granted."""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from itertools import chain
from operator import is_
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployment.cache import PackedCache
from deployment.kernels.scratch import LONG
from deployment.layer import PackedLayer
from deployment.rope import Rope
from deployment.step.asked import Backend
from deployment.step.dispatch import runs_kernels
from gradients.models import decoder
from gradients.placement import input_device

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]

_HARMLESS = ("deployment.step.entered", "transformers.utils.output_capturing")  # whose hooks do nothing during a step
_one_at_a_time = threading.Lock()  # torch has one stream for it
_KNOWN = {
    "input_ids",
    "past_key_values",
    "attention_mask",
    "position_ids",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """(what repeats `run` on the current CUDA device, the tensor that its result is in after each repetition).

    `run` must have run before, must not wait for the device, and reads and writes the same tensors every time.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with _one_at_a_time:
        try:
            # relaxed: a kernel that is loaded only now would be an error otherwise
            with torch.cuda.graph(graph, capture_error_mode="relaxed"):
                output = run()
        except BaseException:
            _put_back(stream)
            raise
    return graph.replay, output


def _put_back(stream: torch.cuda.Stream) -> None:
    """After a recording that failed: torch leaves its own stream current, and its generator waiting for the graph's end."""
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(generator.clone_state())


class Pieces(Protocol):
    """Records pieces of what a program does, one after another; between them it does as it pleases."""

    def begin(self) -> None:
        """From here on nothing is done but recorded."""

    def end(self) -> Callable[[], object]:
        """What does what was recorded since. It may use the memory of pieces before it, so all are repeated in order."""

    def abandon(self) -> None:
        """Drop what was begun, after a failure."""


class GraphPieces:
    """`Pieces` in CUDA graphs of the current device that share their memory."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._pool, self._stream = torch.cuda.graph_pool_handle(), _recording_stream(torch.cuda.current_device())
        self._before = torch.cuda.current_stream()
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        """As `Pieces`."""
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.set_stream(self._stream)
        self._graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")

    def end(self) -> Callable[[], object]:
        """As `Pieces`."""
        graph, self._graph = self._graph, None
        assert graph is not None
        graph.capture_end()
        torch.cuda.set_stream(self._before)
        return graph.replay

    def abandon(self) -> None:
        """As `Pieces`."""
        graph, self._graph = self._graph, None
        if graph is not None:
            with suppress(RuntimeError):  # of what has failed already
                graph.capture_end()
        _put_back(self._before)


@cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """One for all recordings: libraries keep memory for each stream they were used on."""
    return torch.cuda.Stream(device)


def wants_logits_only(model: PreTrainedModel, arguments: int, options: Mapping[str, Any]) -> bool:
    """Whether a forward of so many positional arguments asks for nothing that a replay cannot give, gradients among it."""
    mask, positions = options.get("attention_mask"), options.get("position_ids")
    if arguments > 1 or (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())):
        return False
    if mask is not None and (mask.ndim != 2 or mask.is_floating_point()):
        return False
    if options.get("use_cache") is False or options.get("return_dict") is False:
        return False
    if positions is not None and positions.ndim != 2:
        return False
    if not isinstance(options.get("logits_to_keep"), int | None):
        return False
    config = model.config  # what it says counts where an argument does not
    if config.output_hidden_states or config.output_attentions or not getattr(config, "return_dict", True):
        return False
    return {name for name, value in options.items() if value is not None and value is not False} <= _KNOWN


def obstacle(model: PreTrainedModel, cache: PackedCache, backend: Backend | None = None) -> str | None:
    """Why decode steps over a filled cache cannot be recorded; None if they can."""
    device = input_device(model)
    if device.type != "cuda":
        return f"the model is on {device}, graphs are recorded on CUDA devices"
    if {parameter.device for parameter in model.parameters()} != {device}:
        return "the model is spread over devices"
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        return "the model has adapters, which may be switched between two steps"
    if foreign_hooks(model):
        return "modules of the model have hooks, which a recording would not call"
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


def unpacked(cache: PackedCache) -> str | None:
    """Why even few tokens at once are attended to as the host counts them, a stretch of unpacked tokens at a time; None if they are not.

    This is so for long caches whose codes decode.cu does not read (prefill.py).
    """
    from deployment.kernels.decode.host import reads_codes

    layer = cache.layers[0]
    if not isinstance(layer, PackedLayer) or not layer.packed or layer.residual_tokens:
        return None
    key, value = layer.packed["key"], layer.packed["value"]
    if reads_codes(key, value) or min(layer.lengths) * key.heads * key.head_dim < LONG:
        return None
    return f"codes of {key.quantizer.scheme.describe()} are unpacked before they are attended to, where the host counts them"


def foreign_hooks(model: nn.Module) -> bool:
    """Whether hooks of others are on the model's modules; those of the model itself are called around a replay too."""
    hooks = (
        hook
        for module in model.modules()
        if module is not model
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )
    return any(getattr(hook, "__module__", None) not in _HARMLESS for hook in hooks)


class Assumed:
    """What a recording takes for granted of a model, cheap enough to be looked at with every step.

    Its tensors are where they were, no module has got or lost a hook, and it is not trained or run in another precision.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._model = model
        self._held = [held for module in modules for held in (module._parameters, module._buffers) if held]
        self._hooks = [hooks for module in modules[1:] for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._tensors = self._tensors_now()
        self._plain = [tensor for tensor in self._tensors if tensor is not None]
        self._hooked, self._then = self._hooked_now(), self._now()

    def _tensors_now(self) -> list[Tensor | None]:
        return list(chain.from_iterable(held.values() for held in self._held))

    def _hooked_now(self) -> int:
        return sum(map(len, self._hooks))

    def _now(self) -> tuple[object, ...]:
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return list(map(Tensor.data_ptr, self._plain)), self._model.training, precision

    @property
    def in_place(self) -> bool:
        """Whether what a replay reads is there: no tensor has gone to another place. The model computes as it did, too."""
        return self._now() == self._then

    @property
    def unchanged(self) -> bool:
        """Whether modules have the tensors and hooks that they had; others would not be heard of in a replay.

        It may be asked behind one: the old tensors are kept.
        """
        tensors = self._tensors_now()  # not to be compared by value
        same = len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))
        return same and self._hooked_now() == self._hooked

    @property
    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return self.in_place and self.unchanged
