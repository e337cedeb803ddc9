"""Where a model's keys and values can be read and rewritten, for every architecture.

A `KVSite` is the point where a layer's pre-RoPE keys (after any bias and any k-norm) or its values leave the
layer's projections. Stage 1 reads activations and gradients there, the simulation rewrites them there, and the
packed cache sees the same tensor. This is the only file that knows architectures: to add one, add its
`model_type` and a row to `SITES`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from gradients.cli import UserError
from gradients.replaced import replaced

Kind = Literal["key", "value"]
KINDS: tuple[Kind, Kind] = ("key", "value")
Layout = Literal["flat", "tokens_heads", "heads_tokens"]


@dataclass(frozen=True)
class SiteRule:
    """Which submodule of an attention layer hands out keys or values, and how it lays them out.

    `layout` is `flat` for `[B, S, C]`, `tokens_heads` for `[B, S, G, D]`, `heads_tokens` for `[B, G, S, D]`.
    `fused` marks the output of one projection that holds queries, keys and values side by side.
    """

    submodule: str
    layout: Layout = "flat"
    fused: bool = False


_PROJECTIONS = {"key": SiteRule("k_proj"), "value": SiteRule("v_proj")}
SITES: dict[str, dict[str, SiteRule]] = {
    "llama": _PROJECTIONS,
    "mistral": _PROJECTIONS,
    "qwen2": _PROJECTIONS,
    "qwen3": {"key": SiteRule("k_norm", layout="tokens_heads"), "value": SiteRule("v_proj")},
    "gemma3_text": {"key": SiteRule("k_norm", layout="heads_tokens"), "value": SiteRule("v_proj")},
    "phi3": {"key": SiteRule("qkv_proj", fused=True), "value": SiteRule("qkv_proj", fused=True)},
}


@dataclass(frozen=True)
class KVSite:
    """One layer's keys or values as they leave the projections: read them, or put others in their place."""

    layer: int
    kind: Kind
    module: nn.Module
    rule: SiteRule
    heads: int  # G, KV heads
    head_dim: int  # D
    offset: int  # first channel within a fused projection, else 0

    @property
    def channels(self) -> int:
        """C = G * D."""
        return self.heads * self.head_dim

    def read(self, output: Tensor) -> Tensor:
        """The keys or values `[B, S, C]` inside the module's output."""
        if self.rule.fused:
            return output[..., self.offset : self.offset + self.channels]
        if self.rule.layout == "heads_tokens":
            output = output.transpose(1, 2)
        return output if self.rule.layout == "flat" else output.flatten(2)

    def write(self, output: Tensor, replacement: Tensor) -> Tensor:
        """The module's output with its keys or values replaced by `replacement`, `[B, S, C]`."""
        if self.rule.fused:
            after = output[..., self.offset + self.channels :]
            return torch.cat([output[..., : self.offset], replacement, after], dim=-1)
        if self.rule.layout == "flat":
            return replacement
        split = replacement.unflatten(-1, (self.heads, self.head_dim))
        return split.transpose(1, 2) if self.rule.layout == "heads_tokens" else split

    @contextmanager
    def rewriting(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within the block, the layer computes with `change(x)` instead of its keys or values `x`, `[B, S, C]`.

        What was compiled before looks at no hooks, and is compiled anew, since the module has another forward meanwhile.
        """
        handle = self.module.register_forward_hook(
            lambda _module, _inputs, output: self.write(output, change(self.read(output)))
        )
        own = self.module.forward
        try:
            with replaced(self.module, "forward", lambda *given, **named: own(*given, **named)):
                yield
        finally:
            handle.remove()


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The text decoder's config, which for a text-only model is `config` itself."""
    return config.get_text_config(decoder=True)


def decoder(model: PreTrainedModel) -> Any:
    """The module that owns `layers` and `rotary_emb`."""
    return model.get_decoder()


def cached_layers(config: PreTrainedConfig) -> list[int]:
    """The layers whose whole past is cached; sliding-window layers keep their small native cache.

    Raises `UserError` when there is none, and for a model that is not causal.
    """
    if getattr(decoder_config(config), "use_bidirectional_attention", False) is True:
        raise UserError(
            "this model attends to tokens that come later (use_bidirectional_attention): it predicts no next token and has "
            "no cache; give a causal model"
        )
    layers = DynamicCache(config=decoder_config(config)).layers
    full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not full:
        window = getattr(decoder_config(config), "sliding_window", None)
        raise UserError(
            f"every layer of this model has a sliding window of {window} tokens, so there is no long cache to quantize; "
            "pass --full-attention if no context will exceed the window"
        )
    return full


def attend_fully(config: PreTrainedConfig) -> None:
    """Let every sliding-window layer of a text decoder attend to the whole past, before the model is built.

    Raises `UserError` where sliding layers have a rotary embedding of their own, which would change with them (Gemma 3).
    """
    kinds = [name for name, kind in (config.rope_parameters or {}).items() if isinstance(kind, dict)]
    if kinds:
        raise UserError(
            f"--full-attention: the model has a rotary embedding for each type of layer ({', '.join(kinds)}), so a "
            "sliding layer that attends fully is another layer; leave it out, the layers that slide stay small anyway"
        )
    config.sliding_window = None
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["full_attention"] * config.num_hidden_layers


def kv_sites(model: PreTrainedModel) -> list[KVSite]:
    """Key and value sites of every fully cached layer, in order of layers, key before value.

    Raises `NotImplementedError` for an architecture that `SITES` does not list.
    """
    config = decoder_config(model.config)
    rules = SITES.get(config.model_type)
    if rules is None:
        raise NotImplementedError(
            f"model_type {config.model_type!r} is not supported; add a row for it to SITES in gradients/models.py "
            f"(supported: {', '.join(SITES)})"
        )
    heads, head_dim = kv_shape(config)
    query_channels = config.num_attention_heads * head_dim
    offsets = {"key": query_channels, "value": query_channels + heads * head_dim}
    sites = []
    for layer in cached_layers(config):
        attention = decoder(model).layers[layer].self_attn
        for kind in KINDS:
            rule = rules[kind]
            module = attention.get_submodule(rule.submodule)
            sites.append(KVSite(layer, kind, module, rule, heads, head_dim, offsets[kind] if rule.fused else 0))
    return sites


def kv_shape(config: PreTrainedConfig) -> tuple[int, int]:
    """(G, D): KV heads and head dimension."""
    config = decoder_config(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head_dim
