"""Attention of many queries: stretches of the packed past unpacked, and plain attention over them, against float64."""

from collections.abc import Iterator

import pytest
import torch
from test_kernels_attention import DEVICE, generator, make_quantizer, packed_tensor, relative_rms, rotate64, run_case
from torch import Tensor

from deployment.kernels import prefill
from deployment.kernels.packed import DenseSegment, PackedSegment
from deployment.kernels.phase import Rotary
from deployment.kernels.prefill import Tile, attend_many, stretch_blocks
from deployment.kernels.unpacking import Unpacking


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What nobody has written is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of `attend_many`."""
    seen: list[int] = []

    def counted(query: Tensor, positions: Tensor, segments, rotary, scaling: float, kv_heads: int) -> Tensor:
        seen.append(query.shape[1] * query.shape[2] // kv_heads)
        return attend_many(query, positions, segments, rotary, scaling, kv_heads)

    monkeypatch.setattr(prefill, "attend_many", counted)
    return seen


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_fragments(bits: int, dim: int) -> None:
    assert run_case(bits=(bits, bits), dim=dim, heads=(1, 1), new=17, lengths=(70,)) < 2e-3


@pytest.mark.parametrize(("dim", "bits"), [(96, 3), (20, 5), (6, 2), (256, 3)])
def test_other_heads(dim: int, bits: int) -> None:
    assert run_case(bits=(bits, bits), dim=dim, heads=(1, 1), new=17, lengths=(70,)) < 2e-3


@pytest.mark.parametrize("kinds", [("mixed", "mixed"), ("token", "token"), ("token", "channel")])
def test_axes_and_mixed_widths(kinds: tuple[str, str]) -> None:
    assert run_case(kinds=kinds, new=17, heads=(1, 1), lengths=(70, 30)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    bound = {torch.float16: 2e-3, torch.bfloat16: 6e-3, torch.float32: 3e-6}[dtype]
    assert run_case(dtype=dtype, new=9, heads=(4, 2), lengths=(130, 1)) < bound


@pytest.mark.parametrize(("heads", "new"), [((1, 1), 150), ((6, 2), 7), ((8, 1), 20)])
def test_groups(heads: tuple[int, int], new: int) -> None:
    assert run_case(heads=heads, new=new, lengths=(40,)) < 2e-3


@pytest.mark.parametrize("exact_chunk", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_outliers(share: float, exact_chunk: bool) -> None:
    assert run_case(share=share, new=10, exact_chunk=exact_chunk, lengths=(140, 30)) < 2e-3


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_context_comes_in_stretches(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams, dim = 2, 64
    monkeypatch.setattr(prefill, "SCRATCH_BYTES", blocks * 64 * streams * dim * 2 * 2)
    assert stretch_blocks([10_000], streams * dim * 2) == blocks
    assert run_case(new=9, heads=(2, 1), lengths=(300, 100)) < 2e-3


def test_scratch_is_bounded() -> None:
    bytes_per_token = 32 * 128 * 2
    blocks = stretch_blocks([10, 10**7, 100], bytes_per_token)
    assert 0.9 * prefill.SCRATCH_BYTES < blocks * 64 * 2 * bytes_per_token <= prefill.SCRATCH_BYTES
    assert stretch_blocks([10, 65], bytes_per_token) == 2
    assert stretch_blocks([10**7], prefill.SCRATCH_BYTES) == 1


@pytest.mark.parametrize("wide", [False, True])
def test_left_padding_and_large_tiles(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "_is_wide", lambda device: wide)
    tile = Tile.of(2 * 70, 64, False, wide)
    assert (tile.rows, tile.tokens) == (128, 128 if wide else 64)
    assert run_case(new=70, heads=(2, 1), lengths=(0, 90), pads=(66, 0), sinks=0) < 2e-3


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    query = torch.randn(1, 1, 20, 64, generator=generator(0)).to(DEVICE)
    dense = torch.randn(2, 1, 1, 20, 64, generator=generator(1)).to(DEVICE)
    positions = torch.arange(-3, 17, device=DEVICE)[None].clamp(min=-1)
    segment = DenseSegment(*dense, torch.tensor([-3], device=DEVICE), None)
    rotary = Rotary.of(torch.full((32,), 0.1, device=DEVICE), 64)
    output = attend_many(query, positions, [segment], rotary, 0.1, 1)
    assert (output[:, :3] == 0).all()
    assert torch.equal(output[0, 3, 0], dense[1, 0, 0, 3])  # sees itself only
    assert (attend_many(query, positions, [], rotary, 0.1, 1) == 0).all()


@pytest.mark.parametrize("rotary_dim", [16, 32])
def test_partial_rotary_embeddings(rotary_dim: int) -> None:
    error = run_case(rotary_dim=rotary_dim, new=9, heads=(2, 1), lengths=(70,), factor=1.2, dtype=torch.float32)
    assert error < 3e-6


def test_angles_are_exact_at_ten_million() -> None:
    near, far = (run_case(new=9, heads=(2, 1), lengths=(100,), base=base) for base in (0, 10_000_000))
    assert far < 1.2 * near


@pytest.mark.parametrize("kinds", [("channel", "token"), ("token", "channel"), ("mixed", "mixed")])
@pytest.mark.parametrize("share", [0.0, 0.05])
def test_unpacked_blocks_are_what_the_page_reads(kinds: tuple[str, str], share: float) -> None:
    heads, dim, base, first, blocks = 2, 64, 10_000_000, 1, 2
    lengths = [64 + 10, 3 * 64 + 5, 20]  # the last sequence has nothing in these blocks
    sides = []
    for number, (kind, role) in enumerate(zip(kinds, ("key", "value"), strict=True)):
        x = torch.randn(len(lengths), max(lengths), heads * dim, generator=generator(number)).to(DEVICE)
        sides.append(packed_tensor(make_quantizer(heads * dim, kind, 3, share), x, heads, role, lengths, True))
    limits = torch.tensor(lengths, device=DEVICE) + base
    origins = torch.full((len(lengths),), base - 7, device=DEVICE)
    segment = PackedSegment(sides[0], sides[0].pages[0], sides[1], sides[1].pages[0], origins, limits, 7)
    frequencies = (10000.0 ** (-torch.arange(dim // 2) / (dim // 2))).float().to(DEVICE)
    rotary = Rotary.of(frequencies, dim)
    turn = rotary.turn.transpose(1, 2).contiguous()
    key, value = torch.empty(2, len(lengths), heads, (blocks + 1) * 64, dim, device=DEVICE)
    Unpacking.of(segment, rotary, turn, key, value).run(first, blocks)

    positions = base + first * 64 + torch.arange(blocks * 64, device=DEVICE)
    expected_key, expected_value = (side.read(side.pages[0], first, blocks) for side in sides)
    expected_key = rotate64(expected_key, frequencies, positions[None])
    for row, length in enumerate(lengths):
        held = min(max(length - first * 64, 0), blocks * 64)
        if held:
            assert relative_rms(key[row, :, :held], expected_key[row, :, :held]) < 1e-6
            assert relative_rms(value[row, :, :held], expected_value[row, :, :held].double()) < 1e-7
        whole = -(-held // 64) * 64
        assert key[row, :, :whole].isfinite().all() and value[row, :, :whole].isfinite().all()
        assert key[row, :, whole:].isnan().all() and value[row, :, whole:].isnan().all()
