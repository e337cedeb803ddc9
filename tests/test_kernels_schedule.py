"""How a page is cut up for decoding: whole chunks, and parts that are alike."""

import pytest

pytest.importorskip("triton")

from deployment.kernels.schedule import CHUNK, parts_of

TEAMS = 528  # of an H100: four to a multiprocessor


@pytest.mark.parametrize("streams", [1, 8, 32, 64, 100, 256, 528, 529, 1000])
@pytest.mark.parametrize("tokens", [1, 128, 129, 2048, 4096, 131_072, 1_048_576])
def test_no_part_of_a_page_is_empty(tokens: int, streams: int) -> None:
    assert 1 <= parts_of(tokens, streams, TEAMS) <= -(-tokens // CHUNK)


@pytest.mark.parametrize("streams", [1, 8, 32, 64, 100, 256, 528, 529, 700, 1000])
def test_of_long_contexts_all_teams_do_about_the_same(streams: int) -> None:
    tokens = 1 << 20
    parts = parts_of(tokens, streams, TEAMS)
    rounds, longest = -(-streams * parts // TEAMS), -(-tokens // CHUNK // parts)
    assert rounds * longest * CHUNK * TEAMS / (streams * tokens) - 1 < 0.07


def test_short_contexts_are_cut_so_that_most_teams_have_something() -> None:
    assert parts_of(4096, 32, TEAMS) == 16  # two chunks each, in one round
    assert parts_of(4096, 8, TEAMS) == 32  # one chunk each
    assert parts_of(0, 32, TEAMS) == 1


def test_several_rounds_are_run_where_one_would_leave_a_third_idle() -> None:
    assert parts_of(131_072, 340, TEAMS) > 1
    assert parts_of(131_072, TEAMS, TEAMS) == 1


def test_teams_are_as_many_as_there_are_whatever_whole_chunks_say() -> None:
    assert parts_of(131_072 + 1088, 8, 396) == 49  # 47 would do with 22 chunks each; but then 20 teams idle


def test_room_is_left_for_what_follows_where_there_is_little_to_do() -> None:
    assert parts_of(4096 + 1088, 8, 396) == 41
    assert parts_of(4096 + 1088, 8, 396, roomy=264) == 33
    assert parts_of(131_072, 8, 396, roomy=264) == 49
