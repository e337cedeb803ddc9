"""A rotation that turns nothing and computes nothing: the cosines of one and sines of zero that a model is handed.

Models rotate by `x * cos + rotate_half(x) * sin`. With ones and zeros that is x, after three kernels each for the queries and the keys of
every layer: 192 of a decode step of 32 layers, and half a gigabyte per layer of reading and writing for a chunk of a prompt. These tensors are
what they say, whatever is done with them, but a product with the ones is the other factor itself, one with the zeros is zeros that
take no memory, and a sum with those is the other summand itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

_KEPT = {Tensor.unsqueeze, Tensor.to}  # whose results are ones, or zeros, too
_PRODUCTS = {Tensor.mul, Tensor.__mul__, torch.mul}
_SUMS = {Tensor.add, Tensor.__add__, torch.add}


class _Constant(Tensor):
    @classmethod
    def __torch_function__(
        cls,
        function: Any,
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = None if options else cls._spared(function, arguments)
            if found is not None:
                return found
            result = function(*arguments, **(options or {}))
            return result.as_subclass(cls) if function in _KEPT else result

    @classmethod
    def _spared(cls, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Tensor | None:
        """What a product or a sum is without being computed; None if that is not known."""
        raise NotImplementedError

    @classmethod
    def _and_other(cls, arguments: tuple[Any, ...]) -> tuple[Self, Tensor] | None:
        """Of two operands the constant and the other, if the result has the other's shape and dtype."""
        if len(arguments) != 2 or not all(isinstance(argument, Tensor) for argument in arguments):
            return None
        own, other = arguments if isinstance(arguments[0], cls) else arguments[::-1]
        if isinstance(other, _Constant) or own.dtype != other.dtype or own.ndim > other.ndim:
            return None
        pairs = zip(reversed(own.shape), reversed(other.shape), strict=False)
        return (own, other) if all(size in (1, whole) for size, whole in pairs) else None


class _Ones(_Constant):
    @classmethod
    def _spared(cls, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Tensor | None:
        both = cls._and_other(arguments) if function in _PRODUCTS else None
        return None if both is None else both[1]


class _Zeros(_Constant):
    @classmethod
    def _spared(cls, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Tensor | None:
        both = cls._and_other(arguments) if function in _PRODUCTS or function in _SUMS else None
        if both is None:
            return None
        zeros, other = both
        return other if function in _SUMS else zeros.expand(other.shape).as_subclass(cls)


def unrotated(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Ones and zeros in place of a rotary module's output `[B, S, R]`."""
    ones, zeros = torch.ones_like(cos), torch.zeros_like(sin)
    if torch.compiler.is_compiling():  # which sees for itself
        return ones, zeros
    return ones.as_subclass(_Ones), zeros.as_subclass(_Zeros)
