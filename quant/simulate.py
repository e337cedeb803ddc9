"""Run a live model as if its cache were quantized: every site hands on `decode(encode(x))`.

Each sequence must start at its first token and come in one piece, without a cache and without padding; the
packed cache of stage 3 has no such limits and gives the same numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradients.models import KVSite, kv_sites
from quant.artefact import Quantizers
from quant.quantizer import Encoded, Quantizer, as_stored, code_bits
from quant.storage import OUTLIER_BITS, StoredSize, exact_size, packed_size


@dataclass
class Usage:
    """Adds up what everything simulated would take in the packed cache."""

    size: StoredSize = field(default_factory=StoredSize)

    def add(self, site: KVSite, quantizer: Quantizer, encoded: Encoded, sinks: int) -> None:
        """Count one tensor of `B` sequences: `encoded` tokens after `sinks` exact ones."""
        batch, tokens, channels = encoded.codes.shape
        per_sequence = exact_size(sinks, channels) + packed_size(
            tokens,
            site.heads,
            channels,
            code_bits(quantizer, channels),
            outliers=0,
            has_outliers=encoded.outliers is not None,
            token_scales=encoded.scale is not None,
        )
        for _ in range(batch):
            self.size += per_sequence
        self.size += StoredSize(bits=encoded.outlier_count * OUTLIER_BITS)


@contextmanager
def simulated(model: PreTrainedModel, quantizers: Quantizers) -> Iterator[Usage]:
    """Within the block, every forward of `model` quantizes and dequantizes its keys and values.

    Yields the running `Usage`. Raises `UserError` when the quantizers were fitted for another model.
    """
    quantizers.check_model(model.config)
    usage = Usage()
    with ExitStack() as stack:
        for site in kv_sites(model):
            quantizer = quantizers.layers[site.layer][site.kind]
            stack.enter_context(site.rewriting(_round_trip(site, quantizer, quantizers.scheme.sink_tokens, usage)))
        yield usage


def _round_trip(site: KVSite, quantizer: Quantizer, sink_tokens: int, usage: Usage) -> Callable[[Tensor], Tensor]:
    on_device: dict[torch.device, Quantizer] = {}

    def change(x: Tensor) -> Tensor:
        if x.device not in on_device:
            on_device[x.device] = quantizer.to(x.device)
        bound = on_device[x.device]
        sinks, rest = as_stored(x[:, :sink_tokens]).to(x.dtype), x[:, sink_tokens:]
        encoded = bound.encode(rest)
        usage.add(site, bound, encoded, sinks.shape[1])
        return torch.cat([sinks, bound.decode(encoded).to(x.dtype)], dim=1)

    return change
