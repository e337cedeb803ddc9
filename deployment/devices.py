"""The current CUDA device, for calls that name no tensor: Triton launches, streams, graph capture.

torch's own operators go where their tensors are. Triton launches on the current device, whatever its arguments' is, so
a model whose layers are spread over GPUs has to change it from layer to layer.
"""

from contextlib import AbstractContextManager, nullcontext

import torch


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within the block `device` is the current one; elsewhere than on CUDA there is nothing to do."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on a device: nothing may be allocated for good, or waited for."""
    with current(device):
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
