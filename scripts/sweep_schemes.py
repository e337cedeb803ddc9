r"""Fit several schemes to the same records and evaluate them on the same windows, so that the rows can be compared.

    python -m scripts.sweep_schemes --model ./smollm2 --records records/ --text notes.txt:50-100 --seqlen 512 \
        --windows 40 --schemes nuq4-1% nf4-1% int4-1% --results scripts/results/schemes.jsonl

One JSONL row per scheme; schemes that the results file already holds for this model and text are not run again.
As many as `--together` says are fitted and evaluated side by side, since the unquantized logits of a window are computed once for all of
them; then their rows are written, and an interrupted sweep goes on from there.
"""

from collections.abc import Sequence
from typing import Any

from gradients.__main__ import add_model_arguments, load_model_from
from gradients.cli import command_parser, format_table, positive_int, run_command
from gradients.processes import process_state
from gradients.records import Records
from quant.evaluate import add_evaluation_arguments, append_result, evaluate_many, evaluation_corpus, result_identity
from quant.fit import fit
from quant.options import add_scheme_arguments, scheme_from
from quant.results import is_of, read_rows
from quant.scheme import Scheme


def missing(schemes: Sequence[Scheme], results: str | None, identity: dict[str, Any]) -> list[Scheme]:
    """The schemes without a row of this identity in the results file."""
    done = {row["scheme"] for row in read_rows(results) if is_of(row, identity)}
    return [scheme for scheme in schemes if scheme.describe() not in done]


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The command; returns its JSON summary (None in all but the main process)."""
    parser = command_parser("scripts.sweep_schemes", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--records", required=True, help="folder written by `python -m gradients`")
    parser.add_argument(
        "--schemes", nargs="+", required=True, help="such as nuq3-1%% int4; the options below hold for all"
    )
    add_scheme_arguments(parser, named=False)
    parser.add_argument("--calibration-windows", type=positive_int, help="use only the first windows of the records")
    parser.add_argument("--together", type=positive_int, default=4, help="schemes evaluated side by side (4)")
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes to fit layers in (1)")
    add_evaluation_arguments(parser)
    arguments = parser.parse_args(argv)

    records = Records.open(arguments.records).first(arguments.calibration_windows)
    wanted = [scheme_from(name, arguments) for name in arguments.schemes]
    loaded = load_model_from(arguments)
    corpus = evaluation_corpus(loaded, arguments)
    windows = corpus.evaluation_windows(arguments.seqlen, arguments.windows)
    identity = result_identity(loaded, corpus, arguments) | {
        "tokens": windows.numel() - len(windows),
        "records": records.manifest.digest,
        "calibration_windows": records.manifest.windows,
        "moment_windows": records.manifest.moment_windows,
    }
    schemes = missing(wanted, arguments.results, identity)
    process_state().wait_for_everyone()  # all have read the same rows before the first is added
    if not schemes:
        return {"results": arguments.results, "rows_added": 0}
    rows: list[dict[str, Any]] = []
    for first in range(0, len(schemes), arguments.together):
        candidates = [fit(records, scheme, arguments.jobs) for scheme in schemes[first : first + arguments.together]]
        for quantizers in candidates:
            quantizers.check_run(loaded, corpus.bos is not None)
        evaluated = evaluate_many(loaded.model, windows, candidates)
        if process_state().is_main_process:
            for row in evaluated:
                append_result({**row, **identity}, loaded, corpus, arguments)
        rows += evaluated
    if not process_state().is_main_process:
        return None
    columns = "scheme bits_per_element perplexity nll kl top1_agreement"
    print(format_table(rows, columns))
    return {"results": arguments.results, "rows_added": len(rows)}


if __name__ == "__main__":
    run_command(main)
