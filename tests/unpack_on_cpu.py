"""unpack.cu as host C++, its lanes as fibers (lanes.h): the source that ships, run by whoever has a C++ compiler."""

import ctypes
from functools import cache

import torch
from decode_on_cpu import built

from deployment.kernels import unpack_host as host

_WRAPPER = """
#include "unpack.cu"
extern "C" void run_unpack(const Params* p, unsigned seed, int blocks, int threads, long bytes) {
    lanes::launch(seed, blocks, threads, bytes, [=] { unpack(*p); });
}
extern "C" void run_sizes(int* out) { sizes(out); }
"""


@cache
def library(shape: host.Shape) -> ctypes.CDLL:
    return built(_WRAPPER, shape)


def sizes(shape: host.Shape) -> list[int]:
    """(shared memory, Params) in bytes, as C++ has them."""
    out = (ctypes.c_int * 2)()
    library(shape).run_sizes(out)
    return list(out)


def run(kernel: str, shape: host.Shape, blocks: int, threads: int, shared: int, params: ctypes.Structure) -> None:
    seed = int(torch.randint(1 << 30, (1,)))
    library(shape).run_unpack(ctypes.byref(params), ctypes.c_uint(seed), blocks, threads, ctypes.c_long(shared))
