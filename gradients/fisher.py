"""Record keys, values and their Fisher information at every site of a model.

The Fisher information of an activation is its squared gradient under the loss, the diagonal approximation of
KVQuant (arXiv 2401.18079, section 3.3): an error e in element i changes the loss by about F_i * e^2 / 2. One
window costs one forward and one backward of the mean next-token loss. Parameters are frozen, so the graph starts
at the first site; a tensor hook squares each gradient as soon as it exists and lets it go. Summed over the window's
tokens, the products of a head's gradients are kept too: the whole matrix, for error feedback (quant/feedback.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradients.cli import UserError
from gradients.manifest import ACTIVATION_DTYPE, FISHER_DTYPE, MOMENT_DTYPE, What
from gradients.models import KVSite, kv_sites
from gradients.placement import input_device

# lifts fp16 gradients out of the subnormals; a power of two, so dividing it out again is exact
_FP16_LOSS_SCALE = 2.0**12


def record_window(
    model: PreTrainedModel, tokens: Tensor, checkpointing: bool = False, moments_only: bool = False
) -> dict[str, Tensor]:
    """Activations, squared gradients and second moments of the gradients of one window.

    Args:
        tokens: `[S]` int64.
        checkpointing: recompute each layer in the backward pass, for less memory and about a third more time.
        moments_only: leave activations and squared gradients out.

    Returns `layers.{i}.{kind}.activation` (fp16) and `.fisher` (bf16), each `[S, C]`, and `.moment` (fp32) `[G, D, D]`, the
    sum over all tokens but the first, an attention sink; all on the CPU.
    Raises `UserError` naming the layer when an activation or gradient is not finite as stored.
    """
    recorder = _Recorder(_FP16_LOSS_SCALE if model.dtype == torch.float16 else 1.0, moments_only)
    sites = kv_sites(model)
    with ExitStack() as stack:
        if checkpointing:
            stack.enter_context(_gradient_checkpointing(model))
        stack.enter_context(torch.enable_grad())
        for module_sites in _by_module(sites):
            stack.enter_context(recorder.watching(module_sites))
        tokens = tokens.to(input_device(model))[None]
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = next_token_loss(logits, tokens)
        (loss * recorder.loss_scale).backward()
    return recorder.tensors(sites)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats of predicting `tokens[:, 1:]` from `logits[:, :-1]`; logits `[B, S, V]`."""
    predictions = logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(predictions, tokens[:, 1:].flatten().to(predictions.device))


class _Recorder:
    def __init__(self, loss_scale: float, moments_only: bool) -> None:
        self.loss_scale = loss_scale
        self.moments_only = moments_only
        # activations first: a bad one spoils every gradient, and the first layer that has one is to blame
        self._recorded: dict[What, dict[KVSite, Tensor]] = {"activation": {}, "fisher": {}, "moment": {}}

    @contextmanager
    def watching(self, sites: Sequence[KVSite]) -> Iterator[None]:
        """Record the sites that share one module; they must see the same output, so they share one hook."""
        handle = sites[0].module.register_forward_hook(self._hook(sites))
        try:
            yield
        finally:
            handle.remove()

    def _hook(self, sites: Sequence[KVSite]) -> Callable[..., Tensor]:
        def record(_module: torch.nn.Module, _inputs: object, output: Tensor) -> Tensor:
            if not output.requires_grad:
                output.requires_grad_()
            if not self.moments_only:
                for site in sites:
                    recorded = site.read(output.detach())[0]
                    self._recorded["activation"][site] = _stored(recorded, ACTIVATION_DTYPE)
            output.register_hook(lambda gradient: self._square(sites, gradient))
            return output

        return record

    def _square(self, sites: Sequence[KVSite], gradient: Tensor) -> None:
        for site in sites:
            scaled = site.read(gradient)[0].float() / self.loss_scale
            if not self.moments_only:
                self._recorded["fisher"][site] = _stored(scaled.square(), FISHER_DTYPE)
            by_head = scaled[1:].unflatten(-1, (site.heads, site.head_dim)).transpose(0, 1)
            self._recorded["moment"][site] = _stored(by_head.mT @ by_head, MOMENT_DTYPE)

    def tensors(self, sites: Sequence[KVSite]) -> dict[str, Tensor]:
        tensors = {}
        for what, of_site in self._recorded.items():
            for site in sites if of_site else ():
                recorded = of_site[site]
                if not recorded.isfinite().all():
                    raise UserError(
                        f"layer {site.layer} {site.kind} {what}: {int((~recorded.isfinite()).sum())} of "
                        f"{recorded.numel()} elements are NaN or infinite as {recorded.dtype}; "
                        "check the model's weights, or try --dtype float32"
                    )
                tensors[f"layers.{site.layer}.{site.kind}.{what}"] = recorded
        return tensors


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).cpu().contiguous()


def _by_module(sites: Sequence[KVSite]) -> list[list[KVSite]]:
    groups: dict[int, list[KVSite]] = {}
    for site in sites:
        groups.setdefault(id(site.module), []).append(site)
    return list(groups.values())


@contextmanager
def _gradient_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Checkpoint each decoder layer without putting anything inside it into training mode (no dropout)."""
    layers = list(model.get_decoder().layers)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()  # which enabling had switched on
