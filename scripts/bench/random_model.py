"""A model of random weights: a shape is enough to measure memory and speed.

    python -m scripts.bench.random_model --shape llama-7b --layers 8 --output random-7b      # with a tokenizer of bytes

Weights are normal with a standard deviation of 1/sqrt(hidden size), gains of norms are one: keys and values are then
about standard normal, which is what `deployment.measure.synthetic` makes quantizers for. Every parameter has a generator of its
own, so that devices of one kind hold the same numbers however layers are spread over them, and is allocated where it is
to live: nothing goes through the host.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from deployment.measure.shapes import SHAPES, shape_config
from gradients.cli import UserError, command_parser, non_negative_int, positive_int, run_command
from gradients.models import decoder_config
from gradients.placement import resolve_device

_TINY = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def config_of(shape: str, layers: int | None = None) -> PreTrainedConfig:
    """The config of `tiny`, of one of the paper's models, or of a model's folder; with fewer `layers`, if given.

    Raises `UserError` for another name, and for more layers than the model has.
    """
    if shape == "tiny":
        config: Any = LlamaConfig(**_TINY)
    else:
        config = shape_config(shape)
    text = decoder_config(config)
    if layers is not None:
        if layers > text.num_hidden_layers:
            raise UserError(f"--layers {layers} exceeds the {text.num_hidden_layers} of shape {shape!r}; lower it")
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = text.layer_types[:layers]
    return config


def spread(config: PreTrainedConfig, devices: Sequence[str]) -> list[int]:
    """Which of the devices, by number, each layer is on: as many on each as on any other, one more on some.

    Raises `UserError` for more devices than layers, and for a device that is named twice.
    """
    layers = decoder_config(config).num_hidden_layers
    if len(set(devices)) < len(devices):
        raise UserError(f"devices {' '.join(devices)} name one of them twice; a device holds one part of the model")
    if len(devices) > layers:
        raise UserError(f"{len(devices)} devices are too many for {layers} layers; give at most one per layer")
    return [layer * len(devices) // layers for layer in range(layers)]


def device_map_of(config: PreTrainedConfig, devices: Sequence[str]) -> dict[str, str]:
    """The map that accelerate takes: embedding first, head last, unless it is the embedding again."""
    head = devices[0] if decoder_config(config).tie_word_embeddings else devices[-1]
    ends = {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0], "model.norm": devices[-1]}
    return {
        **ends,
        **{f"model.layers.{layer}": devices[number] for layer, number in enumerate(spread(config, devices))},
        "lm_head": head,
    }


@torch.inference_mode(False)
def random_model(
    config: PreTrainedConfig,
    devices: Sequence[str],
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
    folder: str | None = None,
) -> PreTrainedModel:
    """A frozen model spread evenly over `devices`; those on `disk` have their weights in `folder`.

    Raises `UserError` when nothing computes on the first device, and as `spread` does.
    """
    if devices[0] == "disk":
        raise UserError("device disk computes nothing and cannot be the first; name cpu or an accelerator before it")
    places = device_map_of(config, devices)
    with init_empty_weights():  # parameters alone: the rotary module's frequencies are numbers of its config
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    std = decoder_config(config).hidden_size ** -0.5
    for number, (name, empty) in enumerate(list(model.named_parameters())):
        place = next(device for module, device in places.items() if name.startswith(f"{module}."))
        device = torch.device("cpu" if place == "disk" else place)
        weight = torch.empty(empty.shape, dtype=dtype, device=device)
        if weight.ndim > 1:
            weight.normal_(std=std, generator=torch.Generator(device).manual_seed(seed + number))
        else:
            weight.fill_(float(not name.endswith("bias")))
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    model.eval()
    if len(devices) == 1:
        return model.to(devices[0])
    skipped = model._skip_keys_device_placement
    return dispatch_model(model, places, main_device=devices[0], offload_dir=folder, skip_keys=skipped)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and three special ones."""
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2}
    vocabulary |= {byte: 3 + place for place, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.bench.random_model", __doc__)
    parser.add_argument("--shape", required=True, help=f"tiny, {', '.join(SHAPES)}, or a model whose config is read")
    parser.add_argument("--layers", type=positive_int, help="number of layers (all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to draw them")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    parser.add_argument("--output", required=True, help="the folder to write")
    arguments = parser.parse_args(argv)

    if Path(arguments.output).is_file():
        raise UserError(f"--output {arguments.output!r} is a file; give a folder")
    config = config_of(arguments.shape, arguments.layers)
    model = random_model(config, [resolve_device(arguments.device)], getattr(torch, arguments.dtype), arguments.seed)
    model.save_pretrained(arguments.output)
    byte_tokenizer().save_pretrained(arguments.output)
    parameters = model.num_parameters()
    print(f"{parameters:,} random parameters of {arguments.shape}'s shape in {arguments.output}")
    return {"model": arguments.output, "parameters": parameters}


if __name__ == "__main__":
    run_command(main)
