"""A model for lm-evaluation-harness whose cache is packed, so that every task the harness knows runs through it.

    import deployment.text.harness  # registers it as "kvquant"
    lm_eval.simple_evaluate(model="kvquant", model_args="pretrained=./smollm2,quantizers=nuq3.safetensors", ...)

It is the harness's own `hf` model (tokenization, batching, truncation and stop sequences are its), with another cache:

- **Generation** reads left-padded prompts chunk by chunk and decodes from the packed cache, as `deployment.generate` does.
- **Log-likelihoods** come from one pass over context and continuation. If chunks saw themselves in full precision, a text
  shorter than a chunk would read nothing packed, and the score would be that of the unquantized model. So here every
  token sees all tokens, itself included, as stored (`exact_chunk=False`): what is scored has passed through the cache.

Without quantizers the cache consists of transformers' own layers, in full precision, and all else stays as it is.
"""

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.step.asked import Backend
from gradients.cli import UserError
from gradients.finite import require_finite
from gradients.models import kv_sites
from quant.artefact import Quantizers, load_quantizers


@register_model("kvquant")
class PackedLM(HFLM):
    """The harness's `hf` model with a packed cache.

    Args:
        pretrained: a hub id, a folder, or a loaded model (then give `tokenizer`, too); as in `HFLM`.
        quantizers: a file written by `python -m quant.fit`, or what `load_quantizers` made of it; None: quantization off.
        prefill_chunk: tokens per forward while a text is read.
        exact_chunk: while generating, whether a chunk sees itself in full precision and only the past packed. With
            False the text depends neither on the size of chunks nor on where padding puts their boundaries.
        packed_backend: kernels or torch, as in `packed_attention` (`backend` means something else to the harness).

    Raises `UserError` for quantizers of another model, or of a scheme that exists in simulation only, and
    `NotImplementedError` for an unsupported architecture.
    """

    def __init__(
        self,
        pretrained: Any,
        quantizers: Quantizers | str | None = None,
        prefill_chunk: int = 1024,
        exact_chunk: bool = True,
        packed_backend: Backend | None = None,
        **harness: Any,
    ) -> None:
        if not isinstance(prefill_chunk, int) or prefill_chunk < 1:
            raise UserError(f"prefill_chunk={prefill_chunk} is not a positive integer; give the tokens per forward")
        self.quantizers = load_quantizers(quantizers) if isinstance(quantizers, str) else quantizers
        self.prefill_chunk, self.exact_chunk, self.packed_backend = prefill_chunk, exact_chunk, packed_backend
        super().__init__(pretrained, **harness)
        kv_sites(self.model)  # an architecture nobody has looked at, or quantizers that do not fit, fail here
        self._cache(exact_chunk)

    def _cache(self, exact_chunk: bool, capacity: int | None = None) -> PackedCache:
        return PackedCache(self.quantizers, self.model.config, capacity, exact_chunk)

    @torch.inference_mode()
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits `[B, S, V]` of right-padded texts `[B, S]` int64.

        Padding comes after all that is scored, and a token's codes are its own, so it needs no mask.
        """
        cache, mixed = self._cache(exact_chunk=False, capacity=inps.shape[1]), self.mixed_precision_dtype
        autocast = torch.autocast(self.device.type, mixed, mixed is not None)
        with packed_attention(self.model, self.packed_backend), autocast:
            parts = inps.split(self.prefill_chunk, dim=1)
            logits = torch.cat([self.model(input_ids=part, past_key_values=cache).logits for part in parts], dim=1)
        require_finite(logits, self.model, inps)
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Left-padded prompts `[B, S]` int64 and their continuations, `[B, <= max_length]` int64."""
        with packed_attention(self.model, self.packed_backend):
            return super()._model_generate(
                context,
                max_length,
                stop,
                past_key_values=self._cache(self.exact_chunk),  # grows: most answers end long before max_length
                prefill_chunk_size=self.prefill_chunk,
                **generation_kwargs,
            )
