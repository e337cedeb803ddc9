"""Shared memory that Triton does not know of.

A kernel may declare some in inline PTX. Beyond 48 KiB CUDA wants to be asked, which Triton does for what it allocates
itself; `allow_shared_memory` asks for the sum, whenever Triton loads one of the kernels named here.
"""

import ctypes
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

_KERNELS = frozenset({"split_kernel"})
_STATIC_BYTES, _DYNAMIC_BYTES = 1, 8  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, ..._MAX_DYNAMIC_SHARED_SIZE_BYTES


@triton.jit
def shared_memory(BYTES: tl.constexpr):
    """Address of BYTES of shared memory; a call declares new memory, so it must stand outside of loops."""
    text: tl.constexpr = _declared(BYTES)
    # impure: the compiler must not repeat the declaration
    return tl.inline_asm_elementwise(text, "=r,r", [0], tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _declared(size: int) -> str:
    """PTX: $0 is the address of `size` bytes of shared memory ($1 is 0)."""
    return f"{{ .shared .align 128 .b8 held[{size}]; .reg .b32 a; mov.u32 a,held; add.u32 $0,a,$1; }}"


@cache
def allow_shared_memory() -> None:
    """From now on, let the kernels have as much shared memory as the GPU has for one program."""
    triton.knobs.runtime.kernel_load_end_hook.add(_allow)


def _allow(module: Any, function: Any, name: str, *_: Any) -> None:
    if name not in _KERNELS:
        return
    driver = ctypes.CDLL("libcuda.so.1")
    static = ctypes.c_int()
    handle = ctypes.c_void_p(function)
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    _check(driver.cuFuncGetAttribute(ctypes.byref(static), _STATIC_BYTES, handle))
    most = properties["max_shared_mem"] - static.value
    _check(driver.cuFuncSetAttribute(handle, _DYNAMIC_BYTES, ctypes.c_int(most)))


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"the CUDA driver refuses shared memory to a kernel (error {code})")
