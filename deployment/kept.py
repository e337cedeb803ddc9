"""Tensors made outside inference mode, since a cache may be filled under one of torch's modes and used under another.

A tensor made in `torch.inference_mode()` could not be written outside of it, and one made while gradients are recorded would
keep the graph of the whole forward alive.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def kept(make: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`make`, whose tensors are ordinary ones without a graph, whatever the mode it is called in."""

    @wraps(make)  # entering the modes takes microseconds, and most calls are in them
    def made(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        if not torch.is_inference_mode_enabled() and not torch.is_grad_enabled():
            return make(*arguments, **options)
        with torch.inference_mode(False), torch.no_grad():
            return make(*arguments, **options)

    return made


def writable(x: Tensor) -> Tensor:
    """`x`, or a copy of it if it was made in inference mode. To be called outside of it."""
    return x.clone() if x.is_inference() else x


def ungraphed(store: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`store`, no gradients of which are recorded; what it only writes into may stay what it is."""

    @wraps(store)
    def stored(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        if not torch.is_grad_enabled():
            return store(*arguments, **options)
        with torch.no_grad():
            return store(*arguments, **options)

    return stored
