"""Attention of many queries: stretches of the packed past unpacked, and the library's attention over them, against float64."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import kernels_on_cpu
import pytest
import torch
from kernels_on_cpu import has_compiler
from test_kernels_attention import (
    DEVICE,
    generator,
    make_groups,
    make_quantizer,
    packed_tensor,
    relative_rms,
    rotate64,
    run_case,
)
from torch import Tensor

from deployment.kernels import prefill, scratch, unpack_host
from deployment.kernels.decode.compile import runner
from deployment.kernels.merge import merge
from deployment.kernels.packed import DenseSegment, Known, PackedSegment, Segment
from deployment.kernels.phase import Rotary
from deployment.kernels.prefill import attend_many
from deployment.kernels.repeated import Repeated
from deployment.kernels.unpacking import unpack
from deployment.step.reading import recorder_of
from deployment.step.recording import GraphPieces
from quant.scheme import Scheme


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What nobody has written is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def attend_knowing(
    query: Tensor, positions: Tensor, segments: list[Segment], rotary: Rotary, scaling: float, kv_heads: int
) -> Tensor:
    """`attend_many` of a chunk that is not stored yet, as the host knows it."""
    pads = [int((row < 0).sum()) for row in positions]
    befores = [int(row[pad]) for row, pad in zip(positions, pads, strict=True)]
    known = [Known(before, before, pad) for before, pad in zip(befores, pads, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "FEW", 0)
        patch.delattr(prefill, "attend_portably")
        return attend_many(query, positions, segments, rotary, scaling, kv_heads, known)


WAYS = pytest.mark.parametrize("attend", [attend_many, attend_knowing], ids=["portable", "known"])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_fragments(bits: int, dim: int) -> None:
    assert run_case(bits=(bits, bits), dim=dim, heads=(1, 1), new=17, lengths=(70,), attend=attend_knowing) < 2e-3


@WAYS
@pytest.mark.parametrize(("dim", "bits"), [(96, 3), (20, 5), (6, 2), (256, 3)])
def test_other_heads(dim: int, bits: int, attend) -> None:
    assert run_case(bits=(bits, bits), dim=dim, heads=(2, 1), new=17, lengths=(70,), attend=attend) < 2e-3


@pytest.mark.parametrize("kinds", [("mixed", "mixed"), ("groups", "groups"), ("token", "token"), ("token", "channel")])
def test_axes_and_mixed_widths(kinds: tuple[str, str]) -> None:
    assert run_case(kinds=kinds, new=17, heads=(1, 1), lengths=(70, 30), attend=attend_knowing) < 2e-3


@WAYS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype, attend) -> None:
    bound = {torch.float16: 2e-3, torch.bfloat16: 6e-3, torch.float32: 3e-6}[dtype]
    assert run_case(dtype=dtype, new=9, heads=(4, 2), lengths=(130, 1), attend=attend) < bound


@pytest.mark.parametrize(
    ("length", "attend"),
    [*((length, attend_knowing) for length in (0, 1, 31, 33, 257, 1000)), (0, attend_many), (1000, attend_many)],
)
def test_awkward_lengths(length: int, attend) -> None:
    assert run_case(lengths=(length,), new=3, attend=attend) < 2e-3


@WAYS
@pytest.mark.parametrize(("heads", "new"), [((1, 1), 150), ((6, 2), 7), ((8, 1), 20)])
def test_groups(heads: tuple[int, int], new: int, attend) -> None:
    assert run_case(heads=heads, new=new, lengths=(40,), attend=attend) < 2e-3


@pytest.mark.parametrize("exact_chunk", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_outliers(share: float, exact_chunk: bool) -> None:
    attend = attend_knowing if exact_chunk else attend_many
    assert run_case(share=share, new=10, exact_chunk=exact_chunk, lengths=(140, 30), attend=attend) < 2e-3


@WAYS
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_context_comes_in_stretches(blocks: int, attend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "stretch_tokens", lambda size: 64 * blocks)
    assert run_case(new=9 if blocks > 1 else 1, heads=(2, 1), lengths=(300, 100), sinks=2, attend=attend) < 2e-3


def done_again(work: Any) -> tuple[Callable[[], object], Any]:
    """What replaces a CUDA graph where there is none: `work` of the rows that it was recorded of, whose parts are as they were."""
    rows, before = work.func.__self__, list(work.func.__self__.parts)
    result = work()
    rows.parts = before

    def replay() -> None:
        if not before:
            rows.parts = []
            vars(rows).pop("query", None)
        new = work()
        if result is not None:
            result.copy_(new)

    return replay, result


@pytest.mark.parametrize(("heads", "new"), [((2, 1), 9), ((2, 2), 256)])
def test_layers_repeat_what_they_do_alike(heads: tuple[int, int], new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of other pages, two chunks of them; what they share lies where it lay, and is no number between."""
    monkeypatch.setattr(prefill, "stretch_tokens", lambda size: 128)
    repeated = Repeated(recorder_of(GraphPieces()) if DEVICE.type == "cuda" else done_again)
    shared: list[Tensor] = []

    def attend(
        query: Tensor, positions: Tensor, segments: list[Segment], _: Rotary, scaling: float, kv_heads: int
    ) -> Tensor:
        chunk = segments[-1]
        assert isinstance(chunk, DenseSegment)
        if not shared:
            shared.extend(x.clone() for x in (query, positions, chunk.key, chunk.value))
        for held, given in zip(shared, (query, positions, chunk.key, chunk.value), strict=True):
            held.copy_(given)
        segments = [*segments[:-1], DenseSegment(shared[2], shared[3], chunk.origins, None)]
        output = attend_knowing(*shared[:2], segments, rotary, scaling, kv_heads).clone()
        for held in shared[::2]:
            held.fill_(torch.nan)
        return output

    rotary = Rotary.of((10000.0 ** (-torch.arange(32) / 32)).float().to(DEVICE), 64)
    for length in (300, 420):
        with repeated.chunk():
            for bits in (2, 3, 4, 3):
                assert run_case(bits=(bits, bits), new=new, heads=heads, lengths=(length,), attend=attend) < 2e-3
    assert repeated.replays == 2 * (3 + 4)  # two layers' stretches, two or three and the last


def test_work_is_repeated_for_what_it_was_recorded_of_and_nothing_else() -> None:
    done: list[str] = []

    def record(work: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        return lambda: done.append("repeated"), work()

    one, other = torch.zeros(1), torch.zeros(1)
    repeated = Repeated(record)
    for _ in range(2):
        with repeated.chunk():
            for operand in (one, one, one, other, one):  # equal, but not the same
                repeated.layer("", (operand,))
                assert repeated.do(lambda: done.append("done") or 5) == 5
        assert done == ["done", "done", "repeated", "repeated", "done", "done"]
        done.clear()


def test_work_that_cannot_be_recorded_is_done_as_it_is() -> None:
    """Nor is what came before it in a layer: later work goes on with what it has left."""
    recorded: list[Any] = []

    def fail_later(work: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        recorded.append(work)
        if len(recorded) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: None, work()

    repeated, seen = Repeated(fail_later), []
    with repeated.chunk():
        for number in range(4):
            parts: list[int] = []
            repeated.layer("", ())
            repeated.do(partial(parts.append, number))
            repeated.do(lambda parts=parts: seen.append(list(parts)))
    assert seen == [[0], [1], [2], [3]] and repeated.replays == 0


@pytest.mark.parametrize(("long", "expected"), [(64 * 131 * 2, "library"), (64 * 131 * 2 + 128, "portable")])
def test_few_queries_go_to_the_library_behind_a_long_past(
    long: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two heads of 64 channels behind 131 tokens."""

    def attend(*arguments: Any) -> Tensor:
        with pytest.raises(LookupError, match=expected):
            attend_many(*arguments, [Known(131, 131, 0)])
        return torch.zeros(1, 1, 4, 64, device=DEVICE, dtype=torch.float16)

    def taken(way: str) -> Any:
        def take(*_: Any) -> Any:
            raise LookupError(way)

        return take

    monkeypatch.setattr(prefill, "LONG", long)
    monkeypatch.setattr(prefill, "attend_portably", taken("portable"))
    monkeypatch.setattr(prefill._Rows, "attend", taken("library"))
    run_case(lengths=(130,), attend=attend)


def test_scratch_is_bounded() -> None:
    for bytes_per_token in (16 * 32 * 128 * 2, 32 * 128 * 2, 8 * 128 * 2, 3 * 96 * 4):
        tokens = scratch.stretch_tokens(bytes_per_token)
        assert tokens % scratch.PLANNED == 0 or tokens < scratch.PLANNED
        held = 2 * tokens * bytes_per_token
        assert held <= scratch.SCRATCH_BYTES < 2.3 * (tokens + 64) * bytes_per_token or tokens == 65536
    assert scratch.stretch_tokens(scratch.SCRATCH_BYTES // 2000) == 15 * 64
    assert scratch.stretch_tokens(scratch.SCRATCH_BYTES) == 64


@pytest.mark.parametrize("stretch", [64, 192, 16384, 65536])
def test_the_last_stretch_takes_what_is_too_little_for_one_of_its_own(stretch: int) -> None:
    for past in (0, 1, stretch, stretch + stretch // 8, stretch + stretch // 8 + 1, 3 * stretch, 9 * stretch + 5):
        whole = scratch.whole_stretches(stretch, past)
        last = past - whole * stretch
        assert 0 <= last <= stretch * 9 // 8 and (whole == 0 or last > stretch // 8)
        alone, room = scratch.room_of(stretch, past, 100, 1), scratch.room_of(stretch, past, 100, 3)
        assert max(last + 164, min(past, stretch)) == alone <= room <= alone + min(alone, stretch // 8)
    assert len({scratch.room_of(16384, past, 100, 3) for past in range(99999)}) < 20


def test_few_lengths_are_planned_for() -> None:
    assert list(scratch.planned_lengths(40000)) == [32768, 6144]
    assert list(scratch.planned_lengths(65536 + 2047)) == [65536] and not list(scratch.planned_lengths(2047))
    lengths = {length for tokens in range(1, 70000, 7) for length in scratch.planned_lengths(tokens)}
    assert lengths == {*range(2048, 16385, 2048), 32768, 65536}


@WAYS
def test_left_padding_and_rows_of_different_length(attend) -> None:
    assert run_case(new=70, heads=(2, 1), lengths=(0, 90), pads=(66, 0), sinks=0, attend=attend) < 2e-3
    assert run_case(new=9, heads=(4, 2), lengths=(0, 73, 0), pads=(2, 0, 2), sinks=0, attend=attend) < 2e-3


@pytest.mark.parametrize("before", [0, 2, 3, 40, 67, 131, 200])
def test_a_chunk_that_is_stored(before: int) -> None:
    """Of what is stored the queries are the last; three sinks, two pages, and a block's end somewhere among them."""
    heads, dim, new, sinks = 2, 64, 70, 3
    stored, frequencies = before + new, torch.full((dim // 2,), 0.1, device=DEVICE)
    sides = []
    for number, role in enumerate(("key", "value")):
        x = torch.randn(2, stored, heads * dim, generator=generator(number)).to(DEVICE)
        packed = packed_tensor(make_quantizer(heads * dim, "channel", 4, 0.01), x[:, :0], heads, role, [0, 0], dim // 2)
        packed.reserve(128, exactly=True)
        packed.reserve(stored, exactly=True)
        packed.write(slice(None), 0, packed.quantizer.encode(x[:, sinks:]))
        sides.append(packed)
    zeros = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    limits = zeros + stored
    segments: list[Segment] = [
        DenseSegment(*torch.randn(2, 2, heads, sinks, dim, generator=generator(2)).to(DEVICE), zeros, limits)
    ]
    for key_page, value_page in zip(sides[0].pages, sides[1].pages, strict=True):
        start = sinks + key_page.start
        segments.append(PackedSegment(sides[0], key_page, sides[1], value_page, zeros, limits, start))
    query = torch.randn(2, 4, new, dim, generator=generator(3)).to(DEVICE)
    positions = torch.arange(before, stored, device=DEVICE).expand(2, -1).contiguous()
    arguments = (query, positions, segments, Rotary.of(frequencies, dim), 0.1, heads)
    expected = attend_many(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(prefill, "attend_portably")
        assert relative_rms(attend_many(*arguments, 2 * [Known(before, stored, 0)]), expected.double()) < 3e-6


@pytest.mark.parametrize("known", [None, [Known(0, 0, 3)]])
def test_a_query_that_sees_nothing_gets_zeros(known: list[Known] | None) -> None:
    query = torch.randn(1, 1, 20, 64, generator=generator(0)).to(DEVICE)
    dense = torch.randn(2, 1, 1, 20, 64, generator=generator(1)).to(DEVICE)
    positions = torch.arange(-3, 17, device=DEVICE)[None].clamp(min=-1)
    segment = DenseSegment(*dense, torch.tensor([-3], device=DEVICE), None)
    rotary = Rotary.of(torch.full((32,), 0.1, device=DEVICE), 64)
    output = attend_many(query, positions, [segment], rotary, 0.1, 1, known)
    assert (output[:, :3] == 0).all()
    torch.testing.assert_close(output[0, 3, 0], dense[1, 0, 0, 3], rtol=1e-6, atol=1e-6)  # sees itself only
    assert (attend_many(query, positions, [], rotary, 0.1, 1) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_parts_are_merged_by_their_log_sum_exp(dtype: torch.dtype) -> None:
    """As all tokens at once, in double precision; one part may have seen nothing."""
    query, key, value = torch.randn(3, 2, 3, 40, 24, generator=generator(0), dtype=torch.float64)
    scores = 3 * query @ key.transpose(-1, -2)
    scores[0, 0, 5, :30] = scores[0, 1, 6] = -torch.inf
    parts = []
    for which in (slice(0, 30), slice(30, 40)):
        weights = scores[..., which].softmax(-1).nan_to_num(0.0)
        parts.append(
            ((weights @ value[:, :, which]).to(DEVICE, dtype), scores[..., which].logsumexp(-1).float().to(DEVICE))
        )
    output, lse = (
        torch.empty(2, 40, 3, 20, device=DEVICE),
        torch.empty(2, 3, 40, device=DEVICE),
    )  # channels of padding are left out
    merge(parts, output, lse)
    expected = (scores.softmax(-1).nan_to_num(0.0) @ value).transpose(1, 2)[..., :20]
    bound = 3e-6 if dtype == torch.float32 else 1e-3
    assert relative_rms(output.cpu(), expected) < bound
    torch.testing.assert_close(lse.cpu(), scores.logsumexp(-1).float())
    rounded = torch.empty_like(output, dtype=torch.float16)
    merge(parts, rounded)
    assert torch.equal(rounded, output.half())


@pytest.mark.parametrize("rotary_dim", [16, 32])
def test_partial_rotary_embeddings(rotary_dim: int) -> None:
    error = run_case(
        rotary_dim=rotary_dim,
        new=9,
        heads=(2, 1),
        lengths=(70,),
        factor=1.2,
        dtype=torch.float32,
        attend=attend_knowing,
    )
    assert error < 3e-6


def test_angles_are_exact_at_ten_million() -> None:
    near, far = (run_case(new=9, heads=(2, 1), lengths=(100,), base=base) for base in (0, 10_000_000))
    assert far < 1.2 * near


KINDS = [("channel", "token"), ("token", "channel"), ("mixed", "mixed"), ("groups", "groups")]


def unpacked_case(
    kinds: tuple[str, str], dim: int, share: float, bits: int = 3
) -> tuple[PackedSegment, Rotary, list[int], list[Tensor]]:
    """A page of four sequences of two heads at position 10,000,007, its rotation, lengths, and what its page reads, rotated in float64."""
    heads, base, lengths = 2, 10_000_000, [200, 64 + 10, 3 * 64 + 5, 20]
    sides = []
    for number, (kind, role) in enumerate(zip(kinds, ("key", "value"), strict=True)):
        x = torch.randn(len(lengths), max(lengths), heads * dim, generator=generator(number)).to(DEVICE)
        widths, channels = make_groups(heads, dim, role, dim // 2, 6) if kind == "groups" else (None, None)
        if widths is not None:
            widths = widths.clamp(max=max(bits, 3) + 3 * (bits == 6))
        quantizer = make_quantizer(heads * dim, kind, min(bits, 4), share, widths)
        if kind == "groups" and not share:
            quantizer = replace(quantizer, scheme=Scheme.parse("rdnuq2.4"))
        sides.append(packed_tensor(quantizer, x, heads, role, lengths, dim // 2, channels))
    limits = torch.tensor(lengths, device=DEVICE) + base
    origins = torch.full((len(lengths),), base - 7, device=DEVICE)
    segment = PackedSegment(sides[0], sides[0].pages[0], sides[1], sides[1].pages[0], origins, limits, 7)
    frequencies = (10000.0 ** (-torch.arange(dim // 2) / (dim // 2))).float().to(DEVICE)
    positions = base + torch.arange(64 * sides[0].pages[0].blocks, device=DEVICE)
    key, value = (side.read(side.pages[0]) for side in sides)
    expected = [rotate64(key, frequencies, positions[None]), value.double()]
    return segment, Rotary.of(frequencies, dim), lengths, expected


def assert_unpacked(
    result: Tensor,
    lengths: list[int],
    expected: list[Tensor],
    row0: int,
    first: int,
    blocks: int,
    at: int,
    bounds: tuple[float, float],
) -> None:
    """`[2, R, room, G, D]` has what is expected of some blocks, finite numbers where no token is, and beside them what it had."""
    for row, length in enumerate(lengths[row0:]):
        held = min(max(length - first * 64, 0), blocks * 64)
        for tokens, of_side, bound in zip(result[:, row], expected, bounds, strict=True):
            if held:
                own = tokens[at : at + held].transpose(0, 1)
                assert relative_rms(own, of_side[row + row0, :, first * 64 : first * 64 + held]) < bound
            assert tokens[at : at + blocks * 64].isfinite().all()
            assert tokens[:at].isnan().all() and tokens[at + blocks * 64 :].isnan().all()


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(("dim", "share"), [(64, 0.0), (96, 0.05)])
def test_unpacked_blocks_are_what_the_page_reads(kinds: tuple[str, str], dim: int, share: float) -> None:
    """The last sequence has nothing in these blocks, the first is not asked for."""
    segment, rotary, lengths, expected = unpacked_case(kinds, dim, share, 6)
    first, blocks, at, row0 = 1, 2, 3, 1
    result = torch.empty(2, len(lengths) - row0, (blocks + 1) * 64, 2, dim, device=DEVICE)
    unpack(segment, rotary, first, blocks, row0, *result, at)
    assert_unpacked(result, lengths, expected, row0, first, blocks, at, (1e-6, 1e-7))


@pytest.mark.parametrize("kinds", [("channel", "token"), ("channel", "channel"), ("groups", "groups")])
@pytest.mark.parametrize(
    ("dim", "bits", "share"), [(64, 4, 0.0), (64, 3, 0.01), (96, 2, 0.05), (128, 1, 0.0), (128, 4, 0.1), (256, 3, 0.02)]
)
def test_blocks_unpacked_in_cuda_are_what_the_page_reads(
    kinds: tuple[str, str], dim: int, bits: int, share: float
) -> None:
    """In fp16, which levels, tokens of the tile and results are rounded to."""
    segment, rotary, lengths, expected = unpacked_case(kinds, dim, share, bits)
    first, blocks, at, row0 = 1, 2, 3, 1
    result = torch.full(
        (2, len(lengths) - row0, (blocks + 1) * 64, 2, dim), torch.nan, dtype=torch.float16, device=DEVICE
    )
    assert unpack_host.fits(segment, rotary, result[0])
    if DEVICE.type == "cuda":
        unpack_host.unpack_by(runner(DEVICE), segment, rotary, first, blocks, row0, *result, at)
    elif has_compiler():
        unpack_host.unpack_by(kernels_on_cpu.run, segment, rotary, first, blocks, row0, *result, at)
    else:
        pytest.skip("no C++ compiler")
    assert_unpacked(result, lengths, expected, row0, first, blocks, at, (8e-4, 8e-4))


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
def test_the_host_knows_the_sizes_of_structures() -> None:
    for shape in (unpack_host.Shape(64, 2, 1), unpack_host.Shape(96, 1, 0)):
        assert kernels_on_cpu.sizes(shape) == [shape.shared_bytes, ctypes.sizeof(unpack_host.Params)]
