"""The attention kernels against the torch path, on the device there is; without one in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
from conftest import SPANS, all_pairs
from torch import Tensor

from deployment.format.layout import PackedTensor
from deployment.format.order import rotary_groups
from deployment.kernels.packed import DenseSegment, PackedSegment, attend_packed
from deployment.kernels.phase import Rotary
from deployment.step.reference import Segment, attend_torch
from quant.codebook import Codebook, int_codebook, nf_codebook
from quant.mixed import MixedQuantizer
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.scheme import Scheme

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_groups(heads: int, dim: int, role: str, half: int, most: int = 4) -> tuple[Tensor, Tensor]:
    """(widths `[C]` of channels, `GroupOrder.channels` `[G, D]`): groups of any widths, of channels in any order."""
    widths = torch.randint(0, most + 1, (heads, dim // 16), generator=generator(3))
    numbers = [torch.randperm(dim // 2 if role == "key" else dim, generator=generator(4 + g)) for g in range(heads)]
    channels = torch.stack([rotary_groups(number.tolist(), half) if role == "key" else number for number in numbers])
    of_channels = torch.zeros(heads, dim, dtype=torch.int64).scatter(1, channels, widths.repeat_interleave(16, 1))
    return of_channels.flatten(), channels.to(DEVICE)


def make_quantizer(channels: int, kind: str, bits: int, share: float, widths: Tensor | None = None) -> Quantizer:
    scheme = Scheme(datatype="nf", bits=bits, outliers=min(share, 0.1))
    if kind == "token":
        return TokenQuantizer(scheme, int_codebook(2**bits)).to(DEVICE)
    scale = torch.rand(channels, generator=generator(1)) + 0.5
    if share == 1.0:  # ranges that hold nothing
        scale = torch.full_like(scale, 1e-6)
    zero = torch.randn(channels, generator=generator(2))
    if kind == "channel":
        return ChannelQuantizer(scheme, nf_codebook(2**bits), scale, zero).to(DEVICE)
    if widths is None:
        widths = torch.randint(0, 7, (channels,), generator=generator(3))
    widths = widths.to(torch.uint8)
    codebooks: dict[int, Codebook] = {int(w): int_codebook(2 ** int(w)) for w in widths.unique()}
    return MixedQuantizer(Scheme.parse("rdnuq2.4-4%"), codebooks, widths, scale, zero).to(DEVICE)


def rotary_tables(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions.double()[..., None] * frequencies.double()
    return angles.cos(), angles.sin()


def rotate64(x: Tensor, frequencies: Tensor, positions: Tensor, factor: float = 1.0) -> Tensor:
    """Reference rotation in float64: `x` `[B, heads, S, D]`, `positions` `[B, S]`."""
    cos, sin = (table[:, None] * factor for table in rotary_tables(frequencies, positions))
    half = len(frequencies)
    a, b, rest = x.double().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def packed_tensor(
    quantizer: Quantizer,
    x: Tensor,
    heads: int,
    role: str,
    lengths: list[int],
    half: int,
    channels: Tensor | None = None,
) -> PackedTensor:
    """Row b holds the first `lengths[b]` tokens of `x` `[B, T, C]`; what is not stored is poisoned."""
    packed = PackedTensor(quantizer, len(x), heads, x.shape[-1] // heads, DEVICE, role, half, channels)
    packed.reserve(max(lengths), exactly=True)
    for page in packed.pages:
        page.words.fill_(-1)
        if page.scales is not None:
            page.scales.fill_(torch.nan)
    for row, length in enumerate(lengths):
        if length:
            packed.write(torch.tensor([row], device=DEVICE), 0, packed.quantizer.encode(x[row : row + 1, :length]))
    for page in packed.pages:
        if page.outliers is not None:
            page.outliers = page.outliers.with_room(3)
    return packed


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    assert actual.isfinite().all()
    return float((actual.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def run_case(
    kinds: tuple[str, str] = ("channel", "token"),
    bits: tuple[int, int] = (3, 3),
    share: float = 0.01,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    lengths: tuple[int, ...] = (257,),
    new: int = 1,
    rotary_dim: int | None = None,
    dtype: torch.dtype = torch.float16,
    sinks: int = 1,
    exact_chunk: bool = True,
    pads: tuple[int, ...] | None = None,
    base: int = 0,
    factor: float = 1.0,
    attend: Callable[..., Tensor] = attend_packed,
    given: tuple[Quantizer, Quantizer] | None = None,
) -> float:
    """Relative RMS of a whole attention step, sinks, pages and chunk, against float64; `base` shifts all positions.

    Quantizers of keys and values are made unless they are `given`.
    """
    query_heads, kv_heads = heads
    batch, total = len(lengths), max(max(lengths), 1)
    pads = pads or (0,) * batch
    half = (rotary_dim or dim) // 2
    frequencies = (10000.0 ** (-torch.arange(half) / half)).float().to(DEVICE)
    x = {
        k: torch.randn(batch, total, kv_heads * dim, generator=generator(n)).to(DEVICE) * 1.5
        for n, k in enumerate("kv")
    }
    tensors, dense = [], []
    for kind, width, name, role in zip(kinds, bits, "kv", ("key", "value"), strict=True):
        widths, channels = make_groups(kv_heads, dim, role, half) if kind == "groups" else (None, None)
        made = make_quantizer(kv_heads * dim, kind, width, share, widths)
        quantizer = made if given is None else given[role == "value"].to(DEVICE)
        tensor = packed_tensor(quantizer, x[name], kv_heads, role, list(lengths), half, channels)
        tensors.append(tensor)
        tokens = torch.cat([tensor.read(page) for page in tensor.pages], dim=2) if tensor.pages else None
        dense.append(tokens)
    query = torch.randn(batch, new, query_heads, dim, generator=generator(5)).to(DEVICE, dtype).transpose(1, 2)
    chunk = [
        torch.randn(batch, new, kv_heads, dim, generator=generator(n)).to(DEVICE, dtype).transpose(1, 2) for n in (6, 7)
    ]
    sink = [torch.randn(batch, kv_heads, sinks, dim, generator=generator(n)).to(DEVICE, torch.float16) for n in (8, 9)]
    pad = torch.tensor(pads, device=DEVICE)
    stored = torch.tensor(lengths, device=DEVICE) + sinks + base
    origins = stored - pad
    positions = origins[:, None] + torch.arange(new, device=DEVICE)
    positions = positions.masked_fill(torch.arange(new, device=DEVICE) < pad[:, None], -1)
    if not exact_chunk:  # queries from the middle of what is stored
        positions = torch.tensor(
            [[max(base + sinks + length - 1 - 3 * n, 0) for n in range(new)] for length in lengths]
        ).to(DEVICE)
    zeros = torch.full((batch,), base, device=DEVICE)
    segments = []
    if sinks:
        segments.append(DenseSegment(sink[0], sink[1], zeros, stored))
    for key_page, value_page in zip(tensors[0].pages, tensors[1].pages, strict=True):
        segments.append(
            PackedSegment(tensors[0], key_page, tensors[1], value_page, zeros, stored, sinks + key_page.start)
        )
    if exact_chunk:
        segments.append(DenseSegment(chunk[0], chunk[1], origins, None))
    scaling = dim**-0.5
    rotary = Rotary.of(frequencies, dim, factor)
    output = attend(query, positions, segments, rotary, scaling, kv_heads)
    assert output.dtype == dtype and output.shape == (batch, new, query_heads, dim)

    reference = []
    rotated = rotate64(query, frequencies, positions.clamp(min=0), factor)
    pieces = [(sink[0], sink[1], zeros, stored)] if sinks else []
    if tensors[0].pages:
        pieces.append((dense[0], dense[1], zeros + sinks, stored))
    if exact_chunk:
        pieces.append((*chunk, origins, origins + new))
    for key, value, origin, limit in pieces:
        where = origin[:, None] + torch.arange(key.shape[2], device=DEVICE)
        visible = (where[:, None] <= positions[..., None]) & (where < limit[:, None])[:, None] & (where >= 0)[:, None]
        turned = rotate64(key.nan_to_num(), frequencies, where, factor)
        reference.append(Segment(turned.float(), value.float().nan_to_num(), visible))
    expected = attend_torch(rotated.float(), reference, scaling).transpose(1, 2)
    return relative_rms(output, expected)


LENGTHS = [0, 1, 31, 33, 257, 1000]


@pytest.mark.parametrize("length", LENGTHS)
def test_awkward_lengths(length: int) -> None:
    assert run_case(lengths=(length,)) < 2e-3


# every width of either side with the smallest heads, and once with each of the others
FRAGMENTS = [(2, 2), (3, 3), (4, 4), (4, 2), (2, 3)]
LARGER = {128: [(3, 3), (4, 2)], 256: [(4, 4), (2, 3)]}


@pytest.mark.parametrize(
    ("dim", "bits"), all_pairs([64, 128, 256], FRAGMENTS, lambda dim, bits: bits in LARGER.get(dim, FRAGMENTS))
)
def test_fragments(dim: int, bits: tuple[int, int]) -> None:
    assert run_case(bits=bits, dim=dim, heads=(2, 1), lengths=(70,)) < 2e-3


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (8, 1), (5, 1)])
def test_groups(heads: tuple[int, int]) -> None:
    assert run_case(heads=heads, lengths=(100,)) < 2e-3


def test_one_query_of_keys_of_two_bits() -> None:
    assert run_case(heads=(1, 1), bits=(2, 3), lengths=(300,)) < 2e-3


@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize("dim", [20, 96])
def test_other_widths_and_heads(bits: int, dim: int) -> None:
    assert run_case(bits=(bits, bits), dim=dim, lengths=(100,)) < 2e-3


@pytest.mark.parametrize(
    "kinds", [("groups", "groups"), ("mixed", "mixed"), ("token", "token"), ("token", "channel"), ("mixed", "token")]
)
def test_axes_and_mixed_widths(kinds: tuple[str, str]) -> None:
    assert run_case(kinds=kinds, lengths=(150, 70)) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    bound = {torch.float16: 2e-3, torch.bfloat16: 6e-3, torch.float32: 3e-6}[dtype]
    assert run_case(dtype=dtype, lengths=(300, 1)) < bound


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_shares_of_outliers(share: float) -> None:
    assert run_case(share=share, lengths=(140,)) < 2e-3


@pytest.mark.parametrize(("dim", "span"), SPANS)
def test_outliers_beyond_the_span_of_an_index(dim: int, span: int) -> None:
    """A chunk is no longer than a span, but begins anywhere in one."""
    assert run_case(dim=dim, heads=(1, 1), lengths=(2 * span + 70,), share=0.1) < 2e-3


@pytest.mark.parametrize("new", [1, 20])
def test_a_full_page_of_outliers(new: int) -> None:
    assert run_case(kinds=("channel", "channel"), share=1.0, lengths=(64, 31), new=new) < 2e-3


# one query with an exact chunk is most other tests; of several, 40 go another way than 5
@pytest.mark.parametrize(
    ("exact_chunk", "new"),
    all_pairs([True, False], [1, 5, 40], lambda exact, new: (exact, new) not in {(True, 1), (False, 5)}),
)
def test_many_queries(exact_chunk: bool, new: int) -> None:
    assert run_case(new=new, lengths=(140, 30), exact_chunk=exact_chunk, heads=(6, 2)) < 2e-3


def test_padding_inside_the_chunk() -> None:
    assert run_case(new=9, lengths=(0, 90), pads=(4, 0), sinks=0) < 2e-3


def test_sinks_only() -> None:
    assert run_case(lengths=(0, 0), sinks=5, exact_chunk=False) < 2e-3


@pytest.mark.parametrize(("sinks", "new"), all_pairs([16, 17, 40], [1, 5], lambda sinks, new: (sinks, new) != (40, 5)))
def test_plain_tokens_are_few_or_many(sinks: int, new: int) -> None:
    """Up to 16 are done on the side."""
    assert run_case(lengths=(70, 3), sinks=sinks, new=new, heads=(6, 2), dim=96, rotary_dim=48) < 2e-3
    assert run_case(lengths=(0,), sinks=sinks, new=new, dtype=torch.float32) < 3e-6


@pytest.mark.parametrize("rotary_dim", [16, 32])
def test_partial_rotary_embeddings(rotary_dim: int) -> None:
    assert run_case(rotary_dim=rotary_dim, lengths=(100,), factor=1.2, dtype=torch.float32) < 3e-6


def test_angles_are_exact_at_ten_million() -> None:
    near = run_case(lengths=(200,), kinds=("channel", "token"))
    far = run_case(lengths=(200,), kinds=("channel", "token"), base=10_000_000)
    assert far < 1.2 * near
