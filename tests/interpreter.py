"""Triton's interpreter, quicker: most of the time of the tests without a GPU is its, and half of that does nothing.

Every call of a device function replaces the whole language once more, every look at an element type builds a table of
all of them, every value describes its shape anew, and a reduction by a function of one's own goes element by element.
Results are the same to the last bit:
`test_kernels_interpreter.py` compares them.
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

    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    block_shapes: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    tensor_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}

    @functools.wraps(make_block)
    def block_of_known_shape(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        known = block_shapes.get(sizes) if all(type(size) is int for size in sizes) else None
        if known is None:
            make_block(self, element_ty, shape)
            block_shapes[sizes] = self.shape, self.numel, str(self.shape)
        else:
            self.element_ty, (self.shape, self.numel, text) = element_ty, known
            self.name = f"<{text}, {element_ty}>"

    @functools.wraps(make_tensor)
    def tensor_of_known_shape(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        known = tensor_shapes.get(sizes)
        if known is None:
            make_tensor(self, handle, type)
            tensor_shapes[sizes] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, type, type.scalar, known

    patch.setattr(tl.block_type, "__init__", block_of_known_shape)
    patch.setattr(tl.tensor, "__init__", tensor_of_known_shape)
    patch.setattr(interpreter, "_patch_lang", patch_once)
    patch.setattr(interpreter, "_get_np_dtype", known_dtype)
    patch.setattr(interpreter.ReduceOps, "generic_reduce", reduce_slices)
