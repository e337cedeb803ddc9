"""What the compiler makes of the kernels, without a GPU; on one, that contexts of any length run the same binary."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from deployment.kernels.tuning import tuning_for
from scripts.machine_code import Chunk, parse, runs_of_a_chunk
from scripts.source_lines import places_of_code, places_of_function, places_of_loop

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes that one program may take, or several together
PROGRAMS = {"sm_80": 2, "sm_90": 3}  # of a multiprocessor at least, at the same time
RESERVED = 1024  # bytes that CUDA takes for itself, of every program

# Machine instructions per element, by bits: in the loops over blocks of keys and of values, on average; and by queries
# per KV head and bits: of the whole kernel, with 1 % outliers. It is the largest number found with Triton 3.9 and 3.6 on both
# targets, plus 0.1.
LOOPS = {4: 2.86, 3: 3.07, 2: 2.65}
WHOLE = {
    1: {4: 4.11, 3: 4.25, 2: 3.79},
    4: {4: 5.19, 3: 4.92, 2: 4.57},
    8: {4: 6.31, 3: 6.55, 2: 5.77},
}
SIDES = ("KEY", "VALUE")
CASES = {(bits, group) for group, bounds in WHOLE.items() for bits in bounds}


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    """The counts of every kernel, from a process for each GPU, since Triton interprets in this one."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "scripts.compile_kernels", "--bits", "4", "3", "2", "--groups", "1", "4", "8"]
    runs = [
        subprocess.Popen(
            [*command, "--targets", target.removeprefix("sm_")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        for target in SHARED_LIMIT
    ]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs)
    return [kernel for output in outputs for kernel in json.loads(output.splitlines()[-1])["kernels"]]


def test_decode_compiles_for_both_architectures(kernels: list[dict[str, Any]]) -> None:
    found = {(kernel["target"], kernel["bits"], kernel["group"]) for kernel in kernels}
    assert found == {(target, *case) for target in SHARED_LIMIT for case in CASES} and len(kernels) == len(found)
    for kernel in kernels:
        target = kernel["target"]
        assert kernel["shared"] > 0, kernel
        assert PROGRAMS[target] * (kernel["shared"] + RESERVED) <= SHARED_LIMIT[target] + RESERVED, kernel
        assert kernel["registers"] <= tuning_for(int(target.removeprefix("sm_"))).registers, kernel


def test_declared_memory_is_a_table_a_ring_and_weights(kernels: list[dict[str, Any]]) -> None:
    """All of it is within what inline PTX may declare, and the ring holds two blocks or more."""
    from deployment.kernels.pairs import TABLE_BYTES
    from deployment.kernels.ring import ring_bytes, slot_bytes
    from deployment.kernels.schedule import weights_bytes

    module = compile_module()
    for kernel in kernels:
        bits, group = kernel["bits"], kernel["group"]
        constants = module.attention_constants(int(kernel["target"].removeprefix("sm_")), bits, group)
        rings = [ring_bytes(bits, constants[f"{side}_GEOMETRY"], constants[f"{side}_STAGES"]) for side in SIDES]
        weights = weights_bytes(constants["ROWS"], constants["CHUNK"])
        assert kernel["declared"] == TABLE_BYTES.value + weights + max(rings) <= 48 * 1024, kernel
        assert min(rings) >= 2 * slot_bytes(bits, constants["KEY_GEOMETRY"]) == 2 * 128 * 64 * bits // 8, kernel


def test_instructions_stay_as_few_as_they_are(kernels: list[dict[str, Any]]) -> None:
    """Groups of 4 take more of the whole kernel than with chunks of 512 tokens, but those of 256 are faster on GPUs."""
    exceeding = []
    for kernel in kernels:
        bits, group = kernel["bits"], kernel["group"]
        exceeding += [kernel] * (kernel["mean"] > LOOPS[bits] or kernel["whole"] > WHOLE[group][bits])
        assert 0 < kernel["mean"] < kernel["whole"], kernel
        parts = kernel["mean"] + kernel["queries"] / 2 + kernel["outliers"] + kernel["rest"]
        assert kernel["whole"] == pytest.approx(parts, abs=0.03), kernel
    assert not exceeding


def test_no_inner_loop_spills(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        spills = kernel["spills"]
        # one query's operands are loaded outside of all inner loops; four queries' are part of keys, a span a round
        assert set(spills) - {"queries"} == {"keys", "key_outliers", "values", "value_outliers"}, kernel
        assert ("queries" in spills) == (kernel["group"] > 4), kernel
        assert not any(spills.values()), kernel


def listing(*lines: str) -> str:
    """As cuobjdump prints it; `name` may be used where a branch goes, of the line that starts with `name: `."""
    labels = {line.split(": ")[0]: f"0x{16 * i:04x}" for i, line in enumerate(lines) if ": " in line}
    code = []
    for i, line in enumerate(lines):
        words = [labels.get(word, word) for word in line.split(": ")[-1].split()]
        code.append(f"        /*{16 * i:04x}*/                   {' '.join(words)} ;      /* 0x00 */")
    return "\n".join(code)


KEYS = ["keys: HMMA.16816.F32 R0", "LDL R3", "@P0 BRA keys", "found: RED.E.ADD R0", "LOP3.LUT R1", "@P0 BRA found"]
VALUES = ["values: HMMA.16816.F32 R0", "HMMA.1688.F32 R0", "HMMA.1688.F32 R0", "@P0 BRA values"]
FRAME = ["work: S2R R0"], ["MUFU.EX2 R0"], ["@P0 BRA chunk", "BRA work"]
CHUNK = Chunk(blocks=8, products=2, rounds=2.5)


def counted(
    lines: list[str], chunk: Chunk = CHUNK, places: dict[int, tuple[str, int]] | None = None
) -> dict[str, float]:
    """Instructions of a phase; `places` by number of the line."""
    at = {16 * i: place for i, place in (places or {}).items()}
    runs, _ = runs_of_a_chunk(parse(listing(*lines), at), chunk)
    totals: dict[str, float] = {}
    for run in runs:
        totals[run.phase] = totals.get(run.phase, 0) + run.instructions
    return totals


def test_every_loop_counts_as_often_as_it_runs() -> None:
    lines = [*FRAME[0], "chunk: MOV R0", *KEYS, *FRAME[1], *VALUES, *FRAME[2]]
    # a body of two blocks of values runs half as often
    assert counted(lines) == {"keys": 8 * 3, "key_outliers": 2.5 * 3, "values": 4 * 4, "rest": 3}


def test_blocks_within_spans_count_on_their_own() -> None:
    span = ["span: MUFU.SIN R0", "HMMA.1688.F32 R0", "@P1 BRA next", *KEYS[:3], "next: MOV R0", "@P0 BRA span"]
    lines = [*FRAME[0], "chunk: MOV R0", *span, *KEYS[3:], *FRAME[1], *VALUES, *FRAME[2]]
    found = counted(lines, replace(CHUNK, spans=4, span_products=1))
    assert found == {"keys": 8 * 3, "queries": 4 * 5, "key_outliers": 2.5 * 3, "values": 4 * 4, "rest": 3}


def test_source_tells_queries_apart_where_a_loop_was_dropped() -> None:
    written = frozenset({("split.py", 7), ("phase.py", 3)})
    lines = [*FRAME[0], "chunk: MOV R0", "keys: MUFU.SIN R0", "HMMA.1688.F32 R0", "HMMA.16816.F32 R0", "@P0 BRA keys"]
    lines += [*FRAME[1], *VALUES, *FRAME[2]]
    places = {2: ("phase.py", 3), 3: ("split.py", 7), 4: ("split.py", 9)}
    merged = replace(CHUNK, spans=8, span_products=1, query_places=written)
    assert counted(lines, merged, places) == {"keys": 8 * 2, "queries": 8 * 2, "values": 4 * 4, "rest": 3}
    # one span: its own code is outside of the loop, and what the loop repeats is keys wherever it stems from
    lines = [*FRAME[0], "chunk: MUFU.SIN R0", "HMMA.1688.F32 R0", *KEYS[:3], *FRAME[1], *VALUES, *FRAME[2]]
    whole = replace(merged, spans=1)
    places = {1: ("phase.py", 3), 2: ("split.py", 7), 4: ("split.py", 7)}
    assert counted(lines, whole, places) == {"keys": 8 * 3, "queries": 2, "values": 4 * 4, "rest": 2}


def test_products_outside_a_loop_shorten_it_and_no_loop_says_how_long_a_chunk_is() -> None:
    lines = [*FRAME[0], "chunk: MOV R0", *KEYS, *FRAME[1], *VALUES, "HMMA.16816.F32 R0", *FRAME[2]]
    assert counted(lines)["values"] == 3.5 * 4 and counted(lines)["rest"] == 4
    flat = [*FRAME[0], "chunk: HMMA.16816.F32", "MUFU.EX2 R0", "HMMA.16816.F32", *FRAME[2]]
    runs, blocks = runs_of_a_chunk(parse(listing(*flat)), replace(CHUNK, rounds=0))
    assert blocks == 1 and [(run.phase, run.instructions) for run in runs] == [("rest", 4)]


def test_code_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="no loop of the machine code"):
        counted(["chunk: HMMA.16816.F32", "@P0 BRA chunk"])
    with pytest.raises(ValueError, match="2 products of values in a chunk and no loop"):
        counted([*FRAME[0], "chunk: MOV R0", *KEYS, *FRAME[1], "HMMA.16816.F32", *FRAME[2]])
    unknown = ["rotate: MUFU.SIN R0", "@P0 BRA rotate"]
    with pytest.raises(ValueError, match="a loop of 2 instructions has neither products nor atomics"):
        counted([*FRAME[0], "chunk: MOV R0", *unknown, *KEYS, *FRAME[1], *VALUES, *FRAME[2]])
    span = ["span: MOV R0", *unknown, *KEYS[:3], "@P0 BRA span"]
    with pytest.raises(ValueError, match="spans of keys"):
        counted([*FRAME[0], "chunk: MOV R0", *span, *FRAME[1], *VALUES, *FRAME[2]], replace(CHUNK, spans=4))


def test_of_a_chain_of_lines_that_in_the_function_tells_or_the_innermost() -> None:
    file = f'//## File "/a/{Path(__file__).name}", line'
    within = inspect.getsourcelines(listing)[1] + 1
    chain = [
        '//## File "/a/phase.py", line 3 inlined at "/a/x.py", line 7',
        f'{file} {within} inlined at "/a/split.py", line 7',
        '//## File "/a/split.py", line 7',
    ]
    other = ['//## File "/a/phase.py", line 4 inlined at "/a/split.py", line 8', '//## File "/a/split.py", line 8']
    code = listing("MOV R0", "MOV R1", "MOV R2", "MOV R3", "MOV R4").splitlines()
    text = "\n".join([code[0], *chain, code[1], code[2], *other, code[3], f"{file} {within - 2}", code[4]])
    found = places_of_code(text, listing)
    assert places_of_code(text, replace, listing) == found == places_of_code(text, listing, replace)
    own = Path(__file__).name
    assert found == {16: (own, within), 32: (own, within), 48: ("phase.py", 4), 64: (own, within - 2)}


def line(function: Any, text: str) -> tuple[str, int]:
    """The place of the one line of a function that starts with the text."""
    source, first = inspect.getsourcelines(function)
    (found,) = [i for i, content in enumerate(source, first) if content.strip().startswith(text)]
    return Path(inspect.getfile(function)).name, found


def test_lines_of_a_loop_leave_out_those_of_inner_ones_and_hold_what_it_calls() -> None:
    from deployment.kernels.operands import four_words, operand
    from deployment.kernels.scores import keep, score_chunk

    places = places_of_loop(score_chunk.fn, "span")
    assert {line(operand.fn, "first = "), line(four_words.fn, "_LOAD_GLOBAL")} <= places
    assert {line(score_chunk.fn, "for span in"), line(score_chunk.fn, "back_b = ")} <= places
    assert not places & {
        line(score_chunk.fn, start) for start in ("for pair in range(span", "own = ", "query, stretch = ")
    }
    assert line(keep.fn, "bits = ") not in places  # called from the loop within
    assert {name for name, _ in places} == {"scores.py", "operands.py"}
    with pytest.raises(ValueError, match="no loop over nothing"):
        places_of_loop(score_chunk.fn, "nothing")


def test_lines_of_a_function_hold_what_it_calls() -> None:
    from deployment.kernels.phase import cos_sin_of, phase_of
    from deployment.kernels.queries import rotate_back, rotated_queries

    places = places_of_function(rotate_back.fn)
    assert {line(rotate_back.fn, "step = "), line(phase_of.fn, "phase = "), line(cos_sin_of.fn, "angle = ")} <= places
    assert line(rotated_queries.fn, "head = ") not in places


@pytest.mark.parametrize(
    ("group", "blocks", "spans"), [(1, 8, 1), (2, 8, 2), (4, 4, 2), (6, 4, 4), (8, 4, 4), (16, 4, 4)]
)
def test_spans_are_those_of_the_kernel(group: int, blocks: int, spans: int) -> None:
    module = compile_module()
    chunk = module.chunk_of(module.attention_constants(80, 4, group), warps=4, outliers=0.01)
    # 16 rows hold the queries of 16, 8, 4, 2, 2, 1 stretches of TURN tokens
    turn = 64 if group == 16 else 32
    assert (chunk.blocks, chunk.products, chunk.spans, chunk.span_products) == (blocks, 32, spans, 0)
    # where tokens have ranges of their own, ones are multiplied, too
    dynamic = {**module.attention_constants(80, 4, group), "KEY_DYNAMIC": True}
    assert module.chunk_of(dynamic, warps=4, outliers=0.01).span_products == turn // 2


@pytest.mark.parametrize("mean", [0.5, 3, 655.36])
def test_rounds_are_the_mean_of_the_ceiling(mean: float) -> None:
    drawn = np.random.default_rng(0).poisson(mean, 200_000)
    expected = compile_module().expected_rounds(mean, 4 if mean < 10 else 256)
    assert expected == pytest.approx(np.ceil(drawn / (4 if mean < 10 else 256)).mean(), rel=0.01)


def compile_module() -> Any:
    pytest.importorskip("triton")
    from scripts import compile_kernels

    return compile_kernels


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
