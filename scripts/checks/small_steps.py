"""Every kernel once on small shapes, held against the torch path: quick enough to be watched.

    python -m scripts.checks.small_steps --device cuda
    compute-sanitizer --tool racecheck python -m scripts.checks.small_steps --device cuda --schemes nuq3-5%
    TRITON_INTERPRET=1 python -m scripts.checks.small_steps --device cpu --schemes nuq2

A layer stores a prompt in chunks and a token by itself, attends with one query per head, and with a chunk of them.
Schemes are of both layouts, with outliers and without. Exits with 1 if an output is not that of the torch path.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deployment.benchmark import append_call, decode_call
from deployment.devices import current
from deployment.measure.synthetic import Shape, make_case
from deployment.step.dispatch import runs_kernels
from gradients.cli import UserError, command_parser, format_table, positive_int, run_command
from gradients.placement import resolve_device
from quant.scheme import Scheme

SCHEMES = ("nuq4-1%", "nuq3-5%", "nuq2", "rdnuq2.4-4%")
_SHAPES = (Shape(2, 2, 64), Shape(8, 2, 128))  # one query to a KV head, and four
_LIMIT = 5e-3  # relative error of an output


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Root of the mean square of the difference, over that of what is expected."""
    error = (output.float() - expected.float()).square().mean() / expected.float().square().mean()
    return float(error.sqrt())


def steps(shape: Shape, scheme: Scheme, context: int, chunk: int, device: torch.device) -> dict[str, Any]:
    """Store, append, decode and prefill one layer; the errors of the latter two."""
    case = make_case(shape, scheme, context, 2, device, 0)
    if not runs_kernels("triton", case.layer, device):
        raise UserError(f"the kernels do not run on {device}; set TRITON_INTERPRET=1 for a CPU")
    append_call(case, kernels=True)()
    row: dict[str, Any] = {"scheme": scheme.describe(), "heads": shape.heads, "kv_heads": shape.kv_heads}
    for name, new in (("decode", 1), ("prefill", chunk)):
        outputs = []
        for kernels in (True, False):
            torch.manual_seed(new)
            outputs.append(decode_call(case, new, shape, kernels)())
        row[name] = relative_error(outputs[0], outputs[1].transpose(1, 2))
    return {**row, "works": all(row[name] < _LIMIT for name in ("decode", "prefill"))}


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.checks.small_steps", __doc__)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--context", type=positive_int, default=600, help="tokens, in whole blocks and one sink (600)")
    parser.add_argument("--chunk", type=positive_int, default=40, help="queries of a prefill (40)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    device, rows = torch.device(resolve_device(arguments.device)), []
    with current(device):
        for scheme in map(Scheme.parse, arguments.schemes):
            context = scheme.sink_tokens + arguments.context // 64 * 64
            rows += [steps(shape, scheme, context, arguments.chunk, device) for shape in _SHAPES]
    print(format_table(rows))
    return {"passed": all(row["works"] for row in rows), "rows": rows}


if __name__ == "__main__":
    run_command(main)
