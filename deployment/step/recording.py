"""A forward recorded in a CUDA graph: how, what prevents it, and what of the model it takes for granted."""

import threading
from collections.abc import Callable
from itertools import chain
from operator import is_

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployment.cache import PackedCache
from deployment.layer import PackedLayer
from deployment.rope import Rope
from deployment.step.asked import Backend
from deployment.step.dispatch import runs_kernels
from gradients.models import decoder
from gradients.placement import input_device

Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]

_HARMLESS = ("deployment.step.entered", "transformers.utils.output_capturing")  # whose hooks do nothing during a step
_one_at_a_time = threading.Lock()  # torch has one stream for it


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
        except BaseException:  # torch leaves its stream current then, and its generator waiting for the graph's end
            torch.cuda.set_stream(stream)
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            raise
    return graph.replay, output


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
