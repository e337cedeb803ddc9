"""The sources in CUDA C++ as host C++, lanes as fibers (lanes.h): those that ship, run by whoever has a C++ compiler."""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from deployment.kernels.decode import host
from deployment.kernels.launch import Shape
from deployment.kernels.packed import Segment
from deployment.kernels.phase import Rotary

HERE = Path(__file__).parent
MOST_SHARED = 163 * 1024  # of an A100
_KERNELS = {
    "decode.cu": ("attend", "combine"),
    "append.cu": ("append_token", "feed_back"),
    "unpack.cu": ("unpack",),
    "sums.cu": ("exchange",),
}
_CALL = """
extern "C" void run_{0}(const Params* p, unsigned seed, int blocks, int threads, long bytes) {{
    lanes::launch(seed, blocks, threads, bytes, [=] {{ {0}(*p); }});
}}
"""
_SIZES = 'extern "C" void run_sizes(int* out) { sizes(out); }\n'


def has_compiler() -> bool:
    return shutil.which("g++") is not None


@cache
def library(shape: Shape) -> ctypes.CDLL:
    """A source and a few lines that call its kernels, compiled for a shape; kept among temporary files from run to run."""
    source = shape.source.name
    wrapper = f'#include "{source}"' + "".join(map(_CALL.format, _KERNELS[source])) + _SIZES
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", f"-I{HERE}"]
    flags += [f"-I{shape.source.parent}", *(f"-D{name}={value}" for name, value in shape.defines().items())]
    headers = (*sorted(shape.source.parent.glob("*.h")), HERE / "lanes.h")
    parts = [wrapper, *(path.read_text() for path in (shape.source, *headers)), *flags]
    folder = Path(tempfile.gettempdir()) / "kvquant-decode-on-cpu"
    folder.mkdir(exist_ok=True)
    made = folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as build:
            written, built = Path(build) / "wrapper.cpp", Path(build) / "made.so"
            written.write_text(wrapper)
            subprocess.run(["g++", *flags, written, "-o", built], check=True, capture_output=True, text=True)
            built.replace(made)
    return ctypes.CDLL(str(made))


def sizes(shape: Shape) -> list[int]:
    """Shared memory of the kernels, and Params, in bytes, as C++ has them."""
    out = (ctypes.c_int * 3)(-1, -1, -1)
    library(shape).run_sizes(out)
    return [size for size in out if size >= 0]


def run(kernel: str, shape: Shape, blocks: int, threads: int, shared: int, params: ctypes.Structure) -> None:
    """Launch a kernel, with lanes in a random order."""
    launch(int(torch.randint(1 << 30, (1,))), kernel, shape, blocks, threads, shared, params)


def launch(
    seed: int, kernel: str, shape: Shape, blocks: int, threads: int, shared: int, params: ctypes.Structure
) -> None:
    """... with lanes in the order that the seed gives."""
    function = getattr(library(shape), f"run_{kernel}")
    function(ctypes.byref(params), ctypes.c_uint(seed), blocks, threads, ctypes.c_long(shared))


def attend(
    query: Tensor,
    positions: Tensor,
    segments: Sequence[Segment],
    rotary: Rotary,
    scaling: float,
    kv_heads: int,
    seed: int = 0,
) -> Tensor:
    """As `attend_packed`, but by decode.cu on a CPU, with lanes in a random order that the seed gives."""
    assert host.fits(query, segments, rotary, kv_heads)

    return host.attend_by(partial(launch, seed), MOST_SHARED, query, positions, segments, rotary, scaling, kv_heads)
