"""Kernels in CUDA C++ for the GPU that is there: NVIDIA's run-time compiler, through the packages of `pip install -e .[cuda]`; no nvcc.

What was compiled is kept in `~/.cache/kvquant` (`$XDG_CACHE_HOME`), by source, shape, architecture and versions, so that each is compiled once. Where
something is missing `available` says so, once, and the general way is taken.
"""

import ctypes
import hashlib
import os
import warnings
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from deployment.kernels.launch import Run, Shape
from gradients.atomic import atomic_write
from gradients.cli import UserError

FOLDER = Path(__file__).parent
_LEAST_CAPABILITY = (8, 0)
_PROBE = 'extern "C" __global__ void probe() {}'


@cache
def available(device: torch.device) -> bool:
    """Whether kernels can be compiled and loaded for a GPU; warns if not, and says what to install."""
    obstacle = _obstacle(device)
    if obstacle:
        warnings.warn(f"decode attention takes the general path, several times slower: {obstacle}", stacklevel=2)
    return not obstacle


def _obstacle(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, below 8.0"
    try:
        torch.zeros(1, device=device)  # so that there is a context
        with torch.cuda.device(device):
            _load(_built("probe", _PROBE, {}, architecture(device)))
    except ImportError as error:
        return f"{error}; install NVIDIA's compiler with `pip install -e .[cuda]`"
    except (RuntimeError, OSError) as error:  # cuda.core's and ours: no NVRTC, or a driver that is too old for it
        reason = str(error).strip().splitlines()[0]
        return f"{reason}; update the driver, or install with `pip install -e .[cuda]` what is as old as it is"
    return ""


def architecture(device: torch.device) -> str:
    """As compilers call it, such as sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's own stubs do not know all of them
    return int(properties.shared_memory_per_block_optin)


@cache
def runner(device: torch.device) -> Run:
    """Launches kernels on the current stream of a GPU, compiling and loading them first if need be."""
    early = torch.cuda.get_device_capability(device) >= (9, 0)

    def run(kernel: str, shape: Shape, blocks: int, threads: int, shared: int, params: ctypes.Structure) -> None:
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = torch.cuda.current_stream(device).cuda_stream
        _launch(_function(kernel, shape, device), blocks, threads, shared, stream, ctypes.addressof(pointers), early)

    return run


@cache
def _function(kernel: str, shape: Shape, device: torch.device) -> Any:
    driver = _driver()
    with torch.cuda.device(device):
        function = _checked(driver.cuModuleGetFunction(_module(shape, device), kernel.encode()))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, limit, most_shared(device)))
    return function


@cache
def _module(shape: Shape, device: torch.device) -> Any:
    return _load(_built(shape.source.stem, shape.source.read_text(), shape.defines(), architecture(device)))


def compiled(shape: Shape, arch: str, lines: bool = False) -> bytes:
    """Machine code for a shape and an architecture that need not be there; with `lines` it names its source's. Nothing is kept."""
    return _compile(shape.source.read_text(), shape.defines(), arch, lines)


def _built(name: str, source: str, defines: dict[str, int], arch: str) -> bytes:
    """Machine code, from the cache folder if it is there."""
    headers = [path.read_text() for path in sorted(FOLDER.glob("*.h"))]
    parts = [source, *headers, arch, repr(sorted(defines.items())), *_versions()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root) / "kvquant" / f"{name}-{arch}-{digest}.cubin"
    if path.exists():
        return path.read_bytes()
    code = _compile(source, defines, arch)
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(code)
    except (OSError, UserError) as error:
        warnings.warn(f"{path} cannot be written ({error}): kernels are compiled anew by every process", stacklevel=2)
    return code


@cache
def _versions() -> tuple[str, ...]:
    found = []
    for package in ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(package)
    return tuple(found)


def _compile(source: str, defines: dict[str, int], arch: str, lines: bool = False) -> bytes:
    from cuda.core import Program

    return bytes(Program(source, "c++", options(defines, arch, lines)).compile("cubin").code)


def options(defines: dict[str, int], arch: str, lines: bool = False) -> Any:
    """What the compiler is told."""
    from cuda.core import ProgramOptions

    macros = [(name, str(value)) for name, value in defines.items()]
    return ProgramOptions(
        arch=arch, std="c++17", include_path=str(FOLDER), define_macro=macros or None, lineinfo=lines or None
    )


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a function of the driver returns beside its status. Raises RuntimeError for another than success."""
    if int(answer[0]):
        raise RuntimeError(f"the CUDA driver says {answer[0].name}")
    return answer[1] if len(answer) > 1 else None


def _load(code: bytes) -> Any:
    return _checked(_driver().cuModuleLoadData(code))


def _launch(function: Any, blocks: int, threads: int, shared: int, stream: int, params: int, early: bool) -> None:
    _checked(_driver().cuLaunchKernelEx(_config(blocks, threads, shared, stream, early), function, params, 0))


@lru_cache(maxsize=256)  # making one takes longer than launching
def _config(blocks: int, threads: int, shared: int, stream: int, early: bool) -> Any:
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    if early:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    return config
