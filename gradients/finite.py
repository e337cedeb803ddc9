"""Name the layer in which NaN or infinity first appears, once logits are NaN."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradients.cli import UserError
from gradients.models import KVSite, kv_sites


def require_finite(logits: Tensor, model: PreTrainedModel, tokens: Tensor) -> None:
    """Raise `UserError` naming the first layer whose keys or values are not finite, if `logits` hold NaN.

    `tokens` `[B, S]` are what the logits came from; the model runs on them once more, but only in that case.
    """
    if not logits.isnan().any():
        return
    with ExitStack() as stack:
        for site in kv_sites(model):
            stack.enter_context(site.rewriting(_check(site)))
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    raise UserError(
        "the model's logits are NaN though its keys and values are finite; check its last layers, or try --dtype float32"
    )


def _check(site: KVSite) -> Callable[[Tensor], Tensor]:
    def check(x: Tensor) -> Tensor:
        bad = int((~x.isfinite()).sum())
        if bad:
            raise UserError(
                f"layer {site.layer} {site.kind}: {bad} of {x.numel()} elements are NaN or infinite; "
                "check the model's weights, or try --dtype float32"
            )
        return x

    return check
