"""Which of the two ways through a packed cache is taken: Triton kernels, or torch.

On CUDA the kernels run, from Ampere on; elsewhere torch does, since Triton's interpreter (`TRITON_INTERPRET=1`) is for tests. `KVQUANT_BACKEND`, or an
argument, says otherwise: `triton`, `torch` or `auto`. What the kernels cannot do falls back to torch, with one warning.
"""

import os
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from deployment.devices import is_capturing
from deployment.format.streams import sent
from deployment.kept import kept
from deployment.layer import PackedLayer
from deployment.rope import Rope
from deployment.step.append import append_with_kernels, join_window
from deployment.step.asked import Backend, Step
from gradients.cli import UserError

VARIABLE = "KVQUANT_BACKEND"
_MAX_HEAD_DIM = 256
_OLDEST = (8, 0)  # Ampere: asynchronous copies, tensor cores for bfloat16


def runs_kernels(backend: Backend | None, layer: PackedLayer, device: torch.device) -> bool:
    """Whether this layer's attention goes through the kernels. Raises `UserError` for a backend nobody knows."""
    chosen = backend or os.environ.get(VARIABLE, "auto")
    if chosen not in ("auto", "triton", "torch"):
        raise UserError(f"backend {chosen!r} is unknown; use auto, triton or torch ({VARIABLE}, or an argument)")
    if chosen == "torch" or (chosen == "auto" and device.type != "cuda"):
        return False
    obstacle = _no_triton(device.type) or _too_old(device) or _unsupported(layer)
    if obstacle:
        _warn_once(obstacle)
    return not obstacle


@cache
def _no_triton(device_type: str) -> str:
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    interpreted = triton.knobs.runtime.interpret
    return "" if device_type == "cuda" or interpreted else "Triton runs on CUDA devices, or with TRITON_INTERPRET=1"


@cache
def _too_old(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else _OLDEST
    return (
        ""
        if capability >= _OLDEST
        else "the GPU's compute capability {}.{} is below {}.{}".format(*capability, *_OLDEST)
    )


def _unsupported(layer: PackedLayer) -> str:
    from deployment.kernels.append import takes

    for kind, packed in layer.packed.items():
        if packed.head_dim > _MAX_HEAD_DIM or packed.head_dim % 2:
            return f"heads of {packed.head_dim} channels (the kernels take even numbers up to {_MAX_HEAD_DIM})"
        if not takes(packed):
            return f"{kind} scheme {packed.quantizer.scheme.describe()}"
    return ""


@cache
def _warn_once(obstacle: str) -> None:
    warnings.warn(
        "attention over the packed cache falls back to torch, which dequantizes all that is stored for every token and is "
        f"much slower on a GPU: {obstacle}",
        stacklevel=2,
    )


def attend_and_store(step: Step, padding: Sequence[int]) -> Tensor:
    """Attend over past and chunk, and store the chunk, with the kernels; row b's first `padding[b]` new tokens are left padding.

    Returns `[B, S, H, D]` in the query's dtype.
    """
    layer, pads = step.layer, step.layer.pads_of(padding)
    joined = join_window(layer, step.key, step.value, padding, with_kernels=True)
    if layer.exact_chunk:
        output = attend(layer, step.rope, step.query, joined, padding, step.scaling)
        append_with_kernels(layer, step.key, step.value, padding, joined)
        return output
    origins = layer.stored - pads
    append_with_kernels(layer, step.key, step.value, padding, joined)
    window = (joined[0][:, :, 1:], joined[1][:, :, 1:]) if layer.residual_tokens else None
    return attend(layer, step.rope, step.query, window, padding, step.scaling, origins)


def attend(
    layer: PackedLayer,
    rope: Rope,
    query: Tensor,
    chunk: tuple[Tensor, Tensor] | None,
    padding: Sequence[int],
    scaling: float,
    origins: Tensor | None = None,
) -> Tensor:
    """Attend over what is packed, and over keys and values `chunk` that end where the queries do, if they are given.

    `origins` `[B]` int64 are the positions of the queries' first tokens, padding included, if the layer holds the
    chunk already; else they follow what is stored.
    """
    from deployment.kernels.packed import DenseSegment, Known, attend_packed
    from deployment.kernels.repeated import repeated

    new, pads = query.shape[2], layer.pads_of(padding)
    held = new if origins is None else 0
    known = None
    if not is_capturing(query.device) and not layer.residual_tokens:
        own = [new - pad if origins is not None else 0 for pad in padding]  # that are stored already
        known = [
            Known(stored - more, stored, pad) for stored, more, pad in zip(layer.lengths, own, padding, strict=True)
        ]
    if origins is None:  # without padding nothing is computed: a launch less
        origins = layer.stored - pads if any(padding) else layer.stored
    positions = origins[:, None]
    if known is not None and (new > 1 or repeated() is not None):  # those of all layers
        positions = _positions(tuple(row.before for row in known), tuple(padding), new, query.device)
    elif new > 1:
        token = torch.arange(new, device=query.device)
        positions = positions + token
        if any(padding):
            positions = positions.masked_fill(token < pads[:, None], -1)
    length = max(stored + held - pad for stored, pad in zip(layer.lengths, padding, strict=True))
    rotary = rope.for_kernels(length, query.shape[-1], query.device)
    segments = _stored_segments(layer)
    if chunk is not None:
        segments.append(DenseSegment(*chunk, origins, None, new - chunk[0].shape[2]))
    return attend_packed(query, positions, segments, rotary, scaling, layer.packed["key"].heads, known)


@lru_cache(maxsize=8)
@kept
def _positions(before: tuple[int, ...], padding: tuple[int, ...], new: int, device: torch.device) -> Tensor:
    """`[B, S]` int64 of a chunk behind so many tokens of each row, -1 for padding; the same for all layers."""
    first, pads = (sent(torch.tensor(numbers), device)[:, None] for numbers in (before, padding))
    token = torch.arange(new, device=device) - pads
    return (first + token).where(token >= 0, -1)


def _stored_segments(layer: PackedLayer) -> list[Any]:
    from deployment.kernels.packed import DenseSegment, PackedSegment

    segments: list[Any] = []
    longest, limits, capturing = max(layer.past), layer.window_begins(), is_capturing(layer.device)
    if layer.sink_tokens and (longest or capturing):
        sinks = layer.sinks["key"], layer.sinks["value"]
        segments.append(DenseSegment(*sinks, layer.no_padding, limits))
    key, value = layer.packed["key"], layer.packed["value"]
    for key_page, value_page in zip(key.pages, value.pages, strict=True):
        start = layer.sink_tokens + key_page.start
        if start < longest or capturing:
            segments.append(PackedSegment(key, key_page, value, value_page, layer.no_padding, limits, start))
    return segments
