"""Run a live model as if its cache were quantized: every site hands on `decode(encode(x))`.

Each sequence must start at its first token and come in one piece, without a filled cache and without padding, which is refused; the
packed cache of stage 3 has no such limits and gives the same numbers. Keys quantized after the rotary embedding, and all keys
and values of which a recent window stays exact, change where attention receives them (`quant/post_rope.py`) instead of where
they leave their projection.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from gradients.cli import UserError
from gradients.models import KVSite, decoder, kv_sites
from quant.artefact import Quantizers, axis_of
from quant.post_rope import Intercepted, changing_before_rope, intercepting_attention
from quant.quantizer import Encoded, Quantizer, TokenQuantizer, as_stored, code_bits
from quant.scheme import Scheme
from quant.storage import FP16_BITS, OUTLIER_BITS, StoredSize, exact_size, packed_size

_lock = threading.Lock()
_simulated: "WeakSet[nn.Module]" = WeakSet()  # decoders within a block


@dataclass
class Usage:
    """Adds up what everything simulated would take in the packed cache."""

    size: StoredSize = field(default_factory=StoredSize)

    def add(self, site: KVSite, quantizer: Quantizer, encoded: Encoded, exact: int) -> None:
        """Count one tensor of `B` sequences: `encoded` tokens, and the number of `exact` ones around them."""
        batch, tokens, channels = encoded.codes.shape
        per_token = isinstance(quantizer, TokenQuantizer)
        per_sequence = exact_size(exact, channels) + packed_size(
            tokens,
            site.heads,
            channels,
            code_bits(quantizer, channels),
            outliers=0,
            has_outliers=encoded.outliers is not None,
            token_scales=per_token,
        )
        for _ in range(batch):
            self.size += per_sequence
        grouped = 0 if per_token else sum(x.numel() for x in (encoded.scale, encoded.zero) if x is not None)
        self.size += StoredSize(bits=encoded.outlier_count * OUTLIER_BITS + grouped * FP16_BITS)


@contextmanager
def simulated(model: PreTrainedModel, quantizers: Quantizers, whole: bool = True) -> Iterator[Usage]:
    """Within the block, every forward of `model` quantizes and dequantizes its keys and values.

    Yields the running `Usage`. Raises `UserError` when the quantizers were fitted for another model, within another such block for the
    same model, whose numbers would be quantized twice, and from a forward that goes on from
    a filled cache, has padding, or several texts in a row: its first tokens would be taken for the text's. Without `whole` that is not looked at.
    """
    quantizers.check_model(model.config)
    usage = Usage()
    scheme, post = quantizers.scheme, quantizers.scheme.key_rope == "post"
    intercepted: dict[int, Intercepted] = {}
    with ExitStack() as stack:
        stack.enter_context(_once(decoder(model)))
        if whole:
            stack.callback(decoder(model).register_forward_pre_hook(_refuse_pieces, with_kwargs=True).remove)
        for site in kv_sites(model):
            change: Callable[[Tensor], Tensor]
            change = RoundTrip(site, quantizers.layers[site.layer][site.kind], scheme, usage)
            if not scheme.residual_tokens and not (post and site.kind == "key"):
                stack.enter_context(site.rewriting(change))
                continue
            if site.kind == "key" and not post:
                change = stack.enter_context(changing_before_rope(model, site, change))
            intercepted.setdefault(site.layer, Intercepted(scheme)).changes[site.kind] = change
        if intercepted:
            stack.enter_context(intercepting_attention(model, intercepted))
        yield usage


@contextmanager
def _once(part: nn.Module) -> Iterator[None]:
    with _lock:
        if part in _simulated:
            raise UserError(
                "the model is quantized in simulation already, by this thread or another; leave that block first, or take a copy"
            )
        _simulated.add(part)
    try:
        yield
    finally:
        _simulated.discard(part)


def _refuse_pieces(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    given = [*arguments, *options.values()]
    held = next((cache.get_seq_length() for cache in given if isinstance(cache, Cache)), 0)
    if held:
        raise UserError(
            f"a simulation takes a text in one piece, and the cache holds {held} tokens already; give the whole text with "
            "use_cache=False, or use the packed cache"
        )
    mask, positions = options.get("attention_mask"), options.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all():
        raise UserError(
            "a simulation takes texts without padding, of which attention_mask tells; give them one by one, or use the packed cache"
        )
    if isinstance(positions, Tensor) and not (positions.diff() == 1).all():
        raise UserError(
            "a simulation takes one text in each row, and position_ids do not count its tokens one by one; give texts one by one"
        )


@dataclass
class RoundTrip:
    """`x -> decode(encode(x))` of one site for `x` `[B, S, C]`, its exact tokens apart, its bytes counted."""

    site: KVSite
    quantizer: Quantizer
    scheme: Scheme  # of the model: what is exact does not vary between layers
    usage: Usage

    @property
    def step(self) -> int:
        """How many tokens leave the residual window together."""
        return self.scheme.residual_step(axis_of(self.scheme, self.site.kind))

    def __call__(self, x: Tensor) -> Tensor:
        """`x` as attention would find it in the cache."""
        bound = self.quantizer.to(x.device)
        sinks, rest = x[:, : self.scheme.sink_tokens], x[:, self.scheme.sink_tokens :]
        packed = packed_tokens(rest.shape[1], self.scheme.residual_tokens, self.step)
        encoded = bound.encode(rest[:, :packed])
        self.usage.add(self.site, bound, encoded, x.shape[1] - packed)
        return torch.cat([as_stored(sinks).to(x.dtype), bound.decode(encoded).to(x.dtype), rest[:, packed:]], dim=1)


def packed_tokens(tokens: int, residual: int, step: int) -> int:
    """How many of the `tokens` after the sinks are quantized: all but a residual window, in whole steps.

    Without a window nothing waits, not even for its group to be complete.
    """
    return max(0, tokens - residual) // step * step if residual else tokens
