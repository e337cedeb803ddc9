"""Caches that are not ours, full from the start: what the packed cache is compared with end to end.

    fp16           a cache of the right size that is written in place, over which SDPA reads exactly the tokens there are:
                   nothing is copied or masked
    fp16-dynamic   transformers' DynamicCache: every step copies the whole cache
    fp16-static    transformers' StaticCache: written in place, attention is masked beyond the end
    hqq4, quanto2  transformers' QuantizedCache with that library and number of bits

Keys and values are random and already rotated, as these caches hold them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, QuantizedCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface

from gradients.cli import UserError
from gradients.models import kv_shape

_PLAIN = "fp16"
IN_PLACE = (_PLAIN, "fp16-static")  # the caches whose tensors stay where they are
_QUANTIZED = re.compile(r"(hqq|quanto)([1-8])")
_ATTENTION = "fp16_in_place"
NAMES = (_PLAIN, "fp16-dynamic", "fp16-static", "hqq4", "hqq2", "quanto4", "quanto2")


class InPlaceLayer(CacheLayerMixin):
    """Keys and values `[B, G, capacity, D]`, of which `length` are there; a recorded graph writes the same place again."""

    is_compileable = False
    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for tokens like these."""
        batch, heads, _, dim = key_states.shape
        self.keys, self.values = (
            states.new_empty(batch, heads, self.capacity, dim) for states in (key_states, value_states)
        )
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write behind the tokens that are there, and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens of past and chunk, offset 0)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        return self.capacity


def attend_in_place(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function of in-place caches: `[B, S, H, D]`, and no weights."""
    heads, new = query.shape[1:3]
    groups, attention = key.shape[1], nn.functional.scaled_dot_product_attention
    # one query sees everything; torch then finds kernels for grouped queries that are faster than one problem per KV head
    causal = None if new == 1 else causal_lower_right(new, key.shape[2])
    output = attention(query, key, value, attn_mask=causal, scale=scaling, enable_gqa=heads != groups)
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(_ATTENTION, attend_in_place)
AttentionMaskInterface.register(_ATTENTION, _no_mask)


@contextmanager
def attending(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Within the block the model attends as the cache of this name wants it."""
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION if name == _PLAIN else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def is_known(name: str) -> bool:
    """Whether `full_cache` makes such a cache."""
    return name in NAMES or _QUANTIZED.fullmatch(name) is not None


def full_cache(name: str, config: PreTrainedConfig, tokens: int, capacity: int, device: torch.device) -> Cache:
    """A cache of one sequence that holds `tokens` tokens.

    Raises ImportError when its library is missing, `UserError` for a name nobody knows.
    """
    cache = _empty(name, config, capacity)
    heads, dim = kv_shape(config)
    generator = torch.Generator(device).manual_seed(0)
    for layer in cache.layers:
        key, value = (
            torch.randn(1, heads, tokens, dim, generator=generator, device=device, dtype=config.dtype) for _ in range(2)
        )
        layer.update(key, value)
    return cache


def _empty(name: str, config: PreTrainedConfig, capacity: int) -> Cache:
    if name == _PLAIN:
        return Cache(layers=[InPlaceLayer(capacity) for _ in range(config.num_hidden_layers)])
    if name == "fp16-dynamic":
        return DynamicCache(config=config)
    if name == "fp16-static":
        return StaticCache(config=config, max_cache_len=capacity)
    return quantized_cache(name, config)


def quantized_cache(name: str, config: PreTrainedConfig) -> QuantizedCache:
    """An empty cache of transformers such as hqq4. Raises ImportError and `UserError` as `full_cache` does."""
    if (match := _QUANTIZED.fullmatch(name)) is None:
        raise UserError(f"cache {name!r} is none of {', '.join(NAMES)}, and no scheme either")
    # per-token groups of 64, the only ones that both libraries take for 4-dimensional keys and values
    axis = 1 if match[1] == "hqq" else 0
    options = {"axis_key": axis, "axis_value": axis, "q_group_size": 64, "residual_length": 128}
    return QuantizedCache(backend=match[1], config=config, nbits=int(match[2]), **options)


def stored_bytes(cache: Cache) -> int:
    """Bytes of every tensor that a cache holds, wherever it keeps them."""
    storages = [tensor.untyped_storage() for layer in cache.layers for tensor in _tensors(vars(layer))]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(thing: Any) -> Iterator[Tensor]:
    if hasattr(thing, "__tensor_flatten__"):  # a tensor made of others, as quanto's
        thing = [getattr(thing, name) for name in thing.__tensor_flatten__()[0]]
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors(part)
