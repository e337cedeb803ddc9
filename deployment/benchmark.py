"""Time one layer's attention over a packed cache against stock attention over an fp16 cache.

    python -m deployment.benchmark --shape llama-7b --scheme nuq3-1% --contexts 2K 32K 128K
    python -m deployment.benchmark --shape llama-3-8b --scheme rdnuq2.4 --contexts 128K --batch 4 --ops decode
    python -m deployment.benchmark --shape ./smollm2 --scheme nuq4-1% --contexts 2048

`append` stores one token per sequence, `chunk` 1024, `decode` attends one query per head and sequence, `prefill`
attends a chunk of 1024 over the context and itself, launches included. Bytes are those stored: of the packed cache, and
of K and V in fp16 for the stock attention, the fastest way to attend that is known (measure/fp16.py; `fp16_way` says
which). Their rate is compared with that of large copies measured on the same device. Several copies of the layer are
visited in turn, so that no cache of the device holds the data.
Numbers are random: what is timed does not depend on them, apart from the share of outliers, which is as the scheme
says.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deployment.devices import current
from deployment.measure.fp16 import decode_calls, prefill_calls
from deployment.measure.shapes import SHAPES, shape_config
from deployment.measure.synthetic import SPARE_TOKENS, Case, Shape, make_case, stored_bytes
from deployment.measure.timing import copy_rate, fastest, microseconds
from deployment.plan import parse_tokens
from deployment.step.append import append, append_with_kernels, join_window
from deployment.step.attend import attend_with_torch
from deployment.step.dispatch import attend, runs_kernels
from gradients.cli import command_parser, format_table, positive_int, run_command
from gradients.placement import resolve_device
from quant.options import add_scheme_arguments, scheme_from
from quant.results import append_row, results_file
from quant.scheme import Scheme

OPS = ("append", "chunk", "decode", "prefill")
_PREFILL = 512  # tokens
_FLUSH_BYTES = 2**28  # the copies of a layer together; more than any cache
_MOST_COPIES = 16

Calls = list[Callable[[], object]]


def decode_call(case: Case, new: int, shape: Shape, kernels: bool) -> Callable[[], Tensor]:
    """Attention of `new` queries per sequence and head, without storing their tokens."""
    batch, device = len(case.key), case.key.device
    query = torch.randn(batch, shape.heads, new, shape.head_dim, device=device).half()
    key, value = (torch.randn(batch, shape.kv_heads, new, shape.head_dim, device=device).half() for _ in range(2))
    scaling, padding = shape.head_dim**-0.5, [0] * batch
    layer, rope = case.layer, case.rope
    if kernels:
        return lambda: attend(layer, rope, query, join_window(layer, key, value, padding, True), padding, scaling)
    lengths = list(layer.lengths)
    return lambda: attend_with_torch(
        layer, rope, query, join_window(layer, key, value, padding), padding, scaling, lengths
    )


def append_call(case: Case, kernels: bool, tokens: int = 1) -> Callable[[], object]:
    """Store `tokens` per sequence, and take them back."""
    layer, batch = case.layer, len(case.key)
    key, value = _new_tokens(case, tokens)
    before = layer.stored.clone()

    def store() -> None:
        if kernels:
            append_with_kernels(layer, key, value, [0] * batch)
            layer.stored.copy_(before)
            layer.lengths, layer.slots = [length - tokens for length in layer.lengths], layer.slots - tokens
        else:
            append(layer, key, value, [0] * batch)
            layer.crop(-tokens)

    return store


def stock_append_call(case: Case, tokens: int = 1) -> Callable[[], object]:
    """Write the keys and values of `tokens` into an fp16 cache that has room."""
    key, value = _new_tokens(case, tokens)
    room = [torch.empty(*x.shape[:2], 2 * tokens, x.shape[3], dtype=x.dtype, device=x.device) for x in (key, value)]
    return lambda: (room[0][:, :, -tokens:].copy_(key), room[1][:, :, -tokens:].copy_(value))


def _new_tokens(case: Case, tokens: int) -> list[Tensor]:
    """Keys and values as the cache holds them, again from the first one on if there are not enough."""
    index = torch.arange(tokens, device=case.key.device) % case.key.shape[2]
    return [x.index_select(2, index) for x in (case.key, case.value)]


def benchmark(
    shape: Shape, scheme: Scheme, context: int, batch: int, ops: Sequence[str], device: torch.device, rate: float
) -> dict[str, Any]:
    """Timings of one shape, scheme and context on a device whose memory reaches `rate` bytes per second."""
    # whole blocks, so that an append can be repeated in place
    context = scheme.exact_tokens + -(-context // 64) * 64
    cases = [make_case(shape, scheme, context, batch, device, 0)]
    stored = stored_bytes(cases[0].layer)
    copies = min(_MOST_COPIES, -(-_FLUSH_BYTES // stored)) if device.type == "cuda" else 1
    cases += [make_case(shape, scheme, context, batch, device, seed) for seed in range(1, copies)]
    kernels = runs_kernels(None, cases[0].layer, device)
    fp16 = cases[0].key.nbytes * 2
    rows = []
    for name in ops:
        ours, ways = _calls(name, cases, shape, kernels)
        recorded = name != "prefill"  # chunks of a prompt are not, in use
        mean, error = microseconds(ours, device, recorded=recorded)
        way, reference = fastest(ways, device, recorded)
        moved = {"us": mean, "us_error": error, "fp16_us": reference, "speedup": reference / mean}
        ours_moved, stock_moved = (0, 0) if name in ("append", "chunk") else (stored, fp16)
        moved |= {"gb_per_s": ours_moved / mean / 1e3, "percent_of_copy": 1e8 * ours_moved / mean / rate}
        moved["fp16_percent_of_copy"] = 1e8 * stock_moved / reference / rate
        if name == "prefill":
            moved |= {"chunk": SPARE_TOKENS}
        rows.append({"op": name, **{key: round(value, 3) for key, value in moved.items()}, "fp16_way": way})
    tokens = context * batch
    return {
        "path": "triton" if kernels else "torch",
        "copy_gb_per_s": round(rate / 1e9, 1),
        "bytes_per_token": round(stored / tokens, 1),
        "fp16_bytes_per_token": fp16 / tokens,
        "bits_per_element": round(8 * stored / tokens / shape.channels / 2, 3),
        "ops": rows,
    }


def _calls(op: str, cases: Sequence[Case], shape: Shape, kernels: bool) -> tuple[Calls, dict[str, Calls]]:
    """(ours, ways to do it in fp16) of one operation, for every copy of the layer."""
    ours: Calls
    if op in ("append", "chunk"):
        tokens = 1 if op == "append" else SPARE_TOKENS
        ours = [append_call(case, kernels, tokens) for case in cases]
        return ours, {"copy": [stock_append_call(case, tokens) for case in cases]}
    new = 1 if op == "decode" else SPARE_TOKENS
    ours = [decode_call(case, new, shape, kernels) for case in cases]
    ways = [prefill_calls(case, new, shape) if op == "prefill" else decode_calls(case, shape) for case in cases]
    return ours, {name: [calls[name] for calls in ways] for name in ways[0]}


def parse_ops(text: str) -> list[str]:
    """argparse type: some of `OPS`, separated by commas, in their order there."""
    asked = text.split(",")
    if unknown := set(asked) - set(OPS):
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join(OPS)}")
    return [op for op in OPS if op in asked]


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("deployment.benchmark", __doc__)
    parser.add_argument("--shape", default="llama-7b", help=f"{', '.join(SHAPES)}, or a model")
    parser.add_argument("--scheme", default="nuq3-1%")
    add_scheme_arguments(parser, named=False)
    parser.add_argument(
        "--contexts", "--context", type=parse_tokens, nargs="+", default=[4096], help="tokens per sequence (4K)"
    )
    parser.add_argument("--batch", type=positive_int, default=1)
    parser.add_argument("--ops", type=parse_ops, default=list(OPS), help=f"some of {','.join(OPS)} (all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=results_file, help="JSONL file to append to")
    arguments = parser.parse_args(argv)

    device = torch.device(resolve_device(arguments.device))
    with current(device):
        return {"rows": _measured(arguments, device)}


def _measured(arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """The rows of all contexts, printed and appended to the results one by one."""
    scheme, shape = scheme_from(arguments.scheme, arguments), Shape.of(shape_config(arguments.shape))
    scheme.check_packable()
    rate, rows = copy_rate(device), []
    for context in arguments.contexts:
        row = {"shape": arguments.shape, "scheme": scheme.describe(), "batch": arguments.batch, "context": context}
        row |= benchmark(shape, scheme, context, arguments.batch, arguments.ops, device, rate)
        path = "Triton kernels" if row["path"] == "triton" else "the torch path, no kernels"
        print(f"{context} tokens, {path} on {device}; a copy moves {row['copy_gb_per_s']} GB/s; ", end="")
        print(f"{row['bytes_per_token']} bytes per token of one layer, fp16 {row['fp16_bytes_per_token']:g}")
        print(format_table(row["ops"]), flush=True)
        append_row(arguments.results, row)
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_command(main)
