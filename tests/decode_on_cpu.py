"""decode.cu as host C++, its lanes as fibers (lanes.h): the source that ships, run by whoever has a C++ compiler."""

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import Tensor

from deployment.kernels.decode import host
from deployment.kernels.decode.compile import Shape
from deployment.kernels.packed import Segment
from deployment.kernels.phase import Rotary

HERE = Path(__file__).parent
MOST_SHARED = 163 * 1024  # of an A100
_WRAPPER = """
#include "decode.cu"
extern "C" void run_attend(const Params* p, unsigned seed, int blocks, int threads, long bytes) {
    lanes::launch(seed, blocks, threads, bytes, [=] { attend(*p); });
}
extern "C" void run_combine(const Params* p, unsigned seed, int blocks, int threads, long bytes) {
    lanes::launch(seed, blocks, threads, bytes, [=] { combine(*p); });
}
extern "C" void run_sizes(int* out) { sizes(out); }
"""


def has_compiler() -> bool:
    return shutil.which("g++") is not None


@cache
def library(shape: host.Shape) -> ctypes.CDLL:
    return built(_WRAPPER, shape)


def built(wrapper: str, shape: Shape) -> ctypes.CDLL:
    """A file and a few lines that call its kernels, compiled for a shape; kept among temporary files from run to run."""
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", f"-I{HERE}"]
    flags += [f"-I{shape.source.parent}", *(f"-D{name}={value}" for name, value in shape.defines().items())]
    headers = [HERE / "lanes.h", *sorted(shape.source.parent.glob("*.h"))]
    parts = [wrapper, *(path.read_text() for path in (shape.source, *headers)), *flags]
    folder = Path(tempfile.gettempdir()) / "kvquant-decode-on-cpu"
    folder.mkdir(exist_ok=True)
    made = folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as build:
            (Path(build) / "wrapper.cpp").write_text(wrapper)
            subprocess.run(
                ["g++", *flags, str(Path(build) / "wrapper.cpp"), "-o", f"{build}/made.so"],
                check=True,
                capture_output=True,
                text=True,
            )
            Path(build, "made.so").replace(made)
    return ctypes.CDLL(str(made))


def sizes(shape: host.Shape) -> tuple[int, int]:
    """(shared memory, Params) in bytes, as C++ has them."""
    out = (ctypes.c_int * 2)()
    library(shape).run_sizes(out)
    return out[0], out[1]


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

    def run(kernel: str, shape: host.Shape, blocks: int, threads: int, shared: int, params: ctypes.Structure) -> None:
        function = getattr(library(shape), f"run_{kernel}")
        function(ctypes.byref(params), ctypes.c_uint(seed), blocks, threads, ctypes.c_long(shared))

    return host.attend_by(run, MOST_SHARED, query, positions, segments, rotary, scaling, kv_heads)
