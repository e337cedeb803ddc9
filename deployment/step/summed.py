"""Tensor-parallel models: what the processes have of a few tokens is added up by a kernel of ours (kernels/sums.cu).

transformers has NCCL do it, twice a layer, which takes a decode step longer than the numbers do. Within the block linear layers whose
weights are split by rows hand small sums to the kernel, where the GPUs can write to each other's memory; everything else, a chunk of
the prompt say, goes the way it went.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from gradients.placement import input_device
from gradients.replaced import replaced

_STYLE = "rowwise"


@contextmanager
def summed_at_once(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, small sums over processes are the kernel's. All processes enter it at once."""
    with ExitStack() as undo:
        modules = list(_split_by_rows(model)) if input_device(model).type == "cuda" else []
        if modules:
            from deployment.kernels.sums import opened

            mesh: Any = modules[0].weight
            sums = opened(mesh.device_mesh.get_group(), input_device(model))
            for module in modules if sums is not None else ():
                undo.enter_context(replaced(module, "forward", _summing(module, sums)))
        yield


def _split_by_rows(model: PreTrainedModel) -> Iterator[nn.Linear]:
    plan = getattr(model, "tp_plan", None) or {}
    for name, module in model.named_modules():
        split = plan.get(re.sub(r"\d+", "*", name)) == _STYLE and type(module) is nn.Linear
        if split and hasattr(module.weight, "to_local"):
            yield module


def _summing(module: nn.Linear, sums: Any) -> Callable[..., Tensor]:
    """A forward for a layer that is split by rows."""
    before: Callable[..., Tensor] = module.forward  # transformers' own

    def forward(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        rows = x.numel() // x.shape[-1]
        small = sums.takes(rows * module.out_features, x.dtype) and not hasattr(x, "to_local")
        if not small or arguments or options or torch.is_grad_enabled():
            return before(x, *arguments, **options)
        weight: Any = module.weight
        total: Tensor = sums(linear(x, weight.to_local()))
        bias: Any = module.bias
        return total if bias is None else total + (bias.to_local() if hasattr(bias, "to_local") else bias)

    return forward
