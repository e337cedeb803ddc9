"""Time and memory of a fit at the size of a large model, measured on synthetic records of a few of its layers.

    python -m scripts.bench.fit_shape --schemes nuq3-1% rdnuq3.4+fb --results scripts/results/fit_shape.jsonl
    python -m scripts.bench.fit_shape --layers 2 --of-layers 32 --heads 32 --head-dim 128 --windows 16 --seqlen 2048

The default is LLaMA-7B's shape with the paper's 16 x 2K calibration tokens: two layers are fitted, reading and checking
included, and the time is scaled to 32; memory does not grow with the number of layers. Activations are heavy-tailed,
channels of unequal size, Fisher information log-normal, moments of gradients random. Memory is the greatest sum, over this process and its workers,
of proportional set sizes (pages that processes share are divided among them), looked at ten times a second.
"""

import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig

from gradients.cli import command_parser, format_table, positive_int, run_command
from gradients.fingerprint import Fingerprint
from gradients.manifest import MOMENT_DTYPE, Manifest
from gradients.models import KINDS
from gradients.progress import progress
from gradients.records import Records
from quant.fit import fit
from quant.results import append_row, results_file
from quant.scheme import Scheme


def synthetic_records(folder: Path, layers: int, heads: int, head_dim: int, windows: int, seqlen: int) -> Records:
    """Records of random activations `[S, C]` with C = heads * head_dim."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        hidden_size=heads * head_dim,
    )
    manifest = Manifest(
        fingerprint=Fingerprint.of(config),
        text="synthetic",
        token_digest="none",
        seqlen=seqlen,
        windows=windows,
        moment_windows=1,
        seed=0,
        model="synthetic",
        model_dtype="float16",
        versions={},
    )
    records = Records.create(folder, manifest)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(heads * head_dim, generator=generator).exp()
    for window in progress(range(windows), desc="making records", unit="window"):
        tensors = {}
        for layer in range(layers):
            for kind in KINDS:
                if window == 0:
                    root = torch.randn(heads, head_dim, head_dim, generator=generator) + 3 * torch.eye(head_dim)
                    tensors[f"layers.{layer}.{kind}.moment"] = (1e-10 * root @ root.mT).to(MOMENT_DTYPE)
                normal = torch.randn(seqlen, heads * head_dim, generator=generator)
                fisher = torch.randn(seqlen, heads * head_dim, generator=generator).mul_(2).exp_()
                tensors[f"layers.{layer}.{kind}.activation"] = (normal * normal.abs().sqrt() * sizes).half()
                tensors[f"layers.{layer}.{kind}.fisher"] = (fisher * 1e-9).bfloat16()
        records.write(window, tensors)
    return records


class PeakMemory:
    """Within the block: watches this process and its children; `bytes` is the most they held together."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            held = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    held += process.memory_full_info().pss
                except psutil.Error:  # it has just ended
                    continue
            self.bytes = max(self.bytes, held)
            if self._done.wait(0.1):
                return


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.bench.fit_shape", __doc__)
    parser.add_argument("--schemes", nargs="+", default=["nuq3-1%", "rdnuq3.4+fb"])
    sizes = {"layers": 2, "of_layers": 32, "heads": 32, "head_dim": 128, "windows": 16, "seqlen": 2048, "jobs": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive_int, default=default)
    parser.add_argument("--folder", help="where the synthetic records go (default: a temporary folder)")
    parser.add_argument("--results", type=results_file, help="append a row per scheme to this JSONL file")
    arguments = parser.parse_args(argv)

    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        shape = (arguments.layers, arguments.heads, arguments.head_dim, arguments.windows, arguments.seqlen)
        records = synthetic_records(Path(folder), *shape)
        for name in arguments.schemes:
            with PeakMemory() as memory:
                started = time.perf_counter()
                fit(records, Scheme.parse(name), arguments.jobs)
                seconds = time.perf_counter() - started
            row = {
                "scheme": name,
                **{size: getattr(arguments, size) for size in sizes},
                "seconds": seconds,
                "scaled_minutes": seconds * arguments.of_layers / arguments.layers / 60,
                "peak_gb": memory.bytes / 1e9,
            }
            append_row(arguments.results, row, packages=("torch", "numpy"))
            rows.append(row)
    print(format_table(rows, "scheme seconds scaled_minutes peak_gb"))
    return {"rows": rows}


if __name__ == "__main__":
    run_command(main)
