"""Load a causal language model, and know where its keys and values can be read and rewritten.

A `KVSite` is the point where a layer's pre-RoPE keys (after any bias and any k-norm) or its values leave the
layer's projections. Stage 1 reads activations and gradients there, the simulation rewrites them there, and the
packed cache sees the same tensor. This is the only file that knows architectures: to add one, add its
`model_type` and a row to `SITES`.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from gradients.cli import UserError
from gradients.parallel import WHOLE, Part, distribution
from gradients.placement import Placement, input_device
from gradients.positions import extend_positions
from gradients.progress import quiet_transformers
from gradients.weights import weights_digest

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
        """Within the block, the layer computes with `change(x)` instead of its keys or values `x`, `[B, S, C]`."""
        handle = self.module.register_forward_hook(
            lambda _module, _inputs, output: self.write(output, change(self.read(output)))
        )
        try:
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

    Raises `UserError` when there is none.
    """
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


@dataclass(frozen=True)
class LoadedModel:
    """A frozen causal language model in evaluation mode, with its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        """Where inputs go; with a `device_map`, where the embedding computes."""
        return input_device(self.model)

    @cached_property
    def weights(self) -> str:
        """Digest of the weights, by which models of one name and one config are told apart."""
        return weights_digest(self.model)


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    full_attention: bool = False,
    max_positions: int | None = None,
    device_map: str | None = None,
    part: Part = WHOLE,
) -> LoadedModel:
    """Load a hub id, a local folder, or a folder (or file) of GGUF weights; parameters come frozen.

    `dtype`: a torch dtype's name, or `auto`: the checkpoint's on an accelerator, float32 on the CPU.
    `device`: a torch device, or `auto`: every accelerator, then CPU memory, by accelerate's `device_map`.
    `full_attention`: treat sliding-window layers as fully attending (right while no context exceeds the window).
    `max_positions`: more positions than the model has, by linear scaling of its rotary embedding (positions.py).
    `device_map`: instead of a device one of accelerate's strategies, or a JSON file of modules and devices (placement.py).
    `part`: instead of either, the part of every layer that this process computes (parallel.py).
    Raises `UserError` for a missing model or dtype, `NotImplementedError` for an unsupported architecture.
    """
    _refuse_adapter(name)
    source = _resolve_source(name)
    config = _load_or_explain(AutoConfig, name, source)
    text_config = decoder_config(config)
    if text_config.model_type not in SITES:
        raise NotImplementedError(
            f"model_type {text_config.model_type!r} of {name!r} is not supported; add a row for it to SITES in "
            f"gradients/models.py (supported: {', '.join(SITES)})"
        )
    if full_attention:
        attend_fully(text_config)
    cached_layers(text_config)  # fail before the weights are read
    if max_positions is not None:
        extend_positions(text_config, max_positions)
    placement = Placement.of(device, device_map)
    spread = {"device_map": placement.device_map}
    if not part.is_whole:
        if device != "auto" or device_map is not None:
            given = f"--device {device}" if device_map is None else f"--device-map {device_map}"
            raise UserError(f"--tensor-parallel gives every process a device of its own; drop {given}")
        spread = distribution(text_config, part)
    model = _load_or_explain(
        AutoModelForCausalLM,
        name,
        source,
        config=config,
        dtype=_resolve_dtype(dtype, placement.on_cpu),
        **spread,
    )
    tokenizer = _load_or_explain(AutoTokenizer, name, source)
    model.eval().requires_grad_(False)
    loaded = LoadedModel(name, model, tokenizer)
    if not part.is_whole:
        _ = loaded.weights  # which takes all processes at once, and later only one may ask
    return loaded


def _resolve_dtype(dtype: str, on_cpu: bool) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if on_cpu else "auto"
    resolved = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise UserError(f"dtype {dtype!r} is not a floating-point dtype; use auto, float32, bfloat16 or float16")
    return resolved


def holds_gguf(name: str) -> bool:
    """Whether a model is a file of GGUF weights, or a folder of them, which are dequantized every time they are loaded."""
    return "gguf_file" in _resolve_source(name)


def _refuse_adapter(name: str) -> None:
    """Raise `UserError` for the folder of a LoRA adapter, which is no model by itself."""
    path = Path(name) / "adapter_config.json"
    if not path.is_file() or (Path(name) / "config.json").exists():
        return
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, UnicodeDecodeError, ValueError, AttributeError):
        base = None
    raise UserError(
        f"model folder {name!r} holds an adapter of {base or 'another model'}: merge it first "
        "(merge_and_unload() of peft, then save_pretrained), and give the folder of the whole"
    )


def _resolve_source(name: str) -> dict[str, str]:
    """`from_pretrained` arguments: GGUF weights need the folder and the file's name apart."""
    path = Path(name)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not files or (path / "config.json").exists():
        return {"pretrained_model_name_or_path": name}
    if len(files) > 1:
        raise UserError(f"model folder {name!r} holds {len(files)} GGUF files; name one of them: {files[0]}")
    if not files[0].exists():
        raise UserError(f"model file {name!r} does not exist; give a hub id, a folder or a GGUF file")
    return {"pretrained_model_name_or_path": str(files[0].parent), "gguf_file": files[0].name}


def _load_or_explain(auto: Any, name: str, source: dict[str, str], **kwargs: Any) -> Any:
    try:
        with quiet_transformers():
            loaded = auto.from_pretrained(**source, **kwargs)
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        if "does not recognize this architecture" in str(error):
            reason = str(error).splitlines()[0]
            raise NotImplementedError(
                f"model {name!r}: {reason} Update transformers, then add a row for it to SITES in gradients/models.py "
                f"(supported: {', '.join(SITES)})"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot load {auto.__name__} of model {name!r}: {reason}; give a hub id that is reachable, or a local folder"
        ) from error
    if "gguf_file" in source and isinstance(loaded, PreTrainedModel):
        # the weights were dequantized on loading: the model is an ordinary one and can be saved as such
        for owner, attribute in ((loaded.config, "quantization_config"), (loaded, "hf_quantizer")):
            if hasattr(owner, attribute):
                delattr(owner, attribute)
    return loaded
