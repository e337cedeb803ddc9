"""What compilers make of the kernels, for GPUs that need not be there; on one, that contexts of any length run the same binary."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

from scripts.checks.compile_kernels import SHARED_LIMIT, chunk_loop, expected_rounds

REGISTERS = 65536  # of a multiprocessor
# machine instructions per element of the loop over chunks without outliers, by bits and queries: the largest number of both targets and of NVRTC 13.0 and 13.5, plus 0.15
LOOPS = {(4, 1): 2.85, (4, 4): 3.45, (3, 1): 3.3, (3, 4): 3.9, (2, 1): 2.85, (2, 4): 3.05, (0, 1): 4.05, (0, 4): 4.5}


def older_needs(stack: int) -> int:
    """Bytes of a lane's stack: none, but for compilers such as NVRTC 13.0, of torch's wheels, that spill what 13.5 does not."""
    from cuda.bindings import nvrtc

    return 0 if nvrtc.nvrtcVersion()[1:] >= (13, 5) else stack


@pytest.fixture(scope="module")
def decode_kernels() -> list[dict[str, Any]]:
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        pytest.skip("NVIDIA's compiler is not installed (pip install -e .[cuda])")
    from scripts.checks.compile_kernels import compile_for

    return [compile_for(target, *kernel, outliers=0) for target in SHARED_LIMIT for kernel in LOOPS]


def test_decode_fits_and_stays_as_short_as_it_is(decode_kernels: list[dict[str, Any]]) -> None:
    assert len(decode_kernels) == len(SHARED_LIMIT) * len(LOOPS)
    for kernel in decode_kernels:
        name = f"{kernel['target']} {kernel['bits']} bits, {kernel['queries']} queries"
        assert kernel["shared"] <= SHARED_LIMIT[int(kernel["target"].removeprefix("sm_"))], name
        room = 128 * 56 if kernel["queries"] == 4 else 0  # for a block of `combine`
        assert kernel["registers"] * kernel["teams"] * 128 + room <= REGISTERS, name
        assert kernel["loop"] <= LOOPS[kernel["bits"], kernel["queries"]], (name, kernel["loop"])
        assert kernel["usual_spills"] <= 6, (name, kernel["usual_spills"])


_LISTING = """
.text.attend:
.L_x_1:
        //## File "/a/decode.cu", line 7
        /*0010*/ IADD3 R0, R0, 0x1, RZ ;
.L_x_2:
        //## File "/a/ptx.h", line 3 inlined at "/a/decode.cu", line 9
        //## File "/a/decode.cu", line 9 inlined at "/a/decode.cu", line 20
        //## File "/a/decode.cu", line 20
        /*0020*/ LDL R1, [R1] ;
        /*0030*/ @P0 BRA `(.L_x_2) ;
        /*0040*/ BRA `(.L_x_1) ;
.section .text.combine
"""


def test_the_inner_loop_is_found_with_its_lines() -> None:
    body = chunk_loop(_LISTING)
    assert [text.split()[0] for text, _ in body] == ["LDL", "@P0"]
    assert body[0][1] == {9, 20}
    with pytest.raises(ValueError, match="no loop within a loop"):
        chunk_loop(_LISTING.replace("@P0 BRA `(.L_x_2)", "NOP"))


@pytest.mark.parametrize(("mean", "at_a_time", "rounds"), [(0.0, 4, 0.0), (50.0, 1000, 1.0), (0.1, 1, 0.1)])
def test_expected_rounds(mean: float, at_a_time: int, rounds: float) -> None:
    assert expected_rounds(mean, at_a_time) == pytest.approx(rounds, abs=1e-6)


_GENERAL = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from deployment.kernels.store import store_kernel
from deployment.kernels.plain import rotate_kernel
from deployment.kernels.portable import attend_kernel
from deployment.kernels.unpack import unpack_kernel

def types(**names):
    return {name: kind.replace("_", "*") for kind, which in names.items() for name in which.split()}

def compiled(kernel, kinds, **constants):
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names}
    triton.compile(ASTSource(kernel, signature, constants, {}), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})

lists = types(_i16="index", _fp16="scales value ranges x result query scratch", _i64="origins limits stored padding positions",
    _i32="words width offset first_level slot starts ends overflow channel_at steps counts before_ends",
    _fp32="levels scale zero turn factor outputs weights", fp32="scaling")
page = ("*i32", "*fp16", "*fp32", "*fp32", "*fp32", "*i32", "*i32", "*i32", "*i32", "*i32", "*i16", "*fp16", "*i32", "*i32")
shape, asked = (8, 128, 64, 64, 128), dict(PITCH=128, GROUP=4, ROWS=16)
for source in (0, 1, 2):
    for mixed in (False, True):
        kind = (source, mixed, 7, 0 if mixed else 3, source == 1, mixed)
        compiled(unpack_kernel, {**lists, "page": page}, KIND=kind, SHAPE=shape, PITCH=128, HEADS=4, ROTATED=source != 1)
    for key, packed in ((page, True), (("*fp16",), False)):
        compiled(attend_kernel, {**lists, "key": key, "value": key}, **asked, PACKED=packed, LIMITED=mixed, KEY=kind, VALUE=kind, SHAPE=shape)
    compiled(store_kernel, {**lists, "codes": "*i16"}, G=8, D=128, LANES=128, SOURCE=source, PLANES=7, DYNAMIC=source == 1,
        OUTLIERS=True, SPAN=512)
compiled(rotate_kernel, lists, D=128, ROTARY_HALF=64, SCALED=True, ROWS=16, PAIRS=64)
"""


def said_by(text: str, script: Path) -> str:
    """What a program prints in another process, since Triton interprets in this one."""
    pytest.importorskip("triton")
    script.write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_what_reads_and_writes_words_compiles(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does."""
    said_by(_GENERAL, tmp_path / "general.py")


_FEEDBACK = """
import re, subprocess, sys, tempfile
from pathlib import Path
import triton.backends.nvidia
from quant.feedback_kernel import TOKENS, feedback_kernel

tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
kinds = types(_fp16="x ranges targets matrix", _i16="codes", _i32="width first_boundary first_level order", _fp32="scale zero boundaries levels")
for target in (80, 90):
    for tile in (1, TOKENS):
        constants = dict(G=32, D=128, LANES=128, DYNAMIC=tile == 1, WIDEST=4, MARKED=True, TILE=tile)
        signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in feedback_kernel.arg_names}
        made = triton.compile(ASTSource(feedback_kernel, signature, constants, {}), target=GPUTarget("cuda", target, 32),
            options={"num_warps": 1, "enable_fp_fusion": False})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(made.asm["cubin"])
            used = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        print(target, tile, made.asm["ptx"].count("fma.rn.f32"), re.search(r"STACK:(\\d+)", used)[1])
"""


def test_feedback_compiles_without_fused_operations_and_without_spills(tmp_path: Path) -> None:
    said = said_by(_GENERAL.split("def compiled")[0] + _FEEDBACK, tmp_path / "feedback.py")
    counts = [tuple(map(int, line.split())) for line in said.splitlines()]
    assert [(target, tile) for target, tile, _, _ in counts] == [(80, 1), (80, 16), (90, 1), (90, 16)]
    assert all((fused, stack) == (0, 0) for _, _, fused, stack in counts), counts


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(
    "shape", [(128, 32, 32, 16, 0, 1), (96, 2, 2, 64, 2, 1), (256, 1, 1, 8, 1, 1), (256, 8, 16, 16, 1, 0)]
)
def test_append_cu_compiles_without_fused_operations_and_without_spills(target: int, shape: tuple[int, ...]) -> None:
    program = pytest.importorskip("cuda.core", reason="NVIDIA's compiler is not installed").Program
    from deployment.kernels.append_host import Shape
    from deployment.kernels.decode import compile as decode
    from scripts.checks.compile_kernels import disassembled

    made = Shape(*shape)
    assert max(made.token_bytes, made.tile_bytes) <= SHARED_LIMIT[target]
    usage = disassembled(decode.compiled(made, f"sm_{target}"), "cuobjdump", "-res-usage").replace("\n", " ")
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage)
    kernels = {name: (int(registers), int(stack)) for name, registers, stack in found}
    assert kernels["append_token"][1] == 0 and kernels["feed_back"][1] <= older_needs(32), kernels
    assert kernels["append_token"][0] * 256 <= REGISTERS
    # what could be fused would be, unless it is forbidden
    options, source = decode.options(made.defines(), f"sm_{target}"), made.source.read_text()
    options.fma = False
    unfused = bytes(program(source, "c++", options).compile("cubin").code)
    codes = [disassembled(code, "nvdisasm", "-c") for code in (unfused, decode.compiled(made, f"sm_{target}"))]
    one, other = (len(re.findall(r"\bFFMA\b", code)) for code in codes)  # all else may differ from run to run
    assert one == other


@pytest.mark.parametrize(("target", "spilled"), [(80, 48), (90, 0)])
@pytest.mark.parametrize("shape", [(128, 4, 1), (128, 4, 0), (64, 4, 1)])
def test_unpack_cu_shares_a_multiprocessor_with_two_more(target: int, spilled: int, shape: tuple[int, ...]) -> None:
    pytest.importorskip("cuda.core", reason="NVIDIA's compiler is not installed")
    from deployment.kernels.decode.compile import compiled
    from deployment.kernels.unpack_host import Shape
    from scripts.checks.compile_kernels import disassembled

    made = Shape(*shape)
    assert 3 * made.shared_bytes <= SHARED_LIMIT[target]
    usage = disassembled(compiled(made, f"sm_{target}"), "cuobjdump", "-res-usage").replace("\n", " ")
    found = re.search(r"Function unpack:\s+REG:(\d+) STACK:(\d+)", usage)
    assert found and int(found[1]) <= 80 and int(found[2]) <= spilled + older_needs(8), usage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_kernel_is_compiled_twice_for_another_context() -> None:
    from test_kernels_attention import run_case

    from deployment.kernels.decode.compile import _module

    run_case(lengths=(300,), dim=128, heads=(4, 1))
    before = _module.cache_info().misses
    for length in (31, 1000, 5000):
        run_case(lengths=(length,), dim=128, heads=(4, 1))
    assert _module.cache_info().misses == before
