"""Load a causal language model with its tokenizer, from a hub, a folder or GGUF weights, and say why one cannot be loaded."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from gradients.cli import UserError
from gradients.models import SITES, attend_fully, cached_layers, decoder_config
from gradients.parallel import WHOLE, Part, distribution
from gradients.placement import Placement, input_device
from gradients.positions import extend_positions
from gradients.progress import quiet_transformers
from gradients.weights import weights_digest


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

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise `UserError` for token ids int64 that the model has no embedding of."""
        size, largest = decoder_config(self.model.config).vocab_size, int(tokens.max()) if tokens.numel() else 0
        if largest >= size:
            raise UserError(
                f"the tokenizer of {self.name!r} gives token {largest}, the model knows {size} tokens; give the tokenizer that it was "
                "trained with"
            )


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
    Raises `UserError` for a missing, damaged or incomplete model and a dtype that is none, `NotImplementedError` for an unsupported
    architecture.
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
    model, loading = _load_or_explain(
        AutoModelForCausalLM,
        name,
        source,
        config=config,
        dtype=_resolve_dtype(dtype, placement.on_cpu),
        output_loading_info=True,
        **spread,
    )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"model {name!r} lacks {len(missing)} of the weights that its config asks for ({missing[0]}), which would be random; "
            "give a complete checkpoint"
        )
    if "gguf_file" in source:
        _as_ordinary(model)
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
    except Exception as error:  # its config, its weights and its code are not ours: anything may be wrong
        if "does not recognize this architecture" in str(error):
            reason = str(error).splitlines()[0]
            raise NotImplementedError(
                f"model {name!r}: {reason} Update transformers, then add a row for it to SITES in gradients/models.py "
                f"(supported: {', '.join(SITES)})"
            ) from error
        reason = " ".join(str(error).split()) if isinstance(error, StrictDataclassError) else _first_line(error)
        kind = "" if isinstance(error, OSError | ImportError | ValueError) else f"{type(error).__name__}: "
        raise UserError(
            f"cannot load {auto.__name__} of model {name!r}: {kind}{reason}; give a hub id that is reachable, or a local folder "
            "that is whole"
        ) from error
    return loaded


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _as_ordinary(model: PreTrainedModel) -> None:
    """Let a model whose GGUF weights were dequantized on loading be saved as any other."""
    for owner, attribute in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
