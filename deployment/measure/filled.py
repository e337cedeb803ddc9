"""Packed caches of synthetic tokens for any model, full from the start: for measuring.

Nothing that is timed depends on the numbers, but for the share of outliers, which is as the scheme says
(synthetic.py). One layer is filled by the append path itself, with random keys and values, chunk by chunk; the others
get copies of its bytes, so that a million tokens take seconds. Rows of such caches say `"filled": "synthetic"`.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from deployment.cache import PackedCache
from deployment.format.page import Page
from deployment.layer import PackedLayer
from deployment.measure.synthetic import Shape, store, synthetic_quantizers
from gradients.fingerprint import Fingerprint
from gradients.models import KINDS, cached_layers, kv_shape
from quant.artefact import Quantizers
from quant.scheme import Scheme

_CHUNK = 4096  # tokens stored at a time


def synthetic_artefact(scheme: Scheme, config: PreTrainedConfig) -> Quantizers:
    """What fitting standard normal keys and values would give, for every cached layer."""
    sides = dict(zip(KINDS, synthetic_quantizers(scheme, Shape.of(config)), strict=True))
    return Quantizers(
        scheme=scheme,
        fingerprint=Fingerprint.of(config),
        records_digest="synthetic",
        layers={layer: dict(sides) for layer in cached_layers(config)},
    )


def filled_cache(
    quantizers: Quantizers, config: PreTrainedConfig, tokens: int, capacity: int, device: torch.device, batch: int = 1
) -> PackedCache:
    """A cache that holds `tokens` tokens of `batch` sequences, and has room for `capacity`.

    Raises `UserError` when all of the model's layers are not packed.
    """
    cache = PackedCache(quantizers, config, capacity)
    layers = [layer for layer in cache.layers if isinstance(layer, PackedLayer)]
    fill(layers[0], *kv_shape(config), tokens, device, batch)
    for layer in layers[1:]:
        copy_filling(layers[0], layer)
    return cache


def fill(layer: PackedLayer, heads: int, head_dim: int, tokens: int, device: torch.device, batch: int = 1) -> None:
    """Append `tokens` random tokens to an empty layer, and leave no more room for outliers than need be."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(new: int) -> Tensor:
        return torch.randn(batch, heads, new, head_dim, generator=generator, device=device).half()

    layer.lazy_initialization(drawn(1), drawn(1))
    for begin in range(0, tokens, _CHUNK):
        key, value = (drawn(min(_CHUNK, tokens - begin)) for _ in KINDS)
        store(layer, key, value)
    for packed in layer.packed.values():
        for page in packed.pages:
            if page.outliers is not None:
                page.outliers = page.outliers.moved(page.outliers.counts().flatten().cpu())
                page.room = None


def copy_filling(source: PackedLayer, layer: PackedLayer) -> None:
    """Let an empty layer hold what another one does, in memory of its own."""
    device, (batch, heads, _, head_dim) = source.device, source.sinks["key"].shape
    nothing = torch.empty(batch, heads, 0, head_dim, dtype=torch.float16, device=device)
    layer.lazy_initialization(nothing, nothing)
    for kind in KINDS:
        layer.sinks[kind] = source.sinks[kind].clone()
        layer.packed[kind].pages = [_copied(page) for page in source.packed[kind].pages]
    if source.window is not None:
        layer.window = source.window.of_recent({kind: x.clone() for kind, x in source.window.recent.items()})
    layer.stored, layer.lengths, layer.slots = source.stored.clone(), list(source.lengths), source.slots


def _copied(page: Page) -> Page:
    outliers, scales = page.outliers, page.scales
    if outliers is not None:
        starts = None if outliers.starts is None else outliers.starts.clone()
        outliers = type(outliers)(outliers.index.clone(), outliers.value.clone(), outliers.ends.clone(), starts)
    return Page(page.start, page.blocks, page.words.clone(), None if scales is None else scales.clone(), outliers)
