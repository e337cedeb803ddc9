"""Packed caches of synthetic tokens for any model, full from the start: for measuring.

Nothing that is timed depends on the numbers, but for the share of outliers, which is as the scheme says
(synthetic.py). Most blocks repeat a few that were encoded, so that a million tokens take seconds. Rows of such caches
say `"filled": "synthetic"`.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from deployment.cache import PackedCache
from deployment.format.layout import PAGE_BLOCKS, PackedTensor
from deployment.format.room import ROOM_SHARE, ROOM_TOKENS
from deployment.format.streams import OutlierStreams, padded_zeros
from deployment.layer import PackedLayer
from deployment.measure.synthetic import Shape, store, synthetic_quantizers
from deployment.step.append import append
from deployment.step.dispatch import runs_kernels
from gradients.cli import UserError
from gradients.fingerprint import Fingerprint
from gradients.models import KINDS, cached_layers
from quant.artefact import Quantizers
from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS


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
    quantizers: Quantizers, config: PreTrainedConfig, tokens: int, capacity: int, device: torch.device
) -> PackedCache:
    """A cache that holds one sequence of `tokens` tokens, has room for `capacity`, and no more for outliers than need be."""
    cache, shape = PackedCache(quantizers, config, capacity), Shape.of(config)
    blocks, rest = divmod(tokens - quantizers.scheme.exact_tokens, BLOCK_TOKENS)
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, PackedLayer):
            fill_with_blocks(layer, shape, blocks, device, seed=number)
            if rest:
                store(layer, *torch.randn(2, 1, shape.kv_heads, rest, shape.head_dim, device=device).half())
            for page in (page for packed in layer.packed.values() for page in packed.pages):
                if page.outliers is not None:
                    page.outliers, page.room = page.outliers.moved(page.outliers.counts().flatten().cpu()), None
    return cache


def fill_with_blocks(layer: PackedLayer, shape: Shape, blocks: int, device: torch.device, seed: int) -> None:
    """Let an empty layer hold one sequence: random sinks, `blocks` blocks that repeat a few random ones, a random window.

    The few are encoded as any tokens are, so what is stored is valid in every byte, and filling takes no longer than
    writing does. Numbers are drawn on the host, so that all devices hold the same. Raises `UserError` for 2^31 outliers
    or more.
    """
    few = PackedLayer(
        layer.quantizers["key"], layer.quantizers["value"], layer.sink_tokens, rotary_half=layer.rotary_half
    )
    layer.lazy_initialization(*[torch.empty(1, shape.kv_heads, 0, shape.head_dim, device=device)] * 2)
    # outliers' indices repeat with the span
    period = max(PAGE_BLOCKS, *(packed.span // BLOCK_TOKENS for packed in layer.packed.values()))
    drawn = torch.Generator().manual_seed(seed)
    tokens = layer.sink_tokens + period * BLOCK_TOKENS
    key, value = (torch.randn(1, shape.kv_heads, tokens, shape.head_dim, generator=drawn).half() for _ in range(2))
    few.lazy_initialization(key.to(device), value.to(device))
    append(few, key.to(device), value.to(device), [0])
    if layer.window is not None:
        recent = {kind: torch.randn(x.shape, generator=drawn).to(x) for kind, x in layer.window.recent.items()}
        layer.window = layer.window.of_recent(recent)
    for kind, packed in layer.packed.items():
        layer.sinks[kind].copy_(few.sinks[kind])
        packed.reserve(blocks * BLOCK_TOKENS, exactly=True)
        _repeat_page(few.packed[kind], packed, blocks, runs_kernels(None, layer, device))
    layer.slots = layer.sink_tokens + blocks * BLOCK_TOKENS + layer.residual_tokens
    layer.lengths = [layer.slots]
    layer.stored = torch.tensor(layer.lengths, device=device)


def _repeat_page(few: PackedTensor, packed: PackedTensor, blocks: int, room: bool) -> None:
    """Fill the first `blocks` blocks of the only page with those of another, over and over."""
    (source,), (page,) = few.pages, packed.pages
    _repeat(source.words, page.words[:, :blocks])
    if source.scales is not None and page.scales is not None:
        by_block = page.scales.unflatten(1, (page.blocks, BLOCK_TOKENS))
        _repeat(source.scales.unflatten(1, (source.blocks, BLOCK_TOKENS)), by_block[:, :blocks])
    if source.outliers is not None:
        spare = ROOM_TOKENS * packed.most_outliers if room else None
        page.outliers = _repeat_streams(source.outliers, blocks, page.blocks, spare)


def _repeat(few: Tensor, many: Tensor) -> None:
    """Fill `many` `[1, n, ...]` with `few` `[1, p, ...]`, in place."""
    whole = many.shape[1] // few.shape[1] * few.shape[1]
    many[:, :whole].unflatten(1, (-1, few.shape[1])).copy_(few[:, None])
    many[:, whole:] = few[:, : many.shape[1] - whole]


def _repeat_streams(few: OutlierStreams, blocks: int, capacity: int, spare: int | None) -> OutlierStreams:
    """The streams of a page of `capacity` blocks whose first `blocks` repeat those of `few`.

    There is as much room as the kernels' appends leave when they have moved a stream, or none if `spare` is None.
    """
    lengths = few.lengths()[0].cpu()  # [G, p]
    each, within = lengths.sum(-1), lengths.cumsum(-1)
    block = torch.arange(capacity).clamp(max=blocks - 1)
    ends = block // few.blocks * each[:, None] + within[:, block % few.blocks]  # [G, capacity], within their stream
    held = ends[:, -1]
    places = held if spare is None else held + held // ROOM_SHARE + spare
    starts = places.cumsum(0) - places
    if int(places.sum()) >= 1 << 31:
        raise UserError(f"{int(places.sum())} outliers of a layer go beyond 32-bit numbers; use fewer tokens")
    device = few.index.device
    streams = OutlierStreams(
        padded_zeros(few.index, int(places.sum())),
        padded_zeros(few.value, int(places.sum())),
        (ends + starts[:, None])[None].int().to(device),
        starts[None].int().to(device),
    )
    first = 0
    for start, count, step in zip(starts.tolist(), held.tolist(), each.tolist(), strict=True):
        if step:
            for own, all_of_them in ((few.index, streams.index), (few.value, streams.value)):
                _repeat(own[None, first : first + step], all_of_them[None, start : start + count])
        first += step
    return streams
