"""Time one layer's attention over a packed cache against stock attention over an fp16 cache.

    python -m deployment.benchmark --shape llama-7b --scheme nuq3-1% --context 32768
    python -m deployment.benchmark --shape llama-3-8b --scheme rdnuq2.4 --context 131072 --batch 4
    python -m deployment.benchmark --shape ./smollm2 --scheme nuq4-1% --context 2048

`append` stores one token per sequence, `decode` attends one query per head and sequence, `prefill` attends a chunk of 512.
Bytes are those stored: of the packed cache, and of K and V in fp16 for the stock attention (SDPA). Their rate is compared with
that of a plain copy measured on the same device. Several copies of the layer are visited in turn, so that no cache of
the device holds the data, and on CUDA a graph of them is replayed, so that launches cost nothing. Numbers are
random: what is timed does not depend on them, apart from the share of outliers, which is as the scheme says.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from deployment.cache import PackedLayer
from deployment.kernels.dispatch import attend, runs_kernels
from deployment.rope import Rope
from deployment.step import attend_with_torch
from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from gradients.models import decoder_config
from quant.codebook import Codebook, int_codebook, nf_codebook
from quant.mixed import MixedQuantizer
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.results import append_row
from quant.scheme import Scheme

SHAPES = {"llama-7b": (32, 32, 128), "llama-3-8b": (32, 8, 128)}  # H, G, D
_PREFILL = 512
_FLUSH_BYTES = 2**28  # the copies of a layer together; more than any cache
_MOST_COPIES = 16
_FILL = 1024  # tokens stored at a time
_SECONDS = 0.3  # of measuring each
_REPEATS = 10


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head dim of a layer."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def named(cls, name: str) -> "Shape":
        """One of `SHAPES`, or that of a model."""
        if name in SHAPES:
            return cls(*SHAPES[name])
        try:
            config = decoder_config(AutoConfig.from_pretrained(name))
        except (OSError, ValueError) as error:
            raise UserError(f"shape {name!r} is none of {', '.join(SHAPES)} and no model either ({error})") from error
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_attention_heads, config.num_key_value_heads, dim)

    @property
    def channels(self) -> int:
        """C."""
        return self.kv_heads * self.head_dim


def synthetic_quantizers(scheme: Scheme, shape: Shape) -> tuple[Quantizer, Quantizer]:
    """Quantizers of standard normal keys and values, with the share of outliers that the scheme asks for."""
    if scheme.allocated:
        return tuple(_mixed(scheme, shape, seed) for seed in (0, 1))  # type: ignore[return-value]
    codebook = (int_codebook if scheme.datatype == "int" else nf_codebook)(scheme.levels)
    sides: list[Quantizer] = []
    for axis in (scheme.key_axis, scheme.value_axis):
        scale = torch.full((shape.channels,), _range_of(scheme.outliers))
        static = ChannelQuantizer(scheme, codebook, scale, torch.zeros(shape.channels))
        sides.append(static if axis == "channel" else TokenQuantizer(scheme, codebook))
    return sides[0], sides[1]


def _range_of(share: float) -> float:
    """Half the range beyond which that share of a standard normal lies."""
    return float(torch.special.ndtri(torch.tensor(1 - max(share, 1e-6) / 2, dtype=torch.float64)))


def _mixed(scheme: Scheme, shape: Shape, seed: int) -> MixedQuantizer:
    """Widths around the budget less half a percent of outliers, shuffled, as allocations look."""
    mean = scheme.bits - 32 * 0.005
    spread = torch.randn(shape.channels, generator=torch.Generator().manual_seed(seed))
    widths = (mean + spread).round().clamp(0, 6).to(torch.uint8)
    codebooks: dict[int, Codebook] = {int(w): int_codebook(2 ** int(w)) for w in widths.unique()}
    scale = torch.full((shape.channels,), _range_of(0.005))
    return MixedQuantizer(scheme, codebooks, widths, scale, torch.zeros(shape.channels))


@dataclass
class Case:
    """A filled packed layer, the same tokens in fp16, and queries."""

    layer: PackedLayer
    key: Tensor
    value: Tensor
    rope: Rope


def make_case(shape: Shape, scheme: Scheme, context: int, batch: int, device: torch.device, seed: int) -> Case:
    """Random keys and values of `context` tokens, stored in both ways."""
    generator = torch.Generator(device).manual_seed(seed)
    key, value = (
        torch.randn(batch, shape.kv_heads, context, shape.head_dim, generator=generator, device=device).half()
        for _ in range(2)
    )
    layer = PackedLayer(*synthetic_quantizers(scheme, shape), scheme.sink_tokens, context + _PREFILL)
    layer.lazy_initialization(key, value)
    kernels = runs_kernels(None, layer, device)
    for part in torch.arange(context).split(_FILL):
        chunk = slice(int(part[0]), int(part[-1]) + 1)
        if kernels:
            layer.append_with_kernels(key[:, :, chunk], value[:, :, chunk], [0] * batch, layer.no_padding)
        else:
            layer.append(key[:, :, chunk], value[:, :, chunk], [0] * batch)
    sizes = {"hidden_size": shape.heads * shape.head_dim, "num_attention_heads": shape.heads}
    config = LlamaConfig(**sizes, head_dim=shape.head_dim, max_position_embeddings=context + _PREFILL)
    return Case(layer, key, value, Rope(LlamaRotaryEmbedding(config).to(device)))


def stored_bytes(layer: PackedLayer) -> int:
    """Of the tokens a layer holds, without room for more."""
    capacity = sum(page.blocks for page in layer.packed["key"].pages) * 64
    total = 0
    for packed in layer.packed.values():
        for page in packed.pages:
            fixed = page.words.nbytes + (0 if page.scales is None else page.scales.nbytes)
            total += fixed * max(layer.lengths) // capacity
            if page.outliers is not None:
                total += int(page.outliers.lengths().sum()) * 4 + page.outliers.ends.nbytes
    return total + sum(sinks.nbytes for sinks in layer.sinks.values())


def microseconds(calls: Sequence[Callable[[], object]], device: torch.device) -> tuple[float, float]:
    """(mean, standard error) of one call, all of them made in turn."""
    for call in calls[:2]:
        call()
    run = _graph(calls) if device.type == "cuda" else lambda: [call() for call in calls]
    times = [_timed(run, 1, device)]
    count = max(1, int(_SECONDS / _REPEATS / max(times[0], 1e-7)))
    times = [_timed(run, count, device) / len(calls) for _ in range(_REPEATS if device.type == "cuda" else 3)]
    return statistics.mean(times) * 1e6, statistics.stdev(times) / math.sqrt(len(times)) * 1e6


def _graph(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _timed(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of one run."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - started) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def copy_rate(device: torch.device) -> float:
    """Bytes per second read and written by a plain copy."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**25, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    mean, _ = microseconds([lambda: target.copy_(source)], device)
    return 2 * source.nbytes / mean * 1e6


def decode_call(case: Case, new: int, shape: Shape, kernels: bool) -> Callable[[], Tensor]:
    """Attention of `new` queries per sequence and head, without storing their tokens."""
    batch, device = len(case.key), case.key.device
    query = torch.randn(batch, shape.heads, new, shape.head_dim, device=device).half()
    key, value = (torch.randn(batch, shape.kv_heads, new, shape.head_dim, device=device).half() for _ in range(2))
    scaling, padding = shape.head_dim**-0.5, [0] * batch
    if kernels:
        return lambda: attend(case.layer, case.rope, query, (key, value), padding, scaling)
    return lambda: attend_with_torch(
        case.layer, case.rope, query, (key, value), padding, scaling, list(case.layer.lengths)
    )


def append_call(case: Case, kernels: bool) -> Callable[[], object]:
    """Store one token per sequence, and take it back."""
    layer = case.layer
    key, value = case.key[:, :, :1].contiguous(), case.value[:, :, :1].contiguous()
    batch = len(case.key)
    before = layer.stored.clone()

    def store() -> None:
        if kernels:
            layer.append_with_kernels(key, value, [0] * batch, layer.no_padding)
            layer.stored.copy_(before)
            layer.lengths, layer.slots = [length - 1 for length in layer.lengths], layer.slots - 1
        else:
            layer.append(key, value, [0] * batch)
            layer.crop(-1)

    return store


def stock_call(case: Case, new: int, shape: Shape) -> Callable[[], Tensor]:
    """SDPA over the same tokens in fp16."""
    query = torch.randn(len(case.key), shape.heads, new, shape.head_dim, device=case.key.device).half()
    grouped = shape.heads != shape.kv_heads
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(query, case.key, case.value, enable_gqa=grouped)


def stock_append_call(case: Case) -> Callable[[], object]:
    """Write one token's keys and values into an fp16 cache that has room."""
    key, value = case.key[:, :, :1].clone(), case.value[:, :, :1].clone()
    return lambda: (case.key[:, :, -1:].copy_(key), case.value[:, :, -1:].copy_(value))


def benchmark(shape: Shape, scheme: Scheme, context: int, batch: int, device: torch.device) -> dict[str, Any]:
    """All timings of one shape, scheme and context."""
    # whole blocks, so that an append can be repeated in place
    context = scheme.sink_tokens + -(-context // 64) * 64
    cases = [make_case(shape, scheme, context, batch, device, 0)]
    stored = stored_bytes(cases[0].layer)
    copies = min(_MOST_COPIES, -(-_FLUSH_BYTES // stored)) if device.type == "cuda" else 1
    cases += [make_case(shape, scheme, context, batch, device, seed) for seed in range(1, copies)]
    kernels = runs_kernels(None, cases[0].layer, device)
    fp16 = cases[0].key.nbytes * 2
    rate = copy_rate(device)
    rows = []
    for name, ours, stock in (
        ("append", [append_call(c, kernels) for c in cases], [stock_append_call(c) for c in cases]),
        ("decode", *_both(cases, 1, shape, kernels)),
        ("prefill", *_both(cases, _PREFILL, shape, kernels)),
    ):
        mean, error = microseconds(ours, device)
        reference, _ = microseconds(stock, device)
        moved = {"us": mean, "us_error": error, "fp16_us": reference, "speedup": reference / mean}
        ours_moved, stock_moved = (0, 0) if name == "append" else (stored, fp16)
        moved |= {"gb_per_s": ours_moved / mean / 1e3, "percent_of_copy": 1e8 * ours_moved / mean / rate}
        moved["fp16_percent_of_copy"] = 1e8 * stock_moved / reference / rate
        rows.append({"op": name, **{key: round(value, 3) for key, value in moved.items()}})
    tokens = context * batch
    return {
        "path": "triton" if kernels else "torch",
        "copy_gb_per_s": round(rate / 1e9, 1),
        "bytes_per_token": round(stored / tokens, 1),
        "fp16_bytes_per_token": fp16 / tokens,
        "bits_per_element": round(8 * stored / tokens / shape.channels / 2, 3),
        "ops": rows,
    }


def _both(
    cases: list[Case], new: int, shape: Shape, kernels: bool
) -> tuple[list[Callable[[], object]], list[Callable[[], object]]]:
    return [decode_call(c, new, shape, kernels) for c in cases], [stock_call(c, new, shape) for c in cases]


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("deployment.benchmark", __doc__)
    parser.add_argument("--shape", default="llama-7b", help=f"{', '.join(SHAPES)}, or a model")
    parser.add_argument("--scheme", default="nuq3-1%")
    parser.add_argument("--context", type=positive_int, default=4096, help="tokens cached per sequence")
    parser.add_argument("--batch", type=positive_int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", help="JSONL file to append to")
    arguments = parser.parse_args(argv)

    device = torch.device(arguments.device)
    scheme, shape = Scheme.parse(arguments.scheme), Shape.named(arguments.shape)
    result = {
        **{name: getattr(arguments, name) for name in ("shape", "scheme", "context", "batch")},
        **benchmark(shape, scheme, arguments.context, arguments.batch, device),
    }
    path = "Triton kernels" if result["path"] == "triton" else "the torch path, no kernels"
    print(f"{path} on {device}; a copy moves {result['copy_gb_per_s']} GB/s; ", end="")
    print(f"{result['bytes_per_token']} bytes per token of one layer, fp16 {result['fp16_bytes_per_token']:g}")
    print(format_table(result["ops"]))
    append_row(arguments.results, result)
    return result


if __name__ == "__main__":
    run_command(main)
