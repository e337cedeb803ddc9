"""Downstream tasks of lm-evaluation-harness through the packed cache: gsm8k, LongBench, and anything else it knows.

    pip install -e .[tasks]
    python -m deployment.tasks --model ./smollm2 --quantizers nuq3.safetensors --tasks gsm8k --limit 50 --batch 4
    python -m deployment.tasks --model ... --quantizers ... --tasks 'longbench_*' --results tasks.jsonl
    python -m deployment.tasks --model ... --tasks capitals --include-path my_tasks/     # tasks of one's own, unquantized

Tasks are named as the harness names them: a task, a group, a tag, or a pattern. Each name is one run and one row of
--results, written as soon as it is there; run again, the command skips the names whose rows exist for the same model,
quantizers, limit and settings. Without --quantizers the same code runs with the cache in full precision, to compare.

Log-likelihoods are of tokens that all see each other as stored; generation sees a chunk of its prompt exactly and the past
packed, unless --no-exact-chunk (deployment/text/harness.py says why).
"""

import argparse
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deployment.text.saved import quantizers_digest
from gradients.__main__ import add_model_arguments, load_model_from
from gradients.cli import UserError, command_parser, non_negative_int, positive_int, run_command
from gradients.loading import LoadedModel
from quant.artefact import Quantizers, load_quantizers
from quant.options import add_exact_arguments, exact_from
from quant.results import append_row, is_of, read_rows, results_file


def _require_harness() -> None:
    if find_spec("lm_eval") is None:
        raise UserError(
            "lm-evaluation-harness (lm_eval) is not installed; install it with `pip install -e .[tasks]`, "
            "or `pip install lm-eval`"
        )


def task_names(manager: Any, wanted: str) -> list[str]:
    """The names of a comma-separated list, patterns replaced by what they match. Raises `UserError` for unknown ones."""
    names: list[str] = []
    for name in filter(None, (part.strip() for part in wanted.split(","))):
        matches = manager.match_tasks([name])
        if not matches:
            raise UserError(
                f"task {name!r} is unknown to lm-evaluation-harness; `lm_eval ls tasks` lists its own, "
                "--include-path DIR adds yours"
            )
        names += [match for match in matches if match not in names]
    if not names:
        raise UserError(f"--tasks {wanted!r} names no task; give names separated by commas")
    return names


def _manager(include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path {include_path!r} is no folder; give the one with your tasks' YAML files")
    return TaskManager(include_path=include_path)


def _check(manager: Any, name: str, lm: Any) -> None:
    """Raise `UserError` if a task's definition or data cannot be loaded, or its answers exceed the model's positions."""
    from lm_eval.models.utils import normalize_gen_kwargs

    try:
        tasks = manager.load([name])["tasks"]
    except Exception as error:  # its code, its file and its data set are not ours: anything may be wrong
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"task {name!r} cannot be loaded ({type(error).__name__}: {reason}); see that its data set is reachable "
            "and what its metrics need is installed"
        ) from error
    for task in tasks.values():
        if task.get_config("output_type") != "generate_until":
            continue
        wanted = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, lm.max_gen_toks)["max_gen_toks"]
        if wanted >= lm.max_length:
            raise UserError(
                f"task {name!r} wants answers of {wanted} tokens, the model's positions are {lm.max_length}, prompt "
                "included; use a model with more, or --max-positions"
            )


def _identity(
    arguments: argparse.Namespace, loaded: LoadedModel, quantizers: Quantizers | None, name: str
) -> dict[str, Any]:
    """What tells one result from another; results of equal identity are the same up to rounding."""
    return {
        "task": name,
        "model": Path(arguments.model).name,
        "weights": loaded.weights,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "max_positions": arguments.max_positions,
        "full_attention": arguments.full_attention,
        "scheme": None if quantizers is None else quantizers.scheme.describe(),
        "quantizers": None if quantizers is None else quantizers_digest(quantizers),
        "limit": arguments.limit,
        "num_fewshot": arguments.num_fewshot,
        "chat": arguments.chat,
        "prefill_chunk": arguments.prefill_chunk,
        "exact_chunk": arguments.exact_chunk,
    }


def _run(lm: Any, manager: Any, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one task or group and print its table; its numbers."""
    import lm_eval
    from lm_eval.utils import make_table

    started = time.perf_counter()
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=[name],
        task_manager=manager,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        batch_size=arguments.batch,
        apply_chat_template=arguments.chat,
        log_samples=False,
    )
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    return {
        "metrics": {task: _numbers(metrics) for task, metrics in results["results"].items()},
        "samples": {task: counts["effective"] for task, counts in results["n-samples"].items()},
        "batch": arguments.batch,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Only what was measured, under the harness's names: "exact_match,strict-match" is a metric and its filter."""
    return {name: value for name, value in metrics.items() if "," in name and isinstance(value, int | float)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command; returns its JSON summary."""
    parser = command_parser("deployment.tasks", __doc__)
    add_model_arguments(parser)
    parser.add_argument("--quantizers", help="file written by `python -m quant.fit`; without it, the model as it is")
    add_exact_arguments(parser)
    parser.add_argument("--tasks", required=True, metavar="NAME,...", help="as the harness knows them; patterns work")
    parser.add_argument("--include-path", metavar="DIR", help="folder with YAML files of further tasks")
    parser.add_argument("--limit", type=positive_int, help="samples per task; default: all of them")
    parser.add_argument("--num-fewshot", type=non_negative_int, help="examples in the prompt; default: the task's")
    parser.add_argument("--batch", type=positive_int, default=1, help="samples side by side")
    parser.add_argument("--chat", action="store_true", help="prompts are messages, rendered by the chat template")
    parser.add_argument("--prefill-chunk", type=positive_int, default=1024, help="prompt tokens per forward")
    parser.add_argument("--exact-chunk", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--results", type=results_file, metavar="FILE", help="append one JSON line per task to this file"
    )
    arguments = parser.parse_args(argv)

    _require_harness()
    from deployment.text.harness import PackedLM

    manager = _manager(arguments.include_path)
    names = task_names(manager, arguments.tasks)
    quantizers = None
    if arguments.quantizers:
        quantizers = exact_from(load_quantizers(arguments.quantizers), arguments)
    loaded = load_model_from(arguments)
    if quantizers is not None:
        quantizers.check_run(loaded)
    identities = {name: _identity(arguments, loaded, quantizers, name) for name in names}
    rows = read_rows(arguments.results)
    missing = [name for name in names if not any(is_of(row, identities[name]) for row in rows)]
    lm = PackedLM(
        loaded.model,
        quantizers,
        arguments.prefill_chunk,
        arguments.exact_chunk,
        tokenizer=loaded.tokenizer,
        batch_size=arguments.batch,
    )
    for name in missing:
        _check(manager, name, lm)  # all of them, before hours go into the first
    summary = {}
    for name in missing:
        row = identities[name] | _run(lm, manager, name, arguments)
        append_row(arguments.results, row, packages=("torch", "transformers", "lm_eval"))
        summary[name] = row["metrics"]
    return {"skipped": [name for name in names if name not in missing], "metrics": summary}


if __name__ == "__main__":
    run_command(main)
