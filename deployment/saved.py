"""A packed cache as a file, so that a long document is read once and continued from as often as one likes.

Tensors: `tokens` `[B, n]` and `lengths` `[B]`; per packed layer and kind `layers.{i}.{key|value}.{sinks,words,scales,
index,value,ends}`, as `layout.py` and `streams.py` name them, one page exactly as long as needed; for a sliding-window
layer what it still holds, `layers.{i}.native.{key|value}`. Metadata, one JSON object: schema version, the model's
fingerprint, the scheme and the digest of the quantizers, a checksum per tensor, a conversation's messages. Nothing is ever
unpickled. As for quantizers, the weights themselves are not compared: a config and quantizers are.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from deployment.cache import PackedCache, PackedLayer
from deployment.pages import one_page, pages_of
from gradients.atomic import atomic_write
from gradients.cli import UserError
from gradients.fingerprint import Fingerprint, canonical_json
from gradients.models import KINDS, decoder, kv_shape
from gradients.placement import module_device
from gradients.records import checksum
from quant.artefact import Quantizers
from quant.storage import BLOCK_TOKENS

SCHEMA = 2  # to be raised whenever order.py, streams.py or the meaning of any tensor here changes
Messages = list[dict[str, str]]


def quantizers_digest(quantizers: Quantizers) -> str:
    """Identity of quantizers: their schemes and every number in their tables, not the versions that wrote them."""
    content = {
        f"layers.{layer}.{kind}": [
            quantizer.scheme.to_json(),
            {name: checksum(table.cpu()) for name, table in quantizer.tables.items()},
        ]
        for layer, sides in quantizers.layers.items()
        for kind, quantizer in sides.items()
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]


def save_cache(
    path: str | Path,
    cache: PackedCache,
    quantizers: Quantizers,
    config: PreTrainedConfig,
    tokens: Tensor,
    messages: Messages | None = None,
) -> None:
    """Write a filled cache atomically.

    `tokens` `[B, n]` int64 are the text: those cached, left padding included, and any that come next. Raises
    `UserError` for an empty cache, and for one with a layer that is neither packed nor a sliding window.
    """
    tensors = {"tokens": tokens.cpu().contiguous()}
    for number, layer in enumerate(cache.layers):
        if not layer.is_initialized:
            raise UserError(
                f"cache for {str(path)!r} is empty: nothing was read yet; save it after a prompt of 2 tokens"
            )
        if isinstance(layer, PackedLayer):
            tensors["lengths"] = torch.tensor(layer.lengths)
            tokens_packed = max(0, *layer.lengths) - layer.sink_tokens
            parts = {
                f"{kind}.{name}": part
                for kind in KINDS
                for name, part in {
                    "sinks": layer.sinks[kind],
                    **one_page(layer.packed[kind], -(-max(0, tokens_packed) // BLOCK_TOKENS)),
                }.items()
            }
        elif isinstance(layer, DynamicSlidingWindowLayer):
            parts = {"native.key": layer.keys, "native.value": layer.values}
        else:
            raise UserError(
                f"layer {number} is a {type(layer).__name__}; only packed and sliding-window layers are saved"
            )
        tensors |= {f"layers.{number}.{name}": part.cpu().contiguous() for name, part in parts.items()}
    content = {
        "schema": SCHEMA,
        "fingerprint": Fingerprint.of(config).to_json(),
        "scheme": quantizers.scheme.describe(),
        "quantizers": quantizers_digest(quantizers),
        "slots": cache.get_seq_length(),
        "messages": messages,
        "checksums": {name: checksum(tensor) for name, tensor in tensors.items()},
    }
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"kvquant_cache": canonical_json(content)})


@dataclass(frozen=True)
class SavedCache:
    """What a file holds, checked, on the CPU."""

    tokens: Tensor  # [B, n] int64, the text, left padding included
    lengths: list[int]  # tokens stored per row
    slots: int  # of the n tokens, how many are cached
    messages: Messages | None  # if the text is a conversation
    quantizers: Quantizers
    tensors: dict[str, Tensor]
    name: str

    @property
    def attention_mask(self) -> Tensor:
        """Which tokens are no padding, `[B, n]` int64."""
        padding = self.slots - torch.tensor(self.lengths)
        return (torch.arange(self.tokens.shape[1]) >= padding[:, None]).long()

    def restore(self, model: PreTrainedModel, capacity: int | None = None, exact_chunk: bool = True) -> PackedCache:
        """The cache, on the devices of the model's layers; the arguments are those of `PackedCache`.

        Raises `UserError` when tensors are missing or do not fit the quantizers.
        """
        cache = PackedCache(self.quantizers, model.config, capacity, exact_chunk)
        for number, layer in enumerate(cache.layers):
            device = module_device(decoder(model).layers[number])
            prefix = f"layers.{number}."
            parts = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
            try:
                if isinstance(layer, PackedLayer):
                    self._fill(layer, parts, model.config, device)
                else:
                    key, value = parts["native.key"].to(device), parts["native.value"].to(device)
                    layer.lazy_initialization(key, value)
                    layer.keys, layer.values, layer.cumulative_length = key, value, self.slots
            except (KeyError, ValueError, IndexError, RuntimeError) as error:
                raise UserError(
                    f"cache {self.name!r}: layer {number} is damaged ({error!r}); read the text again with --save-cache"
                ) from error
        return cache

    def _fill(
        self, layer: PackedLayer, parts: dict[str, Tensor], config: PreTrainedConfig, device: torch.device
    ) -> None:
        heads, dim = kv_shape(config)
        capacity, layer.capacity = layer.capacity, None  # the page below has the room
        layer.lazy_initialization(*[torch.empty(len(self.lengths), heads, 0, dim, device=device)] * 2)
        layer.capacity = capacity
        for kind, packed in layer.packed.items():
            layer.sinks[kind].copy_(parts[f"{kind}.sinks"])
            own = {name.removeprefix(f"{kind}."): t for name, t in parts.items() if name.startswith(f"{kind}.")}
            packed.pages = pages_of(packed, own, (capacity or 0) - layer.sink_tokens)
        layer.slots, layer.lengths = self.slots, list(self.lengths)
        layer.stored = torch.tensor(self.lengths, device=device)


def load_cache(path: str | Path, quantizers: Quantizers, config: PreTrainedConfig) -> SavedCache:
    """Read what `save_cache` wrote.

    Raises `UserError` when the file is missing, not safetensors, truncated, altered or of another schema, and when it
    was made with another model or other quantizers.
    """
    name = repr(str(path))
    remedy = "read the text again with --save-cache"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "kvquant_cache" not in metadata:
                raise UserError(f"cache {name} lacks our metadata: some other safetensors file; {remedy}")
            content = json.loads(metadata["kvquant_cache"])
            _check(name, content, quantizers, config)
            tensors = {key: file.get_tensor(key) for key in content["checksums"]}
        for key, tensor in tensors.items():
            if checksum(tensor) != content["checksums"][key]:
                raise UserError(f"cache {name}: tensor {key} was altered after it was written; {remedy}")
        tokens, lengths = tensors.pop("tokens"), tensors.pop("lengths").tolist()
        return SavedCache(tokens, lengths, content["slots"], content["messages"], quantizers, tensors, str(path))
    except OSError as error:
        raise UserError(f"cache {name} cannot be read ({error}); make it with --save-cache") from error
    except SafetensorError as error:
        raise UserError(f"cache {name} is not a complete safetensors file ({error}); {remedy}") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"cache {name} is damaged ({error!r}); {remedy}") from error


def _check(name: str, content: dict[str, Any], quantizers: Quantizers, config: PreTrainedConfig) -> None:
    if content["schema"] != SCHEMA:
        raise UserError(
            f"cache {name} has schema {content['schema']}, this version reads {SCHEMA}; read the text again with --save-cache"
        )
    difference = Fingerprint.from_json(content["fingerprint"]).difference(Fingerprint.of(config))
    if difference:
        raise UserError(f"cache {name} was made with another model: {difference}; give --model that one, or read again")
    digest = quantizers_digest(quantizers)
    if content["quantizers"] != digest:
        raise UserError(
            f"cache {name} was packed with other quantizers, {content['scheme']} ({content['quantizers']}) and not "
            f"{quantizers.scheme.describe()} ({digest}); give --quantizers the file it was made with, or read the text again"
        )
