"""What the host sides of all CUDA C++ have in common: what a file is compiled for, its parameters, and a launch."""

import ctypes
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # as the sources number them
POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class Shape:
    """What a file of this folder is compiled for: a frozen dataclass of numbers, which become macros."""

    FILE: ClassVar[str]

    @property
    def source(self) -> Path:
        """The file."""
        return Path(__file__).parent / self.FILE

    def defines(self) -> dict[str, int]:
        """As macros."""
        fields: Any = self
        return {name.upper(): value for name, value in asdict(fields).items()}


# kernel, shape, blocks, threads, bytes of shared memory, Params
Run = Callable[[str, Shape, int, int, int, ctypes.Structure], None]


def structure(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    """A structure of a source; "a b" are two fields of one type."""
    each = [(one, kind) for names, kind in fields for one in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": each})


def addresses(**tensors: Tensor | None) -> dict[str, int | None]:
    """Pointers for a structure."""
    return {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
