"""A transformers `Cache` whose full-attention layers are packed (layer.py); sliding-window layers keep transformers' native layer.

cache = PackedCache(load_quantizers("nuq3.safetensors"), model.config)
with packed_attention(model):
model.generate(ids, past_key_values=cache, max_new_tokens=100)
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from deployment.layer import OUTSIDE, PackedLayer
from deployment.rope import rotary_half
from gradients.models import cached_layers, decoder_config
from quant.artefact import Quantizers
from quant.storage import FP16_BITS, StoredSize


class PackedCache(Cache):
    """A packed cache for one batch of sequences.

    Args:
        quantizers: as `load_quantizers` returns them; None keeps every layer native (quantization off): what a forward within the block
            makes that is given no cache.
        config: the model's.
        capacity: tokens per row, padding included, to reserve at once; None grows as needed.
        exact_chunk: attend the current chunk in full precision, and only the past packed; if False also the chunk
            is attended as stored, and any size of chunk then gives the simulation's result.
        residual_tokens: the last tokens of every row that stay exact; None: as many as the scheme says. An exact chunk comes
            on top of them; otherwise they are a query's own token and those before it.

    Raises `UserError` when the quantizers belong to another model, or their scheme exists in simulation only.
    """

    def __init__(
        self,
        quantizers: Quantizers | None,
        config: PreTrainedConfig,
        capacity: int | None = None,
        exact_chunk: bool = True,
        residual_tokens: int | None = None,
    ) -> None:
        self.residual_tokens = 0
        layers = DynamicCache(config=decoder_config(config)).layers
        if quantizers is not None:
            quantizers.check_model(config)
            quantizers.check_packable()
            quantizers = quantizers.with_exact(residual_tokens=residual_tokens)
            self.residual_tokens = quantizers.scheme.residual_tokens
            for layer in cached_layers(config):
                sides = quantizers.layers[layer]
                layers[layer] = PackedLayer(
                    sides["key"],
                    sides["value"],
                    quantizers.scheme.sink_tokens,
                    capacity,
                    exact_chunk,
                    rotary_half(config, layer),
                    self.residual_tokens,
                )
        packed = [layer for layer in layers if isinstance(layer, PackedLayer)]
        for layer in packed:
            layer.checked, layer.leads = packed[0].checked, layer is packed[0]
        self.is_native = not packed
        self.in_forward = False  # whether a model within `packed_attention` is running over it
        super().__init__(layers=layers)

    @property
    def max_batch_size(self) -> int:
        """Raises NotImplementedError."""
        raise NotImplementedError("a packed cache is for no fixed number of rows; they may be added and dropped")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand a layer's new tokens on. Raises RuntimeError outside of `packed_attention`."""
        if not self.in_forward:
            raise RuntimeError(OUTSIDE)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def tensors(self) -> list[Tensor]:
        """Every tensor held for cached tokens, native layers included."""
        held: list[Tensor] = []
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                held += layer.tensors()
            elif layer.is_initialized:
                held += [layer.keys, layer.values]
        return held

    def nbytes(self) -> int:
        """Bytes of all these tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def fp16_nbytes(self) -> int:
        """Bytes the same tokens would take in fp16; padding, which a stock cache stores too, is not counted."""
        native = [layer for layer in self.layers if not isinstance(layer, PackedLayer) and layer.is_initialized]
        elements = sum(layer.keys.numel() + layer.values.numel() for layer in native)
        return (elements + self.packed_size().elements) * FP16_BITS // 8

    def packed_size(self) -> StoredSize:
        """What the packed layers alone take: the size that a scheme decides, and a simulation reports.

        Room for outliers to come, which kernels need, is in `nbytes` only. So are copies: the ranges of tokens, which every process of a
        tensor-parallel model holds, are counted by the first.
        """
        bits = elements = 0
        for layer in self.layers:
            if isinstance(layer, PackedLayer) and layer.is_initialized:
                streams = [page.outliers for packed in layer.packed.values() for page in packed.pages]
                room = sum(each.unused_bytes() for each in streams if each is not None)
                copied = sum(packed.copied_bytes() for packed in layer.packed.values())
                bits += 8 * (sum(tensor.nbytes for tensor in layer.tensors()) - room - copied)
                elements += 2 * sum(layer.lengths) * layer.packed["key"].heads * layer.packed["key"].head_dim
        return StoredSize(bits, elements)
