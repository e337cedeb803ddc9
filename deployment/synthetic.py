"""Caches of random numbers, for benchmarks and tests that need the shape of a model and not the model.

Keys and values are standard normal. Quantizers fit them: their ranges leave as large a share outside as the scheme
asks for, so that there are as many outliers as there should be.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deployment.cache import PackedLayer
from deployment.kernels.dispatch import runs_kernels
from deployment.rope import Rope
from gradients.cli import UserError
from gradients.models import decoder_config
from quant.codebook import Codebook, int_codebook, nf_codebook
from quant.mixed import MixedQuantizer
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.scheme import Scheme

SHAPES = {"llama-7b": (32, 32, 128), "llama-3-8b": (32, 8, 128)}  # H, G, D
SPARE_TOKENS = 512  # room after the context, for chunks that are attended or stored
_FILL = 4096  # tokens stored at a time


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head dim of a layer."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def named(cls, name: str) -> "Shape":
        """One of `SHAPES`, or that of a model."""
        if name in SHAPES:
            return cls(*SHAPES[name])
        try:
            config = decoder_config(AutoConfig.from_pretrained(name))
        except (OSError, ValueError) as error:
            raise UserError(f"shape {name!r} is none of {', '.join(SHAPES)} and no model either ({error})") from error
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_attention_heads, config.num_key_value_heads, dim)

    @property
    def channels(self) -> int:
        """C."""
        return self.kv_heads * self.head_dim


def synthetic_quantizers(scheme: Scheme, shape: Shape) -> tuple[Quantizer, Quantizer]:
    """Quantizers of standard normal keys and values, with the share of outliers that the scheme asks for."""
    if scheme.allocated:
        return tuple(_mixed(scheme, shape, seed) for seed in (0, 1))  # type: ignore[return-value]
    codebook = (int_codebook if scheme.datatype == "int" else nf_codebook)(scheme.levels)
    sides: list[Quantizer] = []
    for axis in (scheme.key_axis, scheme.value_axis):
        scale = torch.full((shape.channels,), _range_of(scheme.outliers))
        static = ChannelQuantizer(scheme, codebook, scale, torch.zeros(shape.channels))
        sides.append(static if axis == "channel" else TokenQuantizer(scheme, codebook))
    return sides[0], sides[1]


def _range_of(share: float) -> float:
    """Half the range beyond which that share of a standard normal lies."""
    return float(torch.special.ndtri(torch.tensor(1 - max(share, 1e-6) / 2, dtype=torch.float64)))


def _mixed(scheme: Scheme, shape: Shape, seed: int) -> MixedQuantizer:
    """Widths around the budget less half a percent of outliers, shuffled, as allocations look."""
    mean = scheme.bits - 32 * 0.005
    spread = torch.randn(shape.channels, generator=torch.Generator().manual_seed(seed))
    widths = (mean + spread).round().clamp(0, 6).to(torch.uint8)
    codebooks: dict[int, Codebook] = {int(w): int_codebook(2 ** int(w)) for w in widths.unique()}
    scale = torch.full((shape.channels,), _range_of(0.005))
    return MixedQuantizer(scheme, codebooks, widths, scale, torch.zeros(shape.channels))


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
    layer = PackedLayer(*synthetic_quantizers(scheme, shape), scheme.sink_tokens, context + SPARE_TOKENS)
    layer.lazy_initialization(key, value)
    kernels = runs_kernels(None, layer, device)
    for part in torch.arange(context).split(_FILL):
        chunk = slice(int(part[0]), int(part[-1]) + 1)
        if kernels:
            layer.append_with_kernels(key[:, :, chunk], value[:, :, chunk], [0] * batch, layer.no_padding)
        else:
            layer.append(key[:, :, chunk], value[:, :, chunk], [0] * batch)
    sizes = {"hidden_size": shape.heads * shape.head_dim, "num_attention_heads": shape.heads}
    config = LlamaConfig(**sizes, head_dim=shape.head_dim, max_position_embeddings=context + SPARE_TOKENS)
    return Case(layer, key, value, Rope(LlamaRotaryEmbedding(config).to(device)))


def stored_bytes(layer: PackedLayer) -> int:
    """Of the tokens a layer holds, without room for more."""
    capacity = sum(page.blocks for page in layer.packed["key"].pages) * 64
    total = 0
    for packed in layer.packed.values():
        for page in packed.pages:
            fixed = page.words.nbytes + (0 if page.scales is None else page.scales.nbytes)
            total += fixed * max(layer.lengths) // capacity
            if page.outliers is not None:
                total += int(page.outliers.lengths().sum()) * 4 + page.outliers.ends.nbytes
    return total + sum(sinks.nbytes for sinks in layer.sinks.values())
