"""Decode steps that the host has no part in: recorded in a CUDA graph, or merely not waiting for the device."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

pytest.importorskip("triton")

from deployment.attention import padding_mask
from deployment.kernels import packed as attention
from deployment.kernels import unpacking
from deployment.kernels.decode import host
from deployment.layer import PackedLayer
from deployment.measure.synthetic import Shape, synthetic_quantizers
from deployment.rope import Rope
from deployment.step import dispatch
from deployment.step.asked import Backend, Step
from deployment.step.attend import attend_step
from deployment.step.recount import recount, reserve
from quant.scheme import Scheme

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = Shape(heads=2, kv_heads=1, head_dim=64)
PADDING = 3  # of the first row
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type != "cuda", reason="records CUDA graphs")]


class Decoder:
    """A layer that holds a chunk of `past` tokens, less padding, and steps through the same random tokens as any other."""

    def __init__(self, past: int, scheme: str = "nuq3-5%", window: int = 0, exact_chunk: bool = True) -> None:
        parsed = Scheme.parse(scheme)
        config = LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=1024)
        sides, options = synthetic_quantizers(parsed, SHAPE), {"exact_chunk": exact_chunk, "residual_tokens": window}
        self.layer = PackedLayer(*sides, parsed.sink_tokens, **options)
        self.rope = Rope(LlamaRotaryEmbedding(config).to(DEVICE))
        mask = torch.ones(2, past, dtype=torch.bool, device=DEVICE)
        mask[0, :PADDING] = False
        # interpreting kernels would be slow; on a GPU the prompt's step makes the tables that a recording could not
        self.step(self.tokens(past, seed=0), mask, "triton" if DEVICE.type == "cuda" else "torch")

    @staticmethod
    def tokens(new: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(2, heads, new, 64, generator=generator).half().to(DEVICE) for heads in (2, 1, 1)]

    def step(self, tokens: list[Tensor], mask: Tensor, backend: Backend = "triton") -> Tensor:
        """One step, as the attention function takes it; `mask` `[B, T + S]`."""
        new, total = tokens[0].shape[2], mask.shape[1]
        seen = padding_mask(2, new, total, q_offset=total - new, attention_mask=mask)
        self.layer.expect(*tokens[1:])
        return attend_step(Step(self.layer, self.rope, *tokens, 0.125, seen, backend=backend))


def grown(total: int) -> Tensor:
    mask = torch.ones(2, total, dtype=torch.bool, device=DEVICE)
    mask[0, :PADDING] = False
    return mask


def assert_same(output: Tensor, expected: Tensor) -> None:
    """But for the order in which outliers are added."""
    error = (output.float() - expected.float()).square().mean().sqrt()
    assert error < 2e-3 * expected.float().square().mean().sqrt()


def assert_holds_the_same(layer: PackedLayer, other: PackedLayer) -> None:
    assert layer.lengths == other.lengths == layer.stored.tolist() and layer.slots == other.slots
    for kind, packed in layer.packed.items():
        page, twin = packed.pages[0], other.packed[kind].pages[0]
        blocks = min(page.blocks, twin.blocks)
        assert torch.equal(page.words[:, :blocks], twin.words[:, :blocks])
        assert torch.equal(packed.read(page, 0, blocks), other.packed[kind].read(twin, 0, blocks))
        assert torch.equal(layer.sinks[kind], other.sinks[kind])
        if layer.window is not None:
            slots = min(max(layer.lengths), layer.residual_tokens)
            recent = [one.window.recent[kind][1, :, -slots:] for one in (layer, other)]
            assert torch.equal(recent[0], recent[1])


@pytest.mark.parametrize(
    ("window", "past", "cropped"),
    [
        pytest.param(0, 64, 0, id="across the end of a block: a sink, then 63"),
        pytest.param(70, 134, 0, id="with a window"),
        pytest.param(9, 9, 0, id="a window that becomes full, of a row and then the other"),
        pytest.param(9, 31, 1, id="a token that came back does not leave again"),
    ],
)
def test_steps_do_not_need_what_the_host_has_counted(window: int, past: int, cropped: int, monkeypatch) -> None:
    """As in a graph's replays: the host's lengths stay at those of the recording."""
    steps = 2
    recorded, direct = (Decoder(past + cropped, window=window) for _ in range(2))
    for decoder in (recorded, direct):
        decoder.layer.crop(-cropped)
    reserve(recorded.layer, steps)
    for module in ("deployment.step.append", "deployment.step.dispatch"):
        monkeypatch.setattr(f"{module}.is_capturing", lambda _device: True)
    lengths, slots = list(recorded.layer.lengths), recorded.layer.slots
    outputs = []
    for number in range(steps):
        recorded.layer.lengths, recorded.layer.slots = list(lengths), slots
        outputs.append(recorded.step(Decoder.tokens(1, seed=1 + number), grown(past + 1)))
    recount([recorded.layer])
    monkeypatch.undo()
    for number, output in enumerate(outputs):
        assert_same(output, direct.step(Decoder.tokens(1, seed=1 + number), grown(past + 1 + number)))
    assert_holds_the_same(recorded.layer, direct.layer)


@pytest.mark.parametrize(
    ("window", "chunk", "exact_chunk"), [(12, 1, True), (12, 1, False), (12, 5, True), (3, 9, True)]
)
def test_kernels_and_torch_hold_and_say_the_same(window: int, chunk: int, exact_chunk: bool) -> None:
    past = 15
    ours, other = (Decoder(past, window=window, exact_chunk=exact_chunk) for _ in range(2))
    for number in range(2):
        total = past + chunk * (number + 1)
        tokens = Decoder.tokens(chunk, seed=1 + number)
        assert_same(ours.step(tokens, grown(total)), other.step(tokens, grown(total), "torch"))
    assert_holds_the_same(ours.layer, other.layer)


def test_reserving_makes_what_takes_the_host() -> None:
    """While a graph is captured nobody may be asked."""
    layer = Decoder(60, "nuq3-5%").layer
    for known in (host._fixed, unpacking._permuted):
        known.clear()
    reserve(layer, 2)
    assert all(tensor in known for tensor in layer.packed.values() for known in (host._fixed, unpacking._permuted))


def test_a_step_without_padding_computes_no_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch less."""
    layer, rope, query, newest = Decoder(60).layer, Decoder(1).rope, torch.zeros(2, 2, 1, 64, device=DEVICE), []
    monkeypatch.setattr(attention, "attend_packed", lambda *arguments: newest.append(arguments[2][-1]) or query)
    chunk = torch.zeros(2, 2, 1, 1, 64, device=DEVICE)
    for padding in ([0, 0], [1, 0]):
        dispatch.attend(layer, rope, query, (chunk[0], chunk[1]), padding, 0.125)
    assert [segment.origins.data_ptr() == layer.stored.data_ptr() for segment in newest] == [True, False]


@pytest.mark.parametrize("past", [60, 500])
@pytest.mark.parametrize(
    ("scheme", "window"), [("nuq4-1%", 0), ("nuq3-5%", 0), ("nuq2", 0), ("nuq2", 70), ("nuq3-5%", 128)]
)
class TestOnAGPU:
    pytestmark = needs_gpu

    def test_a_recorded_step_is_replayed(self, past: int, scheme: str, window: int) -> None:
        steps = 20
        recorded, direct, warm = (Decoder(past, scheme, window) for _ in range(3))
        reserve(warm.layer, steps)
        inputs = Decoder.tokens(1, seed=1)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # what a recording must not compile
            warm.step(inputs, grown(past + 1))
        torch.cuda.synchronize()
        reserve(recorded.layer, steps)
        graph, mask = torch.cuda.CUDAGraph(), grown(past + 1)
        with torch.cuda.graph(graph):
            output = recorded.step(inputs, mask)
        for number in range(steps):
            for held, new in zip(inputs, Decoder.tokens(1, seed=1 + number), strict=True):
                held.copy_(new)
            graph.replay()
            assert_same(output, direct.step(Decoder.tokens(1, seed=1 + number), grown(past + 1 + number)))
        recount([recorded.layer])
        assert_holds_the_same(recorded.layer, direct.layer)

    def test_a_decode_step_never_waits(self, past: int, scheme: str, window: int) -> None:
        decoder = Decoder(past, scheme, window)
        for number in range(2):  # compiles, and makes room for the outliers of 64 tokens
            decoder.step(Decoder.tokens(1, seed=1 + number), grown(past + 1 + number))
        tokens, mask = Decoder.tokens(1, seed=5), grown(past + 3)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoder.step(tokens, mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert decoder.layer.lengths == decoder.layer.stored.tolist() == [past, past + 3]
