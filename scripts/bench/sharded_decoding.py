"""A model spread over devices decodes from a long packed cache: tokens, speed, and the bytes of each device.

The cache is read from a prompt (`prefill`), or filled with valid random blocks (`synthetic`), since reading ten million
tokens would take days. What is decoded then is real either way: every token goes through all layers on all devices and
attends to everything cached.

    held   weights and cache, when the last token was decoded
    peak   the most that was allocated while decoding

On CUDA both are the allocator's; elsewhere the tensors are counted by where their layer belongs, and there is no peak.
`predicted` is what `deployment.plan` adds up: weights, cache, and for the peak the activations of one token.
"""

import gc
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.layer import PackedLayer
from deployment.measure.filled import fill_with_blocks, synthetic_artefact
from deployment.measure.shapes import ModelShape
from deployment.measure.synthetic import Shape
from deployment.step.dispatch import runs_kernels
from deployment.step.graphed import graphed
from gradients.cli import UserError
from gradients.models import cached_layers, decoder, decoder_config
from gradients.placement import input_device, module_device
from quant.artefact import Quantizers
from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS
from scripts.bench.random_model import random_model, spread

Filled = Literal["synthetic", "prefill"]
WARM_UP = 2  # first tokens that are decoded and not timed: kernels are compiled, rotary tables made


@dataclass(frozen=True)
class Request:
    """What is to be decoded."""

    scheme: Scheme
    context: int  # tokens that are cached before the first new one
    new_tokens: int
    filled: Filled = "synthetic"
    prefill_chunk: int = 1024
    seed: int = 0
    graph: bool = False  # whether steps are recorded in a CUDA graph, which the first tokens are not timed for either


@dataclass(frozen=True)
class Decoded:
    """What came of it."""

    tokens: list[int]
    seconds: float  # of all tokens but the first `WARM_UP`
    fill_seconds: float
    path: str
    memory: list[dict[str, Any]]  # per device
    replays: int = 0  # of a graph

    @property
    def tokens_per_second(self) -> float:
        """Without the first `WARM_UP`."""
        return (len(self.tokens) - WARM_UP) / self.seconds


def _is_lack_of_memory(error: RuntimeError) -> bool:
    """Whether torch's allocator says so, or Triton or a library that allocates beside it."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        said in str(error) for said in ("out of memory", "ALLOC_FAILED")
    )


def rounded_context(scheme: Scheme, tokens: int) -> int:
    """The sink tokens and as many whole blocks as hold the others."""
    return scheme.sink_tokens + max(1, -(-(tokens - scheme.sink_tokens) // BLOCK_TOKENS)) * BLOCK_TOKENS


def free(devices: Sequence[str]) -> None:
    """Give back what nobody refers to any more."""
    gc.collect()
    if all_on_cuda(devices):
        torch.cuda.empty_cache()


def all_on_cuda(devices: Sequence[str]) -> bool:
    """Whether an allocator counts what lies on them."""
    return all(torch.device(device).type == "cuda" for device in devices if device != "disk")


class Sharded:
    """A random model of a config, spread evenly over devices. Raises `UserError` as `random_model` does."""

    def __init__(
        self, config: PreTrainedConfig, devices: Sequence[str], seed: int = 0, folder: str | None = None
    ) -> None:
        if len(cached_layers(config)) < decoder_config(config).num_hidden_layers:
            raise UserError("a model with sliding windows has layers without a packed cache; take another shape")
        self.config, self.devices, self.layers = config, list(devices), spread(config, devices)
        self.model: PreTrainedModel = random_model(config, devices, seed=seed, folder=folder)

    @property
    def on_cuda(self) -> bool:
        """Whether an allocator counts."""
        return all_on_cuda(self.devices)

    @cached_property
    def _shape(self) -> ModelShape:
        return ModelShape.of(self.config)

    @property
    def _heads(self) -> Shape:
        return Shape.of(self.config)

    def decode(self, request: Request, limit: int | None = None) -> Decoded | None:
        """Fill a cache, decode greedily; None when a device's memory, or `limit` bytes of it, is not enough.

        What CUDA may allocate is limited by the caller; elsewhere `limit` is compared with the bytes counted.
        """
        decoded = None
        try:
            decoded = self._decode(request, limit)
        except RuntimeError as error:
            if not _is_lack_of_memory(error):
                raise
        free(self.devices)
        return decoded

    @torch.inference_mode()
    def _decode(self, request: Request, limit: int | None) -> Decoded:
        started = time.perf_counter()
        cache = self._cache(request)
        with packed_attention(self.model, graphs=False):  # several GPUs cannot have them, and one is to be like them
            begin = self._read if request.filled == "prefill" else self._fill
            token = begin(request, cache)
            self._synchronise()
            fill_seconds = time.perf_counter() - started
            if self.on_cuda:
                for device in self.devices:
                    torch.cuda.reset_peak_memory_stats(device)
            with graphed(self.model, cache, request.new_tokens) if request.graph else nullcontext() as steps:
                tokens, seconds = self._continue(cache, token, request.new_tokens)
        memory = self._memory(request, cache)
        if not self.on_cuda and limit is not None and max(row["held"] for row in memory) > limit:
            raise torch.OutOfMemoryError(f"more than {limit} bytes")
        first = cache.layers[0]
        path = "triton" if runs_kernels(None, first, first.device) else "torch"
        return Decoded(tokens, seconds, fill_seconds, path, memory, 0 if steps is None else steps.replays)

    def _cache(self, request: Request) -> PackedCache:
        quantizers = self._quantizers(request.scheme)
        return PackedCache(quantizers, self.config, capacity=request.context + request.new_tokens)

    def _quantizers(self, scheme: Scheme) -> Quantizers:
        return synthetic_artefact(scheme, self.config)

    def _fill(self, request: Request, cache: PackedCache) -> int:
        """Fill the cache with blocks; returns the token to go on with."""
        blocks = (request.context - request.scheme.sink_tokens) // BLOCK_TOKENS
        for number, layer in enumerate(cache.layers):
            assert isinstance(layer, PackedLayer)
            device = module_device(decoder(self.model).layers[number])
            fill_with_blocks(layer, self._heads, blocks, device, request.seed + number)
        return 1

    def _read(self, request: Request, cache: PackedCache) -> int:
        """Read a prompt of random tokens; returns the first new one."""
        drawn = torch.Generator().manual_seed(request.seed)
        prompt = torch.randint(decoder_config(self.config).vocab_size, (1, request.context), generator=drawn)
        for part in prompt.to(input_device(self.model)).split(request.prefill_chunk, dim=1):
            logits = self.model(input_ids=part, past_key_values=cache, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def _continue(self, cache: PackedCache, token: int, count: int) -> tuple[list[int], float]:
        """(`count` greedily decoded tokens after `token`, seconds of all but the first)."""
        device, tokens, started = input_device(self.model), [], 0.0
        for number in range(count):
            if number == WARM_UP:
                started = time.perf_counter()
            ids = torch.tensor([[token]], device=device)
            token = int(
                self.model(input_ids=ids, past_key_values=cache).logits[0, -1].argmax()
            )  # waits for all devices
            tokens.append(token)
        return tokens, time.perf_counter() - started

    def _synchronise(self) -> None:
        if self.on_cuda:
            for device in self.devices:
                torch.cuda.synchronize(device)

    def _memory(self, request: Request, cache: PackedCache) -> list[dict[str, Any]]:
        """Bytes of every device, measured and predicted."""
        rows = []
        predicted = self.predicted(request.scheme, request.context + request.new_tokens)
        activations = self._shape.activation_bytes(request.scheme, 1)
        for number, device in enumerate(self.devices):
            row: dict[str, Any] = {"device": device, "predicted_held": predicted[number]}
            if self.on_cuda:
                row |= {"name": torch.cuda.get_device_name(device), "held": torch.cuda.memory_allocated(device)}
                row |= {"peak": torch.cuda.max_memory_allocated(device)}
                row |= {"predicted_peak": predicted[number] + activations}
            else:
                row["held"] = self._counted(number, cache)
            row["held_off_percent"] = round(100 * (row["held"] / row["predicted_held"] - 1), 3)
            rows.append(row)
        return rows

    def _counted(self, number: int, cache: PackedCache) -> int:
        """Bytes of the weights and cached tensors that belong to a device."""
        text = decoder(self.model)
        modules = [layer for layer, place in zip(text.layers, self.layers, strict=True) if place == number]
        head = self.model.get_output_embeddings()
        tied = decoder_config(self.config).tie_word_embeddings
        modules += [text.embed_tokens] * (number == 0)
        modules += [text.norm, *([] if tied else [head])] * (number == len(self.devices) - 1)
        weights = sum(parameter.nbytes for module in modules for parameter in module.parameters())
        layers = [layer for layer, place in zip(cache.layers, self.layers, strict=True) if place == number]
        return weights + sum(tensor.nbytes for layer in layers for tensor in layer.tensors())

    def predicted(self, scheme: Scheme, tokens: int) -> list[int]:
        """Weights and the cache of `tokens` on each device, as `deployment.plan` counts them."""
        places = [0, *self.layers, len(self.devices) - 1]
        held = [0] * len(self.devices)
        for place, size in zip(places, self._shape.pieces(scheme, tokens, 16), strict=True):
            held[place] += size
        return held
