"""Triton's interpreter, quicker: most of the time of the tests without a GPU is its, and half of that does nothing.

Every call of a device function replaces the whole language once more, every look at an element type builds a table of
all of them, and a reduction by a function of one's own goes element by element. Results are the same to the last bit:
`test_interpreter.py` compares them.
"""

import functools
from typing import Any

import numpy as np
import pytest


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Replace the interpreter's slow parts until the patch is undone; what stood there is `__wrapped__` of each."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language, dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
    reduce_any = interpreter.ReduceOps.generic_reduce
    is_builtin = tl.core.is_builtin
    element_types: dict[str, np.dtype] = {}

    @functools.wraps(patch_language)
    def patch_once(function: Any) -> Any:
        languages = [lang for lang in (tl, tl.core) if any(x is lang for x in function.__globals__.values())]
        # what is replaced is no builtin any more, until the kernel has ended
        if any(is_builtin(lang.load) for lang in languages) or is_builtin(tl.tensor.__add__):
            return patch_language(function)
        return interpreter._LangPatchScope()

    @functools.wraps(dtype_of)
    def known_dtype(kind: tl.dtype) -> np.dtype:
        if type(kind) is not tl.dtype:  # pointers and blocks
            return dtype_of(kind)
        if kind.name not in element_types:
            element_types[kind.name] = dtype_of(kind)
        return element_types[kind.name]

    @functools.wraps(reduce_any)
    def reduce_slices(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
        if self.axis is None or self.keep_dims:
            return reduce_any(self, inputs)
        # in the order of the axis as well, but all that lies beside it at once
        before = inputs[0].handle.data
        beside = before.shape[: self.axis] + before.shape[self.axis + 1 :]

        def as_tensors(arrays: list[np.ndarray]) -> list[Any]:
            return [self.to_tensor(a.reshape(beside), x.dtype) for a, x in zip(arrays, inputs, strict=True)]

        def at(place: int) -> list[Any]:
            return as_tensors([x.handle.data.take(place, self.axis) for x in inputs])

        result = at(0)
        for place in range(1, before.shape[self.axis]):
            found = self.combine_fn.fn(*result, *at(place))
            result = as_tensors([x.handle.data for x in (found if isinstance(found, tuple) else (found,))])
        return result

    patch.setattr(interpreter, "_patch_lang", patch_once)
    patch.setattr(interpreter, "_get_np_dtype", known_dtype)
    patch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_slices)
