"""Caches of random numbers, for benchmarks and tests that need the shape of a model and not the model.

Keys and values are standard normal. Quantizers fit them: their ranges leave as large a share outside as the scheme
asks for, so that there are as many outliers as there should be.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deployment.layer import PackedLayer
from deployment.rope import Rope
from deployment.step.append import append, append_with_kernels
from deployment.step.dispatch import runs_kernels
from gradients.models import Kind, decoder_config, kv_shape
from quant.allocate import choices
from quant.codebook import Codebook, int_codebook, nf_codebook
from quant.feedback import Feedback
from quant.grouping import form_groups, units_of
from quant.mixed import MixedQuantizer
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.scheme import GROUP_CHANNELS, Scheme
from quant.storage import OUTLIER_BITS

SPARE_TOKENS = 1024  # room after the context, for chunks that are attended or stored
_FILL = 4096  # tokens stored at a time


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head dim of a layer."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Shape":
        """That of a model's layers."""
        return cls(decoder_config(config).num_attention_heads, *kv_shape(config))

    @property
    def channels(self) -> int:
        """C."""
        return self.kv_heads * self.head_dim


def synthetic_quantizers(scheme: Scheme, shape: Shape) -> tuple[Quantizer, Quantizer]:
    """Quantizers of standard normal keys and values, with the share of outliers that the scheme asks for."""
    feedback = [_feedback(shape, seed) if scheme.feedback else None for seed in (0, 1)]
    if scheme.allocated:
        kinds: tuple[Kind, Kind] = ("key", "value")
        key, value = (_mixed(scheme, shape, kind, seed, feedback[seed]) for seed, kind in enumerate(kinds))
        return key, value
    codebook = (int_codebook if scheme.datatype == "int" else nf_codebook)(scheme.levels)
    sides: list[Quantizer] = []
    for axis, fed in zip((scheme.key_axis, scheme.value_axis), feedback, strict=True):
        scale = torch.full((shape.channels,), _range_of(scheme.outliers))
        static = ChannelQuantizer(scheme, codebook, scale, torch.zeros(shape.channels), fed)
        sides.append(static if axis == "channel" else TokenQuantizer(scheme, codebook, None, fed))
    return sides[0], sides[1]


def _feedback(shape: Shape, seed: int) -> Feedback:
    """Any order, and entries as small as fitted ones are."""
    draw, (heads, dim) = torch.Generator().manual_seed(seed), (shape.kv_heads, shape.head_dim)
    order = torch.rand(heads, dim, generator=draw).argsort(dim=1)
    return Feedback(order, (torch.randn(heads, dim, dim, generator=draw) * 0.1).triu(1).half())


def _range_of(share: float) -> float:
    """Half the range beyond which that share of a standard normal lies."""
    return float(torch.special.ndtri(torch.tensor(1 - max(share, 1e-6) / 2, dtype=torch.float64)))


def _mixed(scheme: Scheme, shape: Shape, kind: Kind, seed: int, feedback: Feedback | None) -> MixedQuantizer:
    """Widths around the budget less half a percent of outliers, if it has any, shuffled, as allocations look."""
    share, units = min(0.005, scheme.outliers), None
    if scheme.groups > 1:
        units = units_of(kind, shape.kv_heads, shape.head_dim, shape.head_dim // 2)
    generator = torch.Generator().manual_seed(seed)
    size = 1 if units is None else GROUP_CHANNELS
    spread = torch.randn(shape.channels // size, generator=generator)
    widths = (scheme.bits - OUTLIER_BITS * share + spread).round().clamp(0, choices(scheme)[0][-1]).to(torch.uint8)
    places = None
    if units is not None:
        costs = torch.randn(2, shape.channels, generator=generator).double().numpy()
        places = torch.from_numpy(form_groups(costs, units) % shape.head_dim).to(torch.uint8)
        widths = widths.repeat_interleave(size).view_as(places).gather(1, places.long().argsort(1)).flatten()
    codebooks: dict[int, Codebook] = {int(w): int_codebook(2 ** int(w)) for w in widths.unique()}
    scale = torch.full((shape.channels,), _range_of(share))
    return MixedQuantizer(scheme, codebooks, widths, scale, torch.zeros(shape.channels), feedback, places)


@dataclass
class Case:
    """A filled packed layer, the same tokens in fp16, and queries."""

    layer: PackedLayer
    key: Tensor
    value: Tensor
    rope: Rope


def make_case(shape: Shape, scheme: Scheme, context: int, batch: int, device: torch.device, seed: int) -> Case:
    """Random keys and values of `context` tokens, stored in both ways."""
    generator = torch.Generator(device).manual_seed(seed)
    key, value = (
        torch.randn(batch, shape.kv_heads, context, shape.head_dim, generator=generator, device=device).half()
        for _ in range(2)
    )
    sides, capacity = synthetic_quantizers(scheme, shape), context + SPARE_TOKENS
    layer = PackedLayer(*sides, scheme.sink_tokens, capacity, residual_tokens=scheme.residual_tokens)
    layer.lazy_initialization(key, value)
    for chunk in zip(key.split(_FILL, dim=2), value.split(_FILL, dim=2), strict=True):
        store(layer, *chunk)
    sizes = {"hidden_size": shape.heads * shape.head_dim, "num_attention_heads": shape.heads}
    config = LlamaConfig(**sizes, head_dim=shape.head_dim, max_position_embeddings=context + SPARE_TOKENS)
    return Case(layer, key, value, Rope(LlamaRotaryEmbedding(config).to(device)))


def store(layer: PackedLayer, key: Tensor, value: Tensor) -> None:
    """Append tokens `[B, G, S, D]` without padding, with the kernels where they run."""
    way = append_with_kernels if runs_kernels(None, layer, key.device) else append
    way(layer, key, value, [0] * len(key))


def stored_bytes(layer: PackedLayer) -> int:
    """Of the tokens a layer holds, without room for more."""
    capacity = sum(page.blocks for page in layer.packed["key"].pages) * 64
    total = 0
    for packed in layer.packed.values():
        for page in packed.pages:
            fixed = page.words.nbytes + (0 if page.scales is None else page.scales.nbytes)
            total += fixed * max(layer.past) // capacity
            if page.outliers is not None:
                total += int(page.outliers.lengths().sum()) * 4 + page.outliers.ends.nbytes
    recent = [] if layer.window is None else layer.window.recent.values()
    return total + sum(exact.nbytes for exact in (*layer.sinks.values(), *recent))
