"""How much memory a context takes with a packed cache, and on how many GPUs it fits. No weights are needed.

    python -m deployment.plan --shape llama-7b --scheme nuq2-1% --context 128K --gpus 8
    python -m deployment.plan --model ./smollm2 --scheme rdnuq2.4 --gpu-memory 24GiB --weight-bits 4
    python -m deployment.plan --shape llama-3-8b --scheme nuq2 --context 10000000 --tensor-parallel 4   # bytes of each GPU

Cached bytes are those that `deployment/format/layout.py` stores when the capacity is known in advance. Outliers are counted
exactly where a token has a fixed number, else as the share that calibration aims at; rdnuq keeps its average over all
layers. The room that kernels keep for outliers to come is told and counted apart. Only layers that cache their whole past count as cache; what sliding windows keep enters the fit alone. A GPU
holds whole layers, weights and cache, as `--device auto` places them, or with `--tensor-parallel N` an N-th of the heads of every
layer, of which all bytes are then told; and the activations of a prefill chunk, estimated in `deployment/measure/shapes.py`. GB is 10^9 bytes, GiB 2^30 (an A100-80GB has 80 GiB); K and M of tokens are 1024 and 1024^2.

The paper's sizes are of the cache alone, in GiB though called GB; Table 1 (128K tokens) counts outliers. Its 64 GB for
LLaMA-7B, 2 bits and 1M tokens are codes without scales and outliers: on 80 GiB they leave 16 for 12.6 of weights and for
activations; 1 % outliers (10.5 more) do not fit. Its 611.5 GB for 10M tokens on 8 GPUs are 10^7 tokens, with scales,
without outliers. Its 46.5 GB for LLaMA-65B, nuq2-1% and 32K tokens are what 128K need.
"""

import argparse
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deployment.measure.shapes import SHAPES, ModelShape, load_config, named_config
from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from quant.options import add_scheme_arguments, scheme_from
from quant.scheme import Scheme
from quant.storage import BLOCK_TOKENS

GIB = 1 << 30
CONTEXTS = (1 << 15, 1 << 17, 1 << 20, 10**7)
SCHEMES = ("fp16", "nuq4-1%", "nuq4", "nuq3-1%", "nuq3", "nuq2-1%", "nuq2")
_BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": GIB, "TIB": 1 << 40}
_TOKENS = {"": 1, "K": 1 << 10, "M": 1 << 20}


@dataclass(frozen=True)
class Plan:
    """A model, a scheme (None: fp16) and the GPUs they are to run on."""

    shape: ModelShape
    scheme: Scheme | None
    gpu_memory: int  # bytes of each
    gpus: int = 1
    weight_bits: float = 16.0
    prefill_chunk: int = 1024  # tokens of each sequence

    def sizes(self, tokens: int) -> dict[str, int]:
        """Bytes of one sequence and of all else, by what they are for."""
        shape, cache = self.shape, self.shape.cache_bytes(self.scheme, tokens)
        return cache | {
            "cache": sum(cache.values()),
            "outlier_room": len(shape.cached) * shape.room_bytes(self.scheme, tokens, self.prefill_chunk),
            "sliding_windows": (len(shape.layers) - len(shape.cached)) * shape.window_bytes(tokens),
            "weights": shape.weight_bytes(self.weight_bits),
            "prefill_activations": shape.activation_bytes(self.scheme, min(tokens, self.prefill_chunk), 1, tokens),
            "decode_activations": shape.activation_bytes(self.scheme, 1, 1, tokens),
        }

    def gpus_needed(self, tokens: int, batch: int = 1) -> int | None:
        """GPUs, filled layer by layer, that hold `batch` sequences of `tokens`; None if a single layer is too large.

        Of a tensor-parallel model all of its parts' GPUs, or None.
        """
        new = min(tokens, self.prefill_chunk)
        room = self.gpu_memory - self.shape.activation_bytes(self.scheme, new, batch, tokens)
        if self.shape.parts > 1:
            held = sum(self.shape.pieces(self.scheme, tokens, self.weight_bits, batch, room=new))
            return self.shape.parts if held <= room else None
        needed, free = 1, room
        for size in self.shape.pieces(self.scheme, tokens, self.weight_bits, batch, room=new):
            if size > room:
                return None
            if size > free:
                needed, free = needed + 1, room
            free -= size
        return needed

    def fits(self, tokens: int, batch: int = 1) -> bool:
        """Whether there are GPUs enough."""
        needed = self.gpus_needed(tokens, batch)
        return needed is not None and needed <= self.gpus

    def largest_context(self, batch: int = 1) -> int:
        """Most tokens per sequence that fit, in whole blocks beside the exact tokens; 0 if not even one block does."""
        exact = 0 if self.scheme is None else self.scheme.exact_tokens
        blocks = _largest(lambda count: self.fits(exact + count * BLOCK_TOKENS, batch))
        return exact + blocks * BLOCK_TOKENS if blocks else 0

    def largest_batch(self, tokens: int) -> int:
        """Most sequences of `tokens` that fit, 0 if not even one does."""
        return _largest(lambda batch: self.fits(tokens, batch))


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest number for which `holds`, which is true up to it and false beyond; 0 if it is never true."""
    return bisect_left(range(1, 1 << 50), True, key=lambda number: not holds(number))


def _quantity(units: Mapping[str, float], example: str) -> Callable[[str], int]:
    """argparse type: a positive number and a unit."""

    def parse(text: str) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip(), re.IGNORECASE)
        number = float(match[1]) * units.get(match[2].upper(), 0) if match else 0
        if number < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive number such as {example}")
        return int(number)

    return parse


parse_bytes = _quantity(_BYTES, "80GiB, 24GB or 512MiB")
parse_tokens = _quantity(_TOKENS, "131072, 128K or 1M")


def _scheme(name: str, arguments: argparse.Namespace) -> Scheme | None:
    """The scheme of a name, None for fp16. Raises `UserError` for one that no packed cache holds."""
    scheme = None if name == "fp16" else scheme_from(name, arguments)
    if scheme is not None:
        scheme.check_packable()
    return scheme


def _table(plan: Plan, schemes: Mapping[str, Scheme | None]) -> list[dict[str, Any]]:
    """Every scheme at every context."""
    rows: list[dict[str, Any]] = []
    for name, other in ((name, replace(plan, scheme=scheme)) for name, scheme in schemes.items()):
        for tokens in CONTEXTS:
            needed = {"gpus_needed": other.gpus_needed(tokens), "fits": other.fits(tokens)}
            rows.append({"scheme": name, "context": tokens, "cache_bytes": other.sizes(tokens)["cache"], **needed})
    return rows


def _show(result: Mapping[str, Any]) -> str:
    """What a person wants to read of a summary."""
    each = {part: f"{size:.1f}" for part, size in result["bytes_per_token"].items()}
    parts = [
        {"what": part.replace("_", " "), "bytes/token": each.get(part, ""), "GiB": f"{size / GIB:.3f}"}
        for part, size in result["bytes"].items()
        if size
    ]
    lines: dict[str, dict[str, str]] = {}
    for row in result["table"]:
        cell = f"{row['cache_bytes'] / GIB:.1f} ({row['gpus_needed'] if row['fits'] else 'no'})"
        lines.setdefault(row["scheme"], {"scheme": row["scheme"]})[f"{row['context']:,}"] = cell
    each_gpu = "" if result["tensor_parallel"] == 1 else f"on each of {result['tensor_parallel']} GPUs: "
    return f"""{result["model"]}, {result["scheme"]}, {each_gpu}one sequence of {result["context"]:,} tokens
(the cache is that of {result["cached_layers"]} layers of {result["layers"]}: those that cache their whole past)

{format_table(parts)}

GiB of cache by tokens of context, and how many GPUs of {result["gpu_memory"] / GIB:.1f} GiB hold it with weights
and the activations of {result["prefill_chunk"]} tokens of each sequence (no: more than {result["gpus"]})

{format_table(list(lines.values()))}

largest context {result["largest_context"]:,}; largest batch of {result["context"]:,} tokens {result["largest_batch"]}
"""


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("deployment.plan", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="hub id or local folder; only its config is read")
    model.add_argument("--shape", help=", ".join(SHAPES))
    parser.add_argument("--full-attention", action="store_true", help="treat sliding-window layers as fully attending")
    parser.add_argument("--scheme", required=True, help="fp16, or as for quant.fit: nuq3-1%%, nuq2, rdnuq2.4")
    add_scheme_arguments(parser, named=False)
    parser.add_argument("--context", type=parse_tokens, default=1 << 17, help="tokens of a sequence (128K)")
    parser.add_argument("--gpu-memory", type=parse_bytes, default=80 * GIB, help="free memory of each (80GiB)")
    parser.add_argument("--gpus", type=positive_int, default=1)
    parser.add_argument(
        "--tensor-parallel", type=positive_int, default=1, metavar="N", help="GPUs that share every layer"
    )
    parser.add_argument("--weight-bits", type=float, default=16.0, help="of a parameter, on average (16)")
    parser.add_argument("--prefill-chunk", type=positive_int, default=1024, help="tokens per forward")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    arguments = _parser().parse_args(argv)
    if not 0 < arguments.weight_bits <= 32:
        raise UserError(f"--weight-bits {arguments.weight_bits:g} is not within 0-32; use 16, or 4 for 4-bit weights")
    schemes = {name: _scheme(name, arguments) for name in dict.fromkeys((*SCHEMES, arguments.scheme))}
    shape, model, tokens = arguments.shape, arguments.model, arguments.context
    config = load_config(model, arguments.full_attention) if shape is None else named_config(shape)
    machine = {name: getattr(arguments, name) for name in ("gpu_memory", "gpus", "weight_bits", "prefill_chunk")}
    if arguments.tensor_parallel > 1:
        if arguments.gpus not in (1, arguments.tensor_parallel):
            raise UserError(
                f"--gpus {arguments.gpus} and --tensor-parallel {arguments.tensor_parallel} differ; drop --gpus"
            )
        machine["gpus"] = arguments.tensor_parallel
    plan = Plan(ModelShape.of(config, arguments.tensor_parallel), schemes[arguments.scheme], **machine)
    result = {
        "model": model if shape is None else shape,
        "scheme": plan.scheme.describe() if plan.scheme else "fp16",
        "layers": len(plan.shape.layers),
        "cached_layers": len(plan.shape.cached),
        **machine,
        "tensor_parallel": arguments.tensor_parallel,
        "context": tokens,
        "bytes": plan.sizes(tokens),
        "bytes_per_token": plan.shape.bytes_per_token(plan.scheme),
        "gpus_needed": plan.gpus_needed(tokens),
        "largest_context": plan.largest_context(),
        "largest_batch": plan.largest_batch(tokens),
        "table": _table(plan, schemes),
    }
    print(_show(result))
    return result


if __name__ == "__main__":
    run_command(main)
