"""A model's identity includes its weights: a digest of them, the same wherever and however they are loaded.

Two checkpoints of one training run have the same config, and often folders of the same name. What tells them apart is
taken from the live parameters, not from files, so that it is the same for a checkpoint in one file, in shards, in GGUF or
on a hub, and exists for a model that was never saved. Parameters that are offloaded are fetched, module by module, and those that
processes share (parallel.py) one by one, by all of them at once.

A model loaded in float32 and in bfloat16 is the same model, hence what is hashed of a parameter is its name, its shape,
and a sample of its elements *rounded to bfloat16, those below 2^-14 taken as zero*:
- of a bfloat16 or float16 checkpoint, float32 holds every element exactly, and rounding comes after; bfloat16 rounds
  once, as we do; float16 is exact for elements of a bfloat16 checkpoint down to 2^-14, where its subnormals begin;
- a float32 checkpoint gives the same in float32 and bfloat16. Loaded in float16 it is rounded twice, and so counts as
  another model: no function of numbers rounded in several ways could always agree.

A sample, because reading 7B parameters from the CPU's memory takes seconds: up to 4096 elements of every parameter, at
an odd stride so that they are of all rows and columns. Training moves nearly every weight; one edited by hand may be missed.
"""

import hashlib
from collections.abc import Iterator

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

SAMPLE = 4096  # elements of every parameter
_SMALLEST = 2.0**-14


def weights_digest(model: PreTrainedModel) -> str:
    """Hash of the decoder's and the output layer's weights, 16 hexadecimal digits; milliseconds to a second."""
    hashed, samples = hashlib.sha256(), []
    for name, parameter in _parameters(model):
        hashed.update(f"{name} {list(parameter.shape)};".encode())
        samples.append(_sample(parameter))
    for sample in samples:  # by now all copies to the host are in flight
        hashed.update(sample.cpu().contiguous().view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names below the decoder, which do not depend on the model around it; a tied output layer counts as one of its own."""
    parts: list[tuple[str, nn.Module | None]] = [
        ("decoder", model.get_decoder()),
        ("output", model.get_output_embeddings()),
    ]
    for part, root in parts:
        for prefix, module in root.named_modules(remove_duplicate=False) if root is not None else ():
            if own := dict(module.named_parameters(recurse=False)):
                offloaded = any(parameter.device.type == "meta" for parameter in own.values())
                if not offloaded:
                    yield from ((f"{part}.{prefix}.{name}", _whole(parameter)) for name, parameter in own.items())
                    continue
                with align_module_device(module, "cpu"):
                    fetched = [
                        (f"{part}.{prefix}.{name}", p.clone()) for name, p in module.named_parameters(recurse=False)
                    ]
                yield from fetched


def _whole(parameter: Tensor) -> Tensor:
    """A parameter that is spread over processes, fetched from all of them; any other as it is."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


@torch.no_grad()
def _sample(parameter: Tensor) -> Tensor:
    """Up to SAMPLE elements, rounded so that they do not depend on the dtype; packed codes as they are."""
    flat = parameter.detach().flatten()
    chosen = flat[:: max(1, -(-len(flat) // SAMPLE)) | 1]
    if not chosen.dtype.is_floating_point:
        return chosen.view(torch.uint8)
    rounded = chosen.float().bfloat16()
    return rounded.masked_fill(rounded.abs() < _SMALLEST, 0.0)
