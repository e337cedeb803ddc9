"""append.cu as host C++, its lanes as fibers (lanes.h): the source that ships, run by whoever has a C++ compiler."""

import ctypes
from functools import cache

import torch
from decode_on_cpu import built

from deployment.kernels import append_host as host

_WRAPPER = """
#include "append.cu"
extern "C" void run_append_token(const Params* p, unsigned seed, int blocks, int threads, long bytes) {
    lanes::launch(seed, blocks, threads, bytes, [=] { append_token(*p); });
}
extern "C" void run_feed_back(const Params* p, unsigned seed, int blocks, int threads, long bytes) {
    lanes::launch(seed, blocks, threads, bytes, [=] { feed_back(*p); });
}
extern "C" void run_sizes(int* out) { sizes(out); }
"""


@cache
def library(shape: host.Shape) -> ctypes.CDLL:
    return built(_WRAPPER, shape)


def sizes(shape: host.Shape) -> list[int]:
    """(shared memory of a token, of a chunk, Params) in bytes, as C++ has them."""
    out = (ctypes.c_int * 3)()
    library(shape).run_sizes(out)
    return list(out)


def run(kernel: str, shape: host.Shape, blocks: int, threads: int, shared: int, params: ctypes.Structure) -> None:
    function, seed = getattr(library(shape), f"run_{kernel}"), int(torch.randint(1 << 30, (1,)))
    function(ctypes.byref(params), ctypes.c_uint(seed), blocks, threads, ctypes.c_long(shared))
