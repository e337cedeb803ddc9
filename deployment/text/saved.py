"""A packed cache as a file, so that a long document is read once and continued from as often as one likes.

Tensors: `tokens` `[B, n]` and `lengths` `[B]`; per packed layer and kind `layers.{i}.{key|value}.{sinks,words,scales,
index,value,ends}`, as `layout.py` and `streams.py` name them, one page exactly as long as needed; with a recent window
`layers.{i}.{key|value}.recent` `[B, G, N + 1, D]` of the model's dtype (window.py), and `coded` `[B]`, how many tokens are
packed, sinks included; for a sliding-window layer what it still holds, `layers.{i}.native.{key|value}`. Metadata, one JSON object: schema version, the model's
fingerprint, the scheme and the digest of the quantizers, a checksum per tensor, a conversation's messages. Nothing is ever
unpickled. A cache belongs to one model, its weights included, and to one set of quantizers.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from deployment.cache import PackedCache
from deployment.layer import PackedLayer
from deployment.text.pages import one_page, pages_of
from gradients.checked import (
    Artefact,
    CheckedFile,
    Expected,
    bytes_checksum,
    canonical_json,
    open_checked,
    require_own_place,
    write_checked,
)
from gradients.cli import UserError
from gradients.fingerprint import Fingerprint
from gradients.models import KINDS, decoder, kv_shape
from gradients.placement import module_device
from gradients.weights import weights_digest
from quant.artefact import Quantizers
from quant.quantizer import Quantizer
from quant.storage import BLOCK_TOKENS

# to be raised whenever order.py, groups.py, streams.py or the meaning of any tensor here changes; 1 had another order of codes
SCHEMA = 2
FILE = Artefact("cache", "kvquant_cache", SCHEMA, "read the text again with --save-cache")
Messages = list[dict[str, str]]

_PARTS = {
    "words": Expected((-1, -1, -1), torch.int32),
    "scales": Expected((-1, -1, 2), torch.float16),
    "index": Expected((-1,), torch.int16),
    "value": Expected((-1,), torch.float16),
    "ends": Expected((-1, -1, -1), torch.int32),
}


def quantizers_digest(quantizers: Quantizers) -> str:
    """Identity of quantizers: their schemes and every number in their tables, not the versions that wrote them."""
    content = {
        f"layers.{layer}.{kind}": _identity(quantizer)
        for layer, sides in quantizers.layers.items()
        for kind, quantizer in sides.items()
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]


def _identity(quantizer: Quantizer) -> list[Any]:
    tables = {name: bytes_checksum(table.cpu()) for name, table in quantizer.tables.items()}
    return [quantizer.scheme.to_json(), tables]


def save_cache(
    path: str | Path,
    cache: PackedCache,
    quantizers: Quantizers,
    model: PreTrainedModel,
    tokens: Tensor,
    messages: Messages | None = None,
) -> None:
    """Write a filled cache atomically.

    `tokens` `[B, n]` int64 are the text: those cached, left padding included, and any that come next. Raises
    `UserError` where another file is, for an empty cache, one that was not made with `quantizers`, one of another number of rows or of more tokens than the text,
    and one with a layer that is neither packed nor a sliding window. A recent window that
    the cache was given beside `quantizers` is asked for again when the file is read: `quantizers.with_exact`.
    """
    quantizers = quantizers.with_exact(residual_tokens=cache.residual_tokens)
    require_own_place(path, FILE)
    _check_saved(str(path), cache, quantizers, tokens)
    tensors = {"tokens": tokens.cpu().contiguous()}
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, PackedLayer):
            tensors["lengths"] = torch.tensor(layer.lengths)
            if layer.window is not None:
                tensors["coded"] = torch.tensor(layer.coded)
            tokens_packed = max(0, *layer.coded) - layer.sink_tokens
            parts = {
                f"{kind}.{name}": part
                for kind in KINDS
                for name, part in {
                    "sinks": layer.sinks[kind],
                    **({} if layer.window is None else {"recent": layer.window.recent[kind]}),
                    **one_page(layer.packed[kind], -(-max(0, tokens_packed) // BLOCK_TOKENS)),
                }.items()
            }
        elif isinstance(layer, DynamicSlidingWindowLayer):
            parts = {"native.key": layer.keys, "native.value": layer.values}
        else:
            kind_of = type(layer).__name__
            raise UserError(f"layer {number} is a {kind_of}; only packed and sliding-window layers are saved")
        tensors |= {f"layers.{number}.{name}": part.cpu().contiguous() for name, part in parts.items()}
    content = {
        "fingerprint": Fingerprint.of(model.config).to_json(),
        "weights": weights_digest(model),
        "scheme": quantizers.scheme.describe(),
        "quantizers": quantizers_digest(quantizers),
        "slots": cache.get_seq_length(),
        "messages": messages,
    }
    write_checked(path, FILE, content, tensors)


def _check_saved(name: str, cache: PackedCache, quantizers: Quantizers, tokens: Tensor) -> None:
    """Raise `UserError` for what no `load_cache` would take, or would take for something else."""
    slots = cache.get_seq_length()
    if not slots:
        raise UserError(f"cache for {name!r} is empty: nothing was read yet; save it after a prompt of 2 tokens")
    packed = {number: layer for number, layer in enumerate(cache.layers) if isinstance(layer, PackedLayer)}
    rows = max((len(layer.lengths) for layer in packed.values()), default=len(tokens))
    if tokens.dtype != torch.int64 or tokens.ndim != 2 or len(tokens) != rows or tokens.shape[1] < slots:
        raise UserError(
            f"cache for {name!r} holds {rows} x {slots} tokens, the text is {list(tokens.shape)} {tokens.dtype}; give "
            f"the int64 ids of all that was read, [{rows}, {slots}] or longer"
        )
    for number, layer in packed.items():
        for kind, made_with in layer.quantizers.items():
            given = quantizers.layers[number][kind]
            sinks = layer.sink_tokens != quantizers.scheme.sink_tokens
            if sinks or (made_with is not given and _identity(made_with) != _identity(given)):
                raise UserError(
                    f"cache for {name!r} was packed with other quantizers ({made_with.scheme.describe()}, {layer.sink_tokens} "
                    f"sinks) than those given ({quantizers.scheme.describe()}); give those that it was made with"
                )


@dataclass(frozen=True)
class SavedCache:
    """What a file holds, checked, on the CPU."""

    tokens: Tensor  # [B, n] int64, the text, left padding included
    lengths: list[int]  # tokens stored per row
    coded: list[int] | None  # of these, how many are packed, where there is a recent window
    slots: int  # of the n tokens, how many are cached
    messages: Messages | None  # if the text is a conversation
    quantizers: Quantizers
    fingerprint: Fingerprint
    weights: str  # digest of the model's
    tensors: dict[str, Tensor]
    name: str

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise `UserError` unless the cache was made with a model of this config and these weights."""
        difference = self.fingerprint.difference(Fingerprint.of(model.config))
        if not difference and self.weights != (present := weights_digest(model)):
            difference = f"other weights, digest {self.weights} against {present}"
        if difference:
            raise UserError(
                f"cache {self.name!r} was made with another model: {difference}; give --model that one, or read again"
            )

    @property
    def attention_mask(self) -> Tensor:
        """Which tokens are no padding, `[B, n]` int64."""
        padding = self.slots - torch.tensor(self.lengths)
        return (torch.arange(self.tokens.shape[1]) >= padding[:, None]).long()

    def restore(self, model: PreTrainedModel, capacity: int | None = None, exact_chunk: bool = True) -> PackedCache:
        """The cache, on the devices of the model's layers, what is exact in its dtype; the arguments are those of `PackedCache`.

        Raises `UserError` when tensors are missing or do not fit the quantizers.
        """
        cache = PackedCache(self.quantizers, model.config, capacity, exact_chunk)
        for number, layer in enumerate(cache.layers):
            device = module_device(decoder(model).layers[number])
            prefix = f"layers.{number}."
            parts = {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}
            try:
                if isinstance(layer, PackedLayer):
                    self._fill(layer, parts, model, device)
                else:
                    key, value = (parts[f"native.{kind}"].to(device, model.dtype) for kind in KINDS)
                    layer.lazy_initialization(key, value)
                    layer.keys, layer.values, layer.cumulative_length = key, value, self.slots
            except (KeyError, ValueError, IndexError, RuntimeError) as error:
                raise UserError(
                    f"cache {self.name!r}: layer {number} is damaged ({error!r}); read the text again with --save-cache"
                ) from error
        return cache

    def _fill(self, layer: PackedLayer, parts: dict[str, Tensor], model: PreTrainedModel, device: torch.device) -> None:
        heads, dim = kv_shape(model.config)
        capacity, layer.capacity = layer.capacity, None  # the page below has the room
        layer.lazy_initialization(*[torch.empty(len(self.lengths), heads, 0, dim, device=device)] * 2)
        layer.capacity = capacity
        for kind, packed in layer.packed.items():
            layer.sinks[kind].copy_(parts[f"{kind}.sinks"])
            own = {name.removeprefix(f"{kind}."): t for name, t in parts.items() if name.startswith(f"{kind}.")}
            packed.pages = pages_of(packed, own, (capacity or 0) - layer.sink_tokens - layer.residual_tokens)
        if layer.window is not None:
            recent = {kind: parts[f"{kind}.recent"].to(device, model.dtype) for kind in KINDS}
            if any(x.shape != layer.window.recent[kind].shape for kind, x in recent.items()) or self.coded is None:
                raise ValueError(f"a recent window of {tuple(recent['key'].shape)}")
            layer.window = layer.window.of_recent(recent, list(self.coded))
        layer.slots, layer.lengths = self.slots, list(self.lengths)
        layer.stored = torch.tensor(self.lengths, device=device)


def load_cache(path: str | Path, quantizers: Quantizers, model: PreTrainedModel) -> SavedCache:
    """Read what `save_cache` wrote, for a model. Raises what `read_cache` and `SavedCache.check_model` do."""
    saved = read_cache(path, quantizers)
    saved.check_model(model)
    return saved


def read_cache(path: str | Path, quantizers: Quantizers) -> SavedCache:
    """Read what `save_cache` wrote; `SavedCache.check_model` says whether a model may go on with it.

    Raises `UserError` when the file is missing, not safetensors, truncated, altered or of another schema, when what it
    says cannot be, and when it was made with other quantizers.
    """
    with open_checked(path, FILE) as file:
        content = file.content
        if not file.has_digest:
            raise file.error("is of an older version, whose codes lie in another order")
        fingerprint = Fingerprint.from_json(content["fingerprint"])
        weights = content["weights"]
        if not isinstance(weights, str):
            raise file.error(f"is damaged (weights {weights!r:.40} are no digest)")
        _check_quantizers(str(path), content, quantizers)
        tensors = _read_tensors(file, fingerprint)
        tokens, lengths = tensors.pop("tokens"), tensors.pop("lengths").tolist()
        coded = tensors.pop("coded").tolist() if "coded" in tensors else None
        _check_sizes(file, tokens, lengths, coded)
        messages = content["messages"]
        if messages is not None and not _are_messages(messages):
            raise file.error(f"is damaged (messages {messages!r:.40} are no conversation)")
    return SavedCache(
        tokens, lengths, coded, content["slots"], messages, quantizers, fingerprint, weights, tensors, str(path)
    )


def _read_tensors(file: CheckedFile, fingerprint: Fingerprint) -> dict[str, Tensor]:
    """All tensors of the file, each of the dtype and the number of dimensions that its name stands for."""
    expected = {}
    for name in file.names():
        part = name.rpartition(".")[2]
        if name in ("tokens", "lengths", "coded"):
            expected[name] = Expected((-1, -1) if name == "tokens" else (-1,), torch.int64)
        elif part in _PARTS and ".native." not in name:
            expected[name] = _PARTS[part]
        else:  # sinks are fp16, what a window holds is of the model's dtype
            dtypes = (
                [torch.float16] if part == "sinks" else [torch.float32, torch.bfloat16, torch.float16, torch.float64]
            )
            shapes = [Expected((-1, fingerprint.heads, -1, fingerprint.head_dim), dtype) for dtype in dtypes]
            expected[name] = next((one for one in shapes if file.is_of(name, one)), shapes[0])
    for needed in {"tokens", "lengths"} - expected.keys():
        raise file.error(f"lacks tensor {needed}")
    checksums = file.content["checksums"]
    if set(checksums) != set(expected):
        raise file.error(f"is damaged (its tensors are not those written: {sorted(set(checksums) ^ set(expected))[0]})")
    return {name: file.read(name, wanted) for name, wanted in expected.items()}


def _check_sizes(file: CheckedFile, tokens: Tensor, lengths: list[int], coded: list[int] | None) -> None:
    """Raise `UserError` when the numbers of rows, tokens and cached tokens contradict each other."""
    slots = file.content["slots"]
    if type(slots) is not int or not 0 < slots <= tokens.shape[1]:
        raise file.error(f"is damaged (slots {slots!r:.40} of {tokens.shape[1]} tokens)")
    if len(lengths) != len(tokens) or not lengths or max(lengths) > slots or min(lengths) < 0:
        raise file.error(f"is damaged (rows of {lengths} tokens, of {slots} in {len(tokens)} rows)")
    if coded is not None and (
        len(coded) != len(lengths) or any(not 0 <= c <= n for c, n in zip(coded, lengths, strict=True))
    ):
        raise file.error(f"is damaged ({coded} tokens are packed, of {lengths})")


def _are_messages(messages: object) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, dict) and all(isinstance(text, str) for text in message.values()) for message in messages
    )


def _check_quantizers(name: str, content: dict[str, Any], quantizers: Quantizers) -> None:
    digest = quantizers_digest(quantizers)
    if content["quantizers"] != digest:
        raise UserError(
            f"cache {name!r} was packed with other quantizers, {content['scheme']} ({content['quantizers']}) and not "
            f"{quantizers.scheme.describe()} ({digest}); give --quantizers the file it was made with, or read the text again"
        )
