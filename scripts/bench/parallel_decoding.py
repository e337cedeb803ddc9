"""A tensor-parallel model decodes from a long packed cache: what sharded_decoding.py does, in the processes of torchrun.

Every process has a device, an N-th of the heads of all layers, and that part of the cache. Rows are of all devices, and
`deployment.plan --tensor-parallel N` predicts what each of them holds. All processes do the same at the same time, so
whether a context fits is decided together, by what was predicted, before anything is allocated.
"""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from deployment.cache import PackedCache
from deployment.measure.filled import synthetic_artefact
from deployment.measure.shapes import ModelShape
from deployment.measure.synthetic import Shape
from gradients.models import decoder_config
from gradients.parallel import Part, distribution, gathered_heads
from gradients.processes import process_state
from quant.artefact import Quantizers
from quant.parts import own_heads
from quant.scheme import Scheme
from scripts.bench.sharded_decoding import Decoded, Request, Sharded

_APART = 100_000  # seeds between those of two parts
ROOM = 1 << 28  # bytes beside what is predicted: a step's activations, and what allocating in pieces wastes


def own_device() -> str:
    """Of this process."""
    device = process_state().device
    return "cpu" if device.type == "cpu" else str(device)


def everybodys(numbers: list[float], part: Part) -> list[list[float]]:
    """Each number of this process, and of all others beside it."""
    own = torch.tensor(numbers, dtype=torch.float64, device=own_device())[:, None]
    return gathered_heads(own, part, 1).tolist()


@torch.inference_mode(False)
def random_part(
    config: PreTrainedConfig, part: Part, seed: int = 0, dtype: torch.dtype = torch.float16
) -> PreTrainedModel:
    """The part of a frozen model that is this process's, with random weights, made where it computes.

    The weights of two parts are other numbers, but for those that all processes have whole.
    """
    with torch.device("meta"):
        kind: Any = type(AutoModelForCausalLM.from_config(config))
    spread = distribution(decoder_config(config), part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a distributed generator may not be supported: numbers are drawn below
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # every weight is missing, which is meant
        model: PreTrainedModel = kind.from_pretrained(None, config=config, state_dict={}, dtype=dtype, **spread)
        logging.set_verbosity(before)
    std = decoder_config(config).hidden_size ** -0.5
    for number, parameter in enumerate(model.parameters()):
        _draw(parameter, std, seed + number, part)
    return model.eval().requires_grad_(False)


def _draw(parameter: nn.Parameter, std: float, seed: int, part: Part) -> None:
    """As `scripts.bench.random_model` draws them: normal matrices, gains of one."""
    split = hasattr(parameter, "to_local")
    own = (parameter.to_local() if split else parameter).detach()
    if own.ndim > 1:
        drawn = torch.Generator(own.device).manual_seed(seed + (_APART * part.number if split else 0))
        own.normal_(std=std, generator=drawn)
    else:
        own.fill_(1.0)


class Parallel(Sharded):
    """A random model of a config, of which this process has a part. Raises as `distribution` does."""

    def __init__(self, config: PreTrainedConfig, part: Part, seed: int = 0) -> None:
        self.config, self.part, self.devices = config, part, [own_device()]
        self.layers = [0] * decoder_config(config).num_hidden_layers
        self.shape = ModelShape.of(config, part.count)
        self.model = random_part(config, part, seed)

    @property
    def _shape(self) -> ModelShape:  # type: ignore[override]
        return self.shape

    @property
    def _heads(self) -> Shape:
        return Shape.of(self.shape.config)

    def _quantizers(self, scheme: Scheme) -> Quantizers:
        return own_heads(synthetic_artefact(scheme, self.config), self.part)

    def decode(self, request: Request, limit: int | None = None) -> Decoded | None:
        """See `Sharded.decode`; `limit` is the same for all processes, and so is what they return."""
        predicted = self.predicted(request.scheme, request.context + request.new_tokens)[0]
        if limit is not None and predicted + self.shape.activation_bytes(request.scheme, 1) > limit:
            return None
        return self._whole(super().decode(request, None))

    def _fill(self, request: Request, cache: PackedCache) -> int:
        # heads of two parts must not be alike: extremes of a token would be ties, and all fall to the first
        return super()._fill(replace(request, seed=request.seed + _APART * self.part.number), cache)

    def _whole(self, decoded: Decoded | None) -> Decoded:
        if decoded is None:
            raise RuntimeError(f"{self.devices[0]} ran out of memory where {ROOM} bytes more than the plan were free")
        return decoded

    def _memory(self, request: Request, cache: PackedCache) -> list[dict[str, Any]]:
        (own,) = super()._memory(request, cache)
        names = [name for name, value in own.items() if not isinstance(value, str)]
        numbers = everybodys([float(own[name]) for name in names], self.part)
        kind = own["device"].partition(":")[0]
        rows = []
        for process in range(self.part.count):
            device = {"device": kind if kind == "cpu" else f"{kind}:{process}"}
            values = {name: numbers[place][process] for place, name in enumerate(names)}
            whole = {name: value if name.endswith("percent") else int(value) for name, value in values.items()}
            rows.append(own | device | whole)
        return rows

    def _counted(self, number: int, cache: PackedCache) -> int:
        """Bytes of all local weights and cached tensors."""
        weights = {p: p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters()}
        return sum(own.nbytes for own in weights.values()) + cache.nbytes()
