"""How the work on some queries is cut up: parts of a segment, chunks of a part."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from deployment.kernels.schedule import Plan, chunk_tokens, part_tokens, parts_of, weights_bytes
from deployment.kernels.tuning import Tuning, tuned, tuning_of
from deployment.streams import index_span

CPU = torch.device("cpu")
PROGRAMS = 396


@pytest.mark.parametrize("streams", [1, 8, 32, 64, 100, 256, 396, 397, 1000])
@pytest.mark.parametrize("tokens", [1, 128, 129, 2048, 4096, 131_072, 1_048_576])
def test_parts_cover_a_segment_and_none_is_empty(tokens: int, streams: int) -> None:
    parts = parts_of(tokens, streams, PROGRAMS)
    longest = part_tokens(tokens, parts)
    assert parts >= 1 and longest % 128 == 0 and longest * parts >= tokens
    assert parts == 1 or longest * (parts - 1) < tokens


@pytest.mark.parametrize("streams", [1, 8, 32, 64, 100, 256, 396, 397, 500, 1000])
def test_of_long_contexts_all_programs_take_about_the_same(streams: int) -> None:
    tokens = 1 << 20
    parts = parts_of(tokens, streams, PROGRAMS)
    rounds = -(-streams * parts // PROGRAMS)
    idle = rounds * part_tokens(tokens, parts) * PROGRAMS / (streams * tokens) - 1
    # a stream is cut into 256 parts at most, which one alone is not enough for
    assert idle < (0.06 if streams * 256 >= PROGRAMS else 0.6)


def test_short_contexts_are_cut_finer_than_a_chunk() -> None:
    """4096 tokens of 32 heads: 11 parts of 384 tokens each are done before 8 of 512."""
    parts = parts_of(4096, 32, PROGRAMS)
    assert (parts, part_tokens(4096, parts)) == (11, 384)
    assert part_tokens(131_072, parts_of(131_072, 32, PROGRAMS)) * 12 < 131_072 * 1.02
    assert parts_of(0, 32, PROGRAMS) == 1


def test_several_rounds_are_run_where_one_would_leave_a_third_idle() -> None:
    """256 parts on 396 programs take longer than 768 of a third in two rounds; 396 parts do not."""
    assert parts_of(131_072, 256, PROGRAMS) == 3
    assert parts_of(131_072, PROGRAMS, PROGRAMS) == 1


def test_a_plan_has_no_more_programs_than_parts() -> None:
    with tuned(waves=1):
        plan = Plan.of(4, 1, [100, 1000], 128, CPU)
    assert (plan.rows, plan.tiles, plan.splits) == (4, 1, [1, 2]) and plan.programs == 2
    assert Plan.of(17, 1, [], 128, CPU).programs == 0
    many = Plan.of(5, 3, [64], 64, CPU)
    assert (many.rows, many.tiles, many.splits, many.programs) == (8, 1, [1], 3)


def test_chunks_are_shorter_for_few_tokens_for_several_rows_and_for_large_heads() -> None:
    tuning = tuning_of(CPU)
    for rows, dim in itertools.product((1, 2, 4, 8, 16), (64, 128, 256)):
        found = [chunk_tokens(rows, part, dim, tuning) for part in (0, 100, 256, 257, 500, 10**6)]
        assert all(chunk >= 128 and chunk & (chunk - 1) == 0 for chunk in found)
        assert found == sorted(found) and weights_bytes(rows, max(found)) <= 8192
        assert max(found) <= index_span(dim)  # an index of an outlier tells so many tokens apart
    of_a_row, of_four = (chunk_tokens(rows, 10**6, 128, tuning) for rows in (1, 4))
    assert (of_a_row, of_four) == (tuning.chunk, tuning.chunk // 2)
    assert chunk_tokens(1, tuning.chunk // 2 + 1, 128, tuning) == tuning.chunk
    assert chunk_tokens(1, tuning.chunk // 2, 128, tuning) == tuning.chunk // 2
    for chunk in (128, 256):  # nothing is made shorter than was asked for
        asked = Tuning(**{**vars(tuning), "chunk": chunk})
        assert chunk_tokens(1, 10, 128, asked) == chunk and chunk_tokens(4, 10**6, 128, asked) == 128
    with pytest.raises(ValueError, match="128 or more"):
        Tuning(**{**vars(tuning), "chunk": 64})
