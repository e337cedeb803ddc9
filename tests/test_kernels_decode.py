"""decode.cu against the torch definition, as host C++ with lanes in random order; test_kernels_attention.py does it on a GPU."""

import ctypes
import re
from dataclasses import replace
from typing import Any

import kernels_on_cpu
import pytest
import torch
from conftest import all_pairs
from test_kernels_attention import LENGTHS, run_case

from deployment.kernels.decode import host
from deployment.kernels.packed import attend_packed

pytestmark = [
    pytest.mark.skipif(not kernels_on_cpu.has_compiler(), reason="no C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernel itself runs"),
]


def error(**case: Any) -> float:
    return run_case(attend=kernels_on_cpu.attend, **case)


@pytest.mark.parametrize("length", LENGTHS[1:])
def test_awkward_lengths(length: int) -> None:
    assert error(lengths=(length,)) < 2e-3


@pytest.mark.parametrize(
    ("dim", "bits"),
    all_pairs(
        [64, 96, 128, 256],
        [(2, 2), (3, 3), (4, 4), (1, 2), (2, 3), (4, 1)],
        lambda dim, bits: dim == 128 or bits == {64: (2, 3), 96: (4, 1), 256: (3, 3)}[dim],
    ),
)
def test_widths_and_heads(dim: int, bits: tuple[int, int]) -> None:
    assert error(bits=bits, dim=dim, heads=(2, 1), lengths=(70,)) < 2e-3


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1), (8, 1), (5, 1)])
def test_groups_of_queries(heads: tuple[int, int]) -> None:
    assert error(heads=heads, lengths=(300,)) < 2e-3


@pytest.mark.parametrize("dim", [64, 128])
def test_one_query_of_keys_of_two_bits(dim: int) -> None:
    assert error(heads=(1, 1), bits=(2, 3), lengths=(300,), dim=dim) < 2e-3


def test_more_parts_than_are_put_together_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "parts_of", lambda *_: 130)
    assert error(heads=(2, 1), lengths=(16600,), share=0.0) < 2e-3


@pytest.mark.parametrize("kinds", [("groups", "groups"), ("channel", "channel"), ("groups", "token")])
def test_mixed_widths_and_axes(kinds: tuple[str, str]) -> None:
    assert error(kinds=kinds, lengths=(150, 70), dim=128) < 2e-3


def test_a_model_in_bfloat16() -> None:
    assert error(dtype=torch.bfloat16, lengths=(300, 1)) < 6e-3


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_shares_of_outliers(share: float) -> None:
    assert error(share=share, lengths=(260,)) < 2e-3


def test_outliers_beyond_the_span_of_an_index() -> None:
    assert error(dim=256, heads=(1, 1), lengths=(600,), share=0.1) < 2e-3


def test_nothing_but_outliers() -> None:
    assert error(kinds=("channel", "channel"), share=1.0, lengths=(64, 31)) < 2e-3


@pytest.mark.parametrize(("exact_chunk", "new"), [(True, 5), (False, 1), (False, 5)])
def test_several_queries(exact_chunk: bool, new: int) -> None:
    assert error(new=new, lengths=(140, 30), exact_chunk=exact_chunk, heads=(6, 2)) < 2e-3


def test_padding_inside_the_chunk() -> None:
    assert error(new=9, lengths=(0, 90), pads=(4, 0), sinks=0, heads=(2, 2)) < 2e-3


@pytest.mark.parametrize("sinks", [0, 5, 40, 161])
def test_plain_tokens(sinks: int) -> None:
    assert error(lengths=(70, 3), sinks=sinks, heads=(6, 2), dim=96, rotary_dim=48) < 2e-3


@pytest.mark.parametrize("rotary_dim", [16, 32])
def test_partial_rotary_embeddings(rotary_dim: int) -> None:
    assert error(rotary_dim=rotary_dim, lengths=(200,), factor=1.2, kinds=("groups", "token")) < 2e-3


def test_angles_are_exact_at_ten_million() -> None:
    near, far = (error(lengths=(200,), base=base) for base in (0, 10_000_000))
    assert far < 1.2 * near


def test_angles_stay_exact_in_a_long_part(monkeypatch) -> None:
    """Columns are rotated on from set to set; one team goes through everything here."""
    monkeypatch.setattr(host, "parts_of", lambda *_: 1)
    assert error(lengths=(9000,), heads=(8, 1), share=0.0) < 2e-3


@pytest.mark.parametrize(("share", "rounds"), [(0.01, 2), (0.01, 1), (0.04, 2)])
def test_outliers_of_a_long_part(monkeypatch: pytest.MonkeyPatch, share: float, rounds: int) -> None:
    """Where lists end is known for so many chunks; 1 % fit into two rounds in shared memory, all else is read where it is."""
    fitting = host.fitting
    monkeypatch.setattr(host, "parts_of", lambda *_: 1)
    monkeypatch.setattr(host, "fitting", lambda *kind: replace(fitting(*kind), rounds=rounds))
    assert error(lengths=(5000,), heads=(1, 1), share=share, dim=128) < 2e-3


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_lanes_does_not_matter(seed: int) -> None:
    def attend(*arguments: Any) -> torch.Tensor:
        return kernels_on_cpu.attend(*arguments, seed=seed)

    assert run_case(attend=attend, lengths=(400,), heads=(8, 2), share=0.05) < 2e-3


@pytest.mark.parametrize(
    ("case", "fits"),
    [
        ({"new": 8, "heads": (2, 1)}, True),
        ({"new": 9, "heads": (2, 1)}, False),
        ({"dtype": torch.float32}, False),
        ({"dim": 32}, False),
        ({"bits": (5, 4)}, False),
        ({"kinds": ("mixed", "token")}, False),
        ({"kinds": ("token", "token")}, False),
        ({"sinks": 163}, True),
        ({"sinks": 513}, False),
        ({"lengths": (0,)}, False),
    ],
)
def test_what_is_taken(case: dict[str, Any], fits: bool) -> None:
    """All else goes the general way."""
    found = []

    def attend(*arguments: Any) -> torch.Tensor:
        query, _, segments, rotary, _, kv_heads = arguments
        found.append(host.fits(query, segments, rotary, kv_heads))
        return attend_packed(*arguments)

    assert run_case(attend=attend, **{"lengths": (70,), **case}) < 2e-3
    assert found == [fits]


def test_another_rotary_embedding_than_the_layout_s_is_not_taken() -> None:
    """Keys lie in pairs of one embedding; with another's they would be rotated wrongly."""

    def attend(query: torch.Tensor, positions: torch.Tensor, segments: Any, rotary: Any, *rest: Any) -> torch.Tensor:
        assert host.fits(query, segments, rotary, 2)
        assert not host.fits(query, segments, replace(rotary, half=rotary.half // 2), 2)
        return attend_packed(query, positions, segments, rotary, *rest)

    assert run_case(attend=attend, lengths=(70,)) < 2e-3


def test_where_shared_memory_is_small_fewer_queries_go_together() -> None:
    """As with eight queries of heads of 256 channels on an A100; where not even one fits, it goes the general way."""
    found = []

    def attend(query: torch.Tensor, positions: torch.Tensor, segments: Any, *rest: Any) -> torch.Tensor:
        found.extend(shape.queries for shape in host._shapes(query, segments, 1, kernels_on_cpu.MOST_SHARED))
        assert host._shapes(query, segments, 1, 1 << 16) == []
        return kernels_on_cpu.attend(query, positions, segments, *rest)

    assert run_case(attend=attend, dim=256, heads=(8, 1), lengths=(70,)) < 2e-3
    assert found == [4]


@pytest.mark.parametrize("outliers", [0, 1])
@pytest.mark.parametrize(
    ("dim", "queries", "widths", "rounds"), [(64, 1, 16, 2), (96, 2, 8, 1), (128, 4, 31, 2), (256, 8, 4, 1)]
)
def test_sizes_are_those_of_the_compiler(dim: int, queries: int, widths: int, rounds: int, outliers: int) -> None:
    shape = host.Shape(dim, queries, 2, widths, 4, 1, outliers, outliers, 0, rounds)
    assert kernels_on_cpu.sizes(shape) == [shape.shared_bytes, ctypes.sizeof(host.Params)]


def test_every_kernel_waits_for_those_before_it() -> None:
    folder = host.Shape(128, 1, 1, 4, 4, 0, 0, 0, 0).source.parent  # all are launched early (compile.py)
    for path in (folder / "decode.cu", folder / "combine.h", *folder.parent.glob("*.cu")):
        kernels = re.split(r"\nKERNEL(?:_OF)?\(", path.read_text())[1:]
        assert kernels and all("wait_for_prerequisites();" in kernel.split("\n}")[0] for kernel in kernels)
