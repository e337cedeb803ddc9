"""Check once, by running the model itself, that packed attention computes what its own attention does.

Every kind of attention layer is run on a few random tokens, with an attention function that only looks at what it is given:
with the model's own rotation, and without any. Rotating the latter must give the former, and nothing must be asked
for that our attention function does not do.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from deployment.rope import Rope
from gradients.attention import PREFIX, attending_through
from gradients.models import decoder
from gradients.placement import module_device
from gradients.rope import rotate

NAME = f"{PREFIX}_asked"
_POSITIONS = (0, 1, 5, 19)
_TOLERANCE = 0.02  # of the norm: bfloat16 rounds by less, another rotation is off by its size
# what the attention function reads, or may be told without anything following from it
_KNOWN = {"use_cache", "output_attentions", "output_hidden_states", "return_dict", "cache_position", "logits_to_keep"}

_seen: list[tuple[Tensor, Tensor, Mapping[str, Any]]] = []
_asked: "WeakSet[nn.Module]" = WeakSet()


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for an argument of an attention function that ours does not know, unless it says nothing."""
    for name, value in arguments.items():
        if value is not None and value is not False and name not in _KNOWN:
            raise NotImplementedError(
                f"the model gives its attention an argument {name!r}, which the packed attention does not know; "
                "its numbers would be wrong, so it is not supported"
            )


def refuse_other_attention(model: PreTrainedModel, ropes: Mapping[int, Rope]) -> None:
    """Raise NotImplementedError if layer `i` does not rotate as `ropes[i]` does, or attends in another way than we do.

    Every model is asked once.
    """
    part = decoder(model)
    if part in _asked:
        return
    with torch.no_grad(), attending_through(model, NAME):
        for layer, module in _kinds(part):
            _refuse_other_rotation(part, layer, module, ropes[layer])
    _asked.add(part)


def _kinds(part: Any) -> Iterator[tuple[int, nn.Module]]:
    """One attention layer of each kind: they differ in a setting, not only in their weights and number."""
    seen = set()
    for number, layer in enumerate(part.layers):
        module = layer.self_attn
        plain = {name: value for name, value in vars(module).items() if isinstance(value, str | float | int | None)}
        kind = frozenset((name, value) for name, value in plain.items() if name != "layer_idx")
        if kind not in seen:
            seen.add(kind)
            yield number, module


def _refuse_other_rotation(part: Any, layer: int, module: nn.Module, rope: Rope) -> None:
    device, dtype = module_device(module), part.dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, len(_POSITIONS), part.config.hidden_size, generator=generator).to(device, dtype)
    positions = torch.tensor([_POSITIONS], device=device)
    cos, sin = rope.tables(positions, _POSITIONS[-1] + 1, dtype)
    queries_and_keys = []
    for tables in ((cos, sin), (torch.ones_like(cos), torch.zeros_like(sin))):
        module(
            hidden_states=hidden,
            position_embeddings=tables,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
            packed_layer=None,
        )
        *states, arguments = _seen.pop()
        refuse_unknown({name: given for name, given in arguments.items() if name not in OWN})
        if "packed_layer" not in arguments:
            raise NotImplementedError(
                f"attention of model_type {part.config.model_type!r} keeps arguments from its attention function, which "
                "would not be told of the packed cache; it is not supported"
            )
        queries_and_keys.append(states)
    for theirs, plain in zip(*queries_and_keys, strict=True):
        ours = rotate(plain, cos.to(plain.device), sin.to(plain.device))
        if not (ours - theirs).norm() < _TOLERANCE * theirs.norm():
            raise NotImplementedError(
                f"model_type {part.config.model_type!r} rotates queries and keys of layer {layer} in another way than the "
                "packed cache, which turns the pairs (d, d + R/2) of every head; it is not supported"
            )


def _look(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **arguments: Any
) -> tuple[Tensor, None]:
    _seen.append((query, key, arguments))
    return torch.zeros_like(query.transpose(1, 2)[..., : value.shape[-1]]).contiguous(), None


# arguments that our attention function reads
OWN = {"scaling", "dropout", "position_ids", "sliding_window", "is_causal", "packed_layer"}

AttentionInterface.register(NAME, _look)
AttentionMaskInterface.register(NAME, sdpa_mask)
