"""What the compiler makes of the kernels, without a GPU; on one, that contexts of any length run the same binary."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes that one program may take
# per dequantized element, keys and values averaged, of the byte permutes; the study's inline assembly got 4.0, 3.3, 3.1
MOST_INSTRUCTIONS = {4: 8.0, 3: 7.0, 2: 6.0}


def test_decode_compiles_for_both_architectures() -> None:
    """In a process of its own, since Triton interprets in this one."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "scripts.compile_kernels", "--groups", "1", "4"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=True)
    kernels = json.loads(run.stdout.splitlines()[-1])["kernels"]
    assert len(kernels) == 2 * 3 * 2
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_LIMIT[kernel["target"]]
        assert kernel["mean"] <= MOST_INSTRUCTIONS[kernel["bits"]], kernel


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="interpreted kernels are not compiled")
def test_a_growing_context_compiles_nothing_new() -> None:
    from test_kernels_attention import run_case

    from deployment.kernels.combine import combine_kernel
    from deployment.kernels.split import split_kernel

    def compiled() -> int:
        return sum(
            len(caches[0]) for kernel in (split_kernel, combine_kernel) for caches in kernel.device_caches.values()
        )

    run_case(lengths=(300,))
    before = compiled()
    for length in (301, 352, 400, 511, 700):
        run_case(lengths=(length,))
    assert compiled() == before
