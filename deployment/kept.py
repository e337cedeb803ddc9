"""Tensors that outlive the mode they are made in: a cache is filled under one of torch's modes and used under another.

A tensor made in `torch.inference_mode()` could not be written outside of it, and one made while gradients are recorded would
keep the graph of the whole forward alive.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def kept(make: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`make`, whose tensors are ordinary ones without a graph, whatever the mode it is called in."""

    @wraps(make)
    def made(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        with torch.inference_mode(False), torch.no_grad():
            return make(*arguments, **options)

    return made
