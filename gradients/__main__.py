"""Record a calibration text: pre-RoPE keys, values and their Fisher information, window by window.

    python -m gradients --model meta-llama/Llama-2-7b-hf --text wikitext2 --output records/
    python -m gradients --model ./smollm2 --text notes.txt:0-50 --windows 16 --seqlen 512 --output records/
    accelerate launch -m gradients --model ... --text c4 --output records/     # the windows split over processes
    torchrun --nproc-per-node 2 -m gradients ...                               # the same without a GPU

An interrupted run continues where it stopped. The folder is all that `python -m quant.fit` needs.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import torch

from gradients.cli import UserError, command_parser, non_negative_int, positive_int, run_command
from gradients.fingerprint import Fingerprint
from gradients.fisher import record_window
from gradients.loading import LoadedModel, holds_gguf, load_model
from gradients.manifest import Manifest
from gradients.models import decoder_config, kv_sites
from gradients.parallel import WHOLE, Part
from gradients.placement import STRATEGIES
from gradients.positions import usable_positions
from gradients.processes import gathered, own_share, process_state
from gradients.progress import progress
from gradients.records import Records, claimed
from gradients.rope import rope_tables
from gradients.text import Corpus, load_corpus


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model --dtype --device --device-map ...`, spelled alike in every command that runs a model."""
    parser.add_argument("--model", required=True, help="hub id, local folder, or folder of GGUF weights")
    parser.add_argument("--dtype", default="auto", help="torch dtype; auto: the checkpoint's, on the CPU float32")
    parser.add_argument("--device", default="auto", help="torch device; auto: all accelerators, then CPU memory")
    parser.add_argument(
        "--device-map",
        metavar="MAP",
        help=f"spread the layers over devices: {', '.join(STRATEGIES)}, or a JSON file of modules and devices",
    )
    parser.add_argument(
        "--full-attention",
        action="store_true",
        help="treat sliding-window layers as fully attending; right while no context exceeds the window",
    )
    parser.add_argument(
        "--max-positions",
        type=positive_int,
        metavar="N",
        help="linear RoPE scaling to N positions, more than the model has; the same N in all three stages",
    )


def add_bos_argument(parser: argparse.ArgumentParser, default: bool | None = None) -> None:
    """`--bos --no-bos`, spelled alike wherever text is read."""
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        default=default,
        help="begin every window with <bos>; "
        + ("default: no" if default is False else "default: where the tokenizer adds it"),
    )


def load_model_from(arguments: argparse.Namespace, part: Part = WHOLE) -> LoadedModel:
    """The model that `add_model_arguments` describes, or a part of it."""
    if holds_gguf(arguments.model) and process_state().is_main_process:
        print(
            f"note: {arguments.model} holds GGUF weights, which are dequantized every time they are loaded; "
            f"`python -m scripts.convert_gguf {arguments.model} FOLDER` does it once",
            file=sys.stderr,
        )
    return load_model(
        arguments.model,
        arguments.dtype,
        arguments.device,
        arguments.full_attention,
        arguments.max_positions,
        arguments.device_map,
        part,
    )


def check_seqlen(loaded: LoadedModel, seqlen: int) -> None:
    """Raise `UserError` when a window would exceed the positions the model was made for."""
    positions = usable_positions(decoder_config(loaded.model.config))
    if seqlen > positions:
        raise UserError(f"--seqlen {seqlen} exceeds the {positions} positions of model {loaded.name!r}; lower it")
    if seqlen < 2:
        raise UserError(f"--seqlen {seqlen} leaves no next token to predict; use at least 2")


def record(loaded: LoadedModel, corpus: Corpus, records: Records, checkpointing: bool = False) -> int:
    """Record this process's share of the missing windows; returns how many it recorded."""
    state = process_state()
    manifest = records.manifest
    drawn = corpus.calibration_windows(manifest.seqlen, manifest.moment_windows, manifest.seed)
    mine = own_share(manifest.moment_windows)
    missing = [window for window in mine if not records.is_complete(window)]
    unit: dict[str, Any] = {"unit": "tok", "unit_scale": True, "disable": not state.is_main_process}
    with progress(total=len(mine) * manifest.seqlen, desc="recording", **unit) as bar:
        bar.update((len(mine) - len(missing)) * manifest.seqlen)
        for window in missing:
            moments_only = window >= manifest.windows
            records.write(window, record_window(loaded.model, drawn[window], checkpointing, moments_only))
            bar.update(manifest.seqlen)
    return len(missing)


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The command; returns its JSON summary (None in all but the main process)."""
    parser = command_parser("gradients", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--text", required=True, help="wikitext2, c4, ptb, pydoc, or FILE[:START-END] in percent")
    parser.add_argument("--windows", type=positive_int, default=16)
    parser.add_argument(
        "--moment-windows",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="windows whose gradients' moments are recorded, for error feedback; those beyond --windows hold nothing else",
    )
    parser.add_argument("--seqlen", type=positive_int, default=2048, help="tokens per window")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the places the windows are drawn from")
    add_bos_argument(parser)
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers: less memory, more time")
    parser.add_argument("--output", required=True, help="the records folder")
    arguments = parser.parse_args(argv)

    loaded = load_model_from(arguments)
    check_seqlen(loaded, arguments.seqlen)
    sites = kv_sites(loaded.model)
    corpus = load_corpus(arguments.text, "calibration", loaded.tokenizer, arguments.bos)
    loaded.check_tokens(corpus.tokens)
    manifest = Manifest(
        fingerprint=Fingerprint.of(loaded.model.config),
        text=corpus.name,
        token_digest=corpus.digest,
        seqlen=arguments.seqlen,
        windows=arguments.windows,
        moment_windows=max(arguments.windows, arguments.moment_windows),
        seed=arguments.seed,
        model=arguments.model,
        model_dtype=str(loaded.model.dtype).removeprefix("torch."),
        versions={package: version(package) for package in ("torch", "transformers")},
        weights=loaded.weights,
        bos=corpus.bos is not None,
    )
    corpus.calibration_windows(arguments.seqlen, 1, arguments.seed)  # a text too short fails before anything is written
    state = process_state()
    with claimed(arguments.output) if state.is_main_process else nullcontext():
        if state.is_main_process:
            Records.create(arguments.output, manifest).write_rope(*rope_tables(loaded.model, arguments.seqlen))
        state.wait_for_everyone()  # the folder is claimed before anything is recorded
        records = Records.create(arguments.output, manifest)
        started = time.perf_counter()
        recorded = record(loaded, corpus, records, arguments.checkpointing)
        seconds = time.perf_counter() - started
        state.wait_for_everyone()
    recorded = int(gathered(torch.tensor([recorded], dtype=torch.float64)).item())  # of all processes
    if not state.is_main_process:
        return None
    held = records.manifest
    size = sum(records.path(window).stat().st_size for window in range(held.moment_windows))
    more = held.moment_windows - held.windows
    moments = f" ({more} more for moments)" if more else ""
    print(
        f"{held.windows} windows{moments} of {held.seqlen} tokens, {len(sites)} sites, {size / 1e6:.0f} MB in {arguments.output}"
    )
    return {
        "records": arguments.output,
        "windows": held.windows,
        "moment_windows": held.moment_windows,
        "seqlen": arguments.seqlen,
        "recorded_now": recorded,
        "tokens_per_second": round(recorded * arguments.seqlen / seconds, 1),
        "bytes": size,
        "digest": records.manifest.digest,
    }


if __name__ == "__main__":
    run_command(main)
