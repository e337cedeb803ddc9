"""`python -m deployment.tasks` and the model class behind it, on tasks in a local folder; skipped without lm_eval."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from deployment.tasks import main
from gradients.cli import UserError
from quant.results import read_rows
from quant.simulate import simulated

GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["key", "value of it", "no"]
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
BROKEN = GENERATION.replace("tiny_generation", "tiny_broken").replace("{data}", "no-such-file.json")
LENGTHY = GENERATION.replace("tiny_generation", "tiny_lengthy").replace("toks: 12", "toks: 512")
QUESTIONS = [
    "the key of",
    "value and token, head and value:" * 4,
    "a",
    "quantized outlier." * 9,
    "of the head of the token of the key of",
]
TASKS = "tiny_generation,tiny_choice"


@pytest.fixture
def harness(monkeypatch, tmp_path) -> Any:
    """lm_eval, whose data sets are cached where the test ends."""
    harness = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e .[tasks]")
    import datasets
    from huggingface_hub import constants

    import deployment.text.harness  # noqa: F401  (registers the model)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return harness


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of tasks: text to generate, and continuations to choose from."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.json"
    rows = [{"question": text, "answer": "key", "label": i % 3} for i, text in enumerate(QUESTIONS)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    for name, content in (("generation", GENERATION), ("choice", CHOICE), ("broken", BROKEN), ("lengthy", LENGTHY)):
        (folder / f"{name}.yaml").write_text(content.format(data=data))
    return folder


@pytest.fixture
def responses(harness, tasks, llama_folder) -> Callable[..., dict[str, list[Any]]]:
    """`responses(model, batch, **arguments)`: what a model the harness knows answers, per task, in order of questions."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks, include_defaults=False)

    def run(model: str, batch: int, **arguments: Any) -> dict[str, list[Any]]:
        given = {"pretrained": str(llama_folder), "dtype": "float32", **arguments}
        results = harness.simple_evaluate(
            model=model,
            model_args=given,
            tasks=TASKS.split(","),
            task_manager=manager,
            batch_size=batch,
            device="cpu",
            bootstrap_iters=0,
        )
        return {
            name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
            for name, samples in results["samples"].items()
        }

    return run


def scores(answers: dict[str, list[Any]]) -> torch.Tensor:
    """The log-likelihoods of all choices, `[questions, choices]`."""
    return torch.tensor([[float(choice[0]) for choice in sample] for sample in answers["tiny_choice"]])


@pytest.mark.parametrize(("batch", "chunk"), [(1, 1024), (3, 1024), (3, 7)])
def test_without_quantization_it_is_the_harness_own_model(responses, batch: int, chunk: int) -> None:
    own = responses("hf", batch)
    ours = responses("kvquant", batch, prefill_chunk=chunk)
    assert len(own["tiny_generation"]) == len(QUESTIONS) and any(text[0] for text in own["tiny_generation"])
    assert ours["tiny_generation"] == own["tiny_generation"]
    torch.testing.assert_close(scores(ours), scores(own), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk": 7, "exact_chunk": False}], ids=["one chunk", "small chunks"])
def test_batch_changes_nothing(responses, quantizers_file, options: dict[str, Any]) -> None:
    one = responses("kvquant", 1, quantizers=str(quantizers_file), **options)
    three = responses("kvquant", 3, quantizers=str(quantizers_file), **options)
    assert one["tiny_generation"] == three["tiny_generation"]
    torch.testing.assert_close(scores(one), scores(three), rtol=1e-3, atol=1e-2)


def test_what_is_scored_has_passed_through_the_cache(responses, llama, tokenizer, quantizers, quantizers_file) -> None:
    packed = scores(responses("kvquant", 3, quantizers=str(quantizers_file)))
    plain = scores(responses("hf", 3))
    expected = []
    for question in QUESTIONS:
        context = tokenizer.encode(question)
        for choice in ("key", "value of it", "no"):
            continuation = tokenizer.encode(question + " " + choice)[len(context) :]
            tokens = torch.tensor([context + continuation])
            with simulated(llama, quantizers):
                logits = (
                    llama(input_ids=tokens[:, :-1], use_cache=False).logits[0, -len(continuation) :].log_softmax(-1)
                )
            expected.append(float(logits.gather(1, torch.tensor(continuation)[:, None]).sum()))
    simulation = torch.tensor(expected).view_as(packed)
    torch.testing.assert_close(packed, simulation, rtol=1e-3, atol=1e-2)
    assert (packed - plain).abs().max() > 0.05


@pytest.fixture
def local_tasks_only(harness, monkeypatch) -> None:
    """The harness's own thousands of tasks take many seconds to index."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture
def arguments(llama_folder, tasks, tmp_path) -> list[str]:
    """The command's model, folder of tasks and results."""
    results = str(tmp_path / "rows.jsonl")
    return ["--model", str(llama_folder), "--device", "cpu", "--include-path", str(tasks), "--results", results]


@pytest.mark.usefixtures("local_tasks_only")
def test_command_writes_rows_and_skips_what_is_there(arguments, quantizers_file, capsys) -> None:
    quantized = [*arguments, "--quantizers", str(quantizers_file), "--batch", "2", "--limit", "3"]
    first = main([*quantized, "--tasks", "tiny_choice"])
    assert "tiny_choice" in capsys.readouterr().out and first["skipped"] == []
    both = main([*quantized, "--tasks", "tiny_choice,tiny_gen*"])
    assert both["skipped"] == ["tiny_choice"] and list(both["metrics"]) == ["tiny_generation"]
    rows = read_rows(arguments[-1])
    assert [row["task"] for row in rows] == ["tiny_choice", "tiny_generation"]
    assert rows[0]["metrics"] == first["metrics"]["tiny_choice"] == {"tiny_choice": rows[0]["metrics"]["tiny_choice"]}
    assert 0 <= rows[0]["metrics"]["tiny_choice"]["acc,none"] <= 1
    assert rows[0]["scheme"] == "nuq3-1%" and rows[0]["samples"] == {"tiny_choice": 3}
    assert "lm_eval" in rows[0]["versions"]
    again = main([*arguments, "--tasks", "tiny_choice", "--limit", "3"])  # without quantizers it is another row
    assert again["skipped"] == [] and len(read_rows(arguments[-1])) == 3
    assert json.loads(json.dumps(again)) == again


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--tasks", "tiny_choice,nothing_like_it"], "task 'nothing_like_it' is unknown"),
        (["--tasks", " , "], "names no task"),
        (["--tasks", "tiny_broken"], "task 'tiny_broken' cannot be loaded"),
        (["--tasks", "tiny_lengthy"], "'tiny_lengthy' wants answers of 512 tokens, the model's positions are 512"),
        (["--tasks", "tiny_choice", "--include-path", "no-such-folder"], "'no-such-folder' is no folder"),
        (["--tasks", "tiny_choice", "--quantizers", "no-such-file"], "no-such-file"),
    ],
)
@pytest.mark.usefixtures("local_tasks_only")
def test_bad_requests_are_refused_and_write_nothing(arguments, changed: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([*arguments, *changed])
    assert not Path(arguments[-1]).exists()


def test_a_missing_harness_names_its_extra(arguments, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="lm_eval.*not installed.*pip install"):
        main([*arguments, "--tasks", "gsm8k"])


def test_a_chunk_of_no_tokens_is_refused(harness, llama_folder) -> None:
    with pytest.raises(UserError, match="prefill_chunk=0"):
        harness.simple_evaluate(
            model="kvquant",
            model_args=f"pretrained={llama_folder},prefill_chunk=0",
            tasks=["tiny_choice"],
            device="cpu",
        )
