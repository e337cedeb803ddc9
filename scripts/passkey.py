r"""Passkey retrieval with a quantized cache, over schemes and lengths of context (see quant/passkey.py).

    python -m scripts.passkey --model ./smollm2 --records records/ --schemes nuq4-1% nuq3-1% rdnuq3.4 \
        --contexts 512 1024 2048 --samples 10 --results scripts/results/passkey.jsonl
    python -m scripts.passkey --model ./smollm2 --quantizers nuq3.safetensors --contexts 4096 --mode packed

`simulated`: one forward per sample that quantizes keys and values as it goes. `packed`: the prompt is read in chunks
into the packed cache, and the answer is decoded from it token by token, as `deployment.generate` does.

The model without quantization is always among the rows. One JSONL row per scheme and context, written as soon as it is
known; rows that the results file already holds are not measured again. All schemes get the same prompts.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from gradients.__main__ import add_model_arguments, load_model_from
from gradients.cli import UserError, command_parser, format_table, non_negative_int, positive_int, run_command
from gradients.finite import require_finite
from gradients.records import Records
from quant.artefact import Quantizers, load_quantizers
from quant.fit import fit
from quant.options import add_scheme_arguments, scheme_from
from quant.passkey import PasskeySample, PasskeyScore, passkey_samples, passkey_tasks, score_simulated, summarise
from quant.results import append_row, read_rows
from quant.scheme import Scheme
from quant.storage import FP16_BITS, StoredSize

Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """What is compared: a scheme and where its quantizers come from; neither for the model as it is."""

    scheme: Scheme | None = None
    records_digest: str | None = None
    fit: Callable[[], Quantizers] | None = None

    @cached_property
    def quantizers(self) -> Quantizers | None:
        """Fitted when first asked for."""
        return self.fit() if self.fit else None

    @property
    def identity(self) -> Row:
        """The fields of a row that say whose it is."""
        return {"scheme": self.scheme.describe() if self.scheme else "unquantized", "records": self.records_digest}


def candidates_from(arguments: argparse.Namespace) -> list[Candidate]:
    """The unquantized model, the `--schemes`, the `--quantizers`. Raises `UserError` for unusable ones."""
    candidates = [Candidate()]
    if arguments.schemes and not arguments.records:
        raise UserError(f"--schemes {arguments.schemes[0]} ... are fitted to records; give --records as well")
    if arguments.schemes:
        records = Records.open(arguments.records)
        schemes = [scheme_from(name, arguments) for name in dict.fromkeys(arguments.schemes)]
        candidates += [Candidate(scheme, records.manifest.digest, partial(fit, records, scheme)) for scheme in schemes]
    for path in arguments.quantizers:
        quantizers = load_quantizers(path)
        candidates.append(Candidate(quantizers.scheme, quantizers.records_digest, lambda fitted=quantizers: fitted))
    for candidate in candidates:
        if arguments.mode == "packed" and candidate.scheme and candidate.scheme.simulated_only:
            raise UserError(f"scheme {candidate.scheme.describe()!r} has no packed cache; use --mode simulated")
    return candidates


@torch.inference_mode()
def score_packed(
    model: PreTrainedModel, sample: PasskeySample, quantizers: Quantizers | None, chunk: int, exact_chunk: bool
) -> PasskeyScore:
    """Read the prompt into a packed cache, `chunk` tokens at a time, and decode the answer greedily from it.

    The true token follows each pick: up to the first wrong one that is what greedy decoding feeds itself, and later
    ones cannot mend the miss. Raises `UserError` for logits that are NaN.
    """
    device = model.get_input_embeddings().weight.device
    tokens = torch.cat([sample.prompt, sample.answer[:-1]]).to(device)
    prompt, fed = tokens[: len(sample.prompt)], tokens[len(sample.prompt) :]
    cache = PackedCache(quantizers, model.config, capacity=len(tokens), exact_chunk=exact_chunk)
    logits = []
    with packed_attention(model):
        for step in (*prompt.split(chunk), *(fed.split(1) if len(fed) else ())):
            logits.append(model(input_ids=step[None], past_key_values=cache, logits_to_keep=1).logits[0])  # noqa: PERF401
    picked = torch.cat(logits[-len(sample.answer) :])
    require_finite(picked, model, tokens[None])
    size = StoredSize(bits=8 * cache.nbytes(), elements=8 * cache.fp16_nbytes() // FP16_BITS)
    return PasskeyScore.of(picked, sample.answer, size)


def row_of(rows: Sequence[Row], identity: Row) -> Row | None:
    """The first row of this identity, if there is one."""
    return next((row for row in rows if identity.items() <= row.items()), None)


def table(rows: Sequence[Row]) -> str:
    """A line per scheme: the bits at its longest context, then share retrieved and NLL of the answer per context."""
    lines: dict[tuple[Any, Any], Row] = {}
    for row in sorted(rows, key=lambda row: row["context"]):
        line = lines.setdefault((row["scheme"], row["records"]), {"scheme": row["scheme"]})
        line["bits_per_element"] = row["bits_per_element"]
        line[str(row["context"])] = f"{row['retrieved']:.2f} ({row['answer_nll']:.2f})"
    return format_table(list(lines.values()))


def main(argv: Sequence[str] | None = None) -> Row:
    """The command; returns its JSON summary."""
    parser = command_parser("scripts.passkey", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--records", help="folder written by `python -m gradients`, to fit --schemes to")
    parser.add_argument(
        "--schemes", nargs="+", default=[], help="such as nuq3-1%% int4; the options below hold for all"
    )
    add_scheme_arguments(parser, named=False)
    parser.add_argument("--quantizers", nargs="+", default=[], help="files written by `python -m quant.fit`")
    parser.add_argument("--contexts", type=positive_int, nargs="+", default=[512, 1024, 2048], help="tokens per prompt")
    parser.add_argument("--samples", type=positive_int, default=10, help="prompts per context, at as many depths")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the pass keys")
    parser.add_argument("--mode", choices=("simulated", "packed"), default="simulated")
    parser.add_argument("--prefill-chunk", type=positive_int, default=1024, help="packed: prompt tokens per forward")
    parser.add_argument(
        "--exact-chunk",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="packed: a chunk sees itself in full precision; without, any chunk gives what is simulated",
    )
    parser.add_argument("--results", help="append the rows to this JSONL file")
    arguments = parser.parse_args(argv)

    candidates = candidates_from(arguments)
    common: Row = {
        "model": Path(arguments.model).name,
        "mode": arguments.mode,
        "samples": arguments.samples,
        "seed": arguments.seed,
    }
    if arguments.mode == "packed":
        common |= {"prefill_chunk": arguments.prefill_chunk, "exact_chunk": arguments.exact_chunk}
    done = read_rows(arguments.results) if arguments.results else []
    wanted = [
        (candidate, {**common, **candidate.identity, "context": context})
        for context in sorted(set(arguments.contexts))
        for candidate in candidates
    ]
    missing = [(candidate, identity) for candidate, identity in wanted if row_of(done, identity) is None]
    measured = _measure(missing, arguments) if missing else []
    rows = [row for _, identity in wanted if (row := row_of([*done, *measured], identity))]
    print(f"share retrieved (NLL of the answer, nats), {arguments.samples} samples, {arguments.mode}\n{table(rows)}")
    return {"results": arguments.results, "rows_added": len(measured)}


def _measure(missing: Sequence[tuple[Candidate, Row]], arguments: argparse.Namespace) -> list[Row]:
    """A row for each candidate and identity, appended to the results one by one."""
    loaded = load_model_from(arguments)
    contexts = dict.fromkeys(identity["context"] for _, identity in missing)
    tasks = {context: passkey_tasks(context, arguments.samples, arguments.seed) for context in contexts}
    samples = {context: passkey_samples(loaded, tasks[context]) for context in contexts}
    for candidate in dict.fromkeys(candidate for candidate, _ in missing):
        if candidate.quantizers:
            candidate.quantizers.check_model(loaded.model.config)
    score: Callable[[PreTrainedModel, PasskeySample, Quantizers | None], PasskeyScore] = score_simulated
    if arguments.mode == "packed":
        score = partial(score_packed, chunk=arguments.prefill_chunk, exact_chunk=arguments.exact_chunk)
    rows = []
    for candidate, identity in missing:
        context, started = identity["context"], time.perf_counter()
        progress = tqdm(samples[context], desc=f"{identity['scheme']} at {context}", unit="sample")
        scores = [score(loaded.model, sample, candidate.quantizers) for sample in progress]
        row = summarise(tasks[context], scores, loaded.model, candidate.quantizers) | identity
        row["seconds"] = round(time.perf_counter() - started, 1)
        row["dtype"] = str(loaded.model.dtype).removeprefix("torch.")
        append_row(arguments.results, row)
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_command(main)
