"""Bad input to recording, fitting and simulated evaluation; files that were damaged are test_stages_mutations.py's.

Each command is called as `python -m` calls it, must refuse with a message that names the thing, the value and the
remedy, and must leave every earlier file as it was.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

import deployment.generate
import gradients.__main__
import quant.evaluate
import quant.fit
from gradients.cli import UserError


@dataclass(frozen=True)
class Workspace:
    """A folder with a complete run of stages 1 and 2, to which one thing is done."""

    root: Path
    model: Path
    text: Path

    @property
    def records(self) -> Path:
        return self.root / "records"

    @property
    def quantizers(self) -> Path:
        return self.root / "q.safetensors"

    def record(self, *options: str) -> Any:
        """`python -m gradients`; later options win."""
        arguments = ["--model", str(self.model), "--text", str(self.text), "--device", "cpu", "--windows", "2"]
        return gradients.__main__.main([*arguments, "--seqlen", "65", "--output", str(self.root / "new"), *options])

    def fit(self, *options: str) -> Any:
        """`python -m quant.fit`."""
        arguments = ["--records", str(self.records), "--scheme", "nuq3-1%", "--output", str(self.quantizers)]
        return quant.fit.main([*arguments, *options])

    def evaluate(self, *options: str) -> Any:
        """`python -m quant.evaluate`."""
        arguments = ["--model", str(self.model), "--text", str(self.text), "--device", "cpu", "--windows", "1"]
        return quant.evaluate.main([*arguments, "--seqlen", "65", "--quantizers", str(self.quantizers), *options])

    def generate(self, *options: str) -> Any:
        """`python -m deployment.generate`."""
        arguments = ["--model", str(self.model), "--device", "cpu", "--quantizers", str(self.quantizers)]
        return deployment.generate.main([*arguments, "--prompt", "key", *options])


@pytest.fixture
def workspace(records, quantizers_file, llama_folder, text_file, tmp_path) -> Workspace:
    shutil.copytree(records.folder, tmp_path / "records")
    shutil.copy(quantizers_file, tmp_path / "q.safetensors")
    return Workspace(tmp_path, llama_folder, text_file)


@pytest.fixture
def refuses(workspace, snapshot) -> Callable[..., None]:
    """Assert that a command refuses, with all `fragments` in one message, and changes no file."""

    def check(command: Callable[..., Any], *options: str, fragments: list[str], error: type = UserError) -> None:
        before = snapshot(workspace.root)
        with pytest.raises(error) as caught:
            command(*options)
        message = str(caught.value)
        assert [fragment for fragment in fragments if fragment not in message] == [], message
        assert snapshot(workspace.root) == before

    return check


def commands_with_a_model(workspace: Workspace) -> list[Callable[..., Any]]:
    return [workspace.record, workspace.evaluate]


def test_the_workspace_is_sound(workspace) -> None:
    """What the other tests spoil works when it is left alone."""
    assert workspace.record()["recorded_now"] == 2
    assert workspace.evaluate()["tokens"] == 64
    assert workspace.fit()["layers"] == 2


def test_unsupported_architecture_is_refused(workspace, refuses) -> None:
    GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(workspace.root / "gpt2")
    fragments = ["'gpt2'", "add a row for it to SITES in gradients/models.py", "llama", "phi3"]
    for command in commands_with_a_model(workspace):
        refuses(command, "--model", str(workspace.root / "gpt2"), fragments=fragments, error=NotImplementedError)


def test_unknown_architecture_is_refused(workspace, refuses) -> None:
    (workspace.root / "new-model").mkdir()
    (workspace.root / "new-model" / "config.json").write_text('{"model_type": "nonesuch"}')
    for command in commands_with_a_model(workspace):
        refuses(
            command,
            "--model",
            str(workspace.root / "new-model"),
            fragments=["nonesuch", "gradients/models.py"],
            error=(UserError, NotImplementedError),
        )


@pytest.mark.parametrize(
    "damage", ["no such folder", "no such hub id", "empty folder", "no weights", "config not JSON"]
)
def test_missing_model_is_refused(damage: str, workspace, refuses) -> None:
    folder = workspace.root / "model"
    name = "nobody/nothing-of-this-name" if damage == "no such hub id" else str(folder)
    if damage == "empty folder":
        folder.mkdir()
    elif damage == "no weights":
        shutil.copytree(workspace.model, folder)
        (folder / "model.safetensors").unlink()
    elif damage == "config not JSON":
        folder.mkdir()
        (folder / "config.json").write_text("{")
    for command in commands_with_a_model(workspace):
        refuses(command, "--model", name, fragments=[name, "give a hub id that is reachable, or a local folder"])


Weights = dict[str, torch.Tensor]
SPOILED: dict[str, tuple[Callable[[Weights], object], dict[str, Any], list[str]]] = {
    "a weight is missing": (
        lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"),
        {},
        ["lacks 1 of the weights", "model.layers.1.self_attn.k_proj.weight", "give a complete checkpoint"],
    ),
    "layers are missing": (lambda _weights: None, {"num_hidden_layers": 3}, ["lacks 9 of the weights"]),
    "a weight of another shape": (
        lambda weights: weights.update({"lm_head.weight": torch.zeros(3, 3)}),
        {},
        ["cannot load AutoModelForCausalLM", "a local folder that is whole"],
    ),
    "a setting of another type": (
        lambda _weights: None,
        {"num_attention_heads": "four"},
        ["cannot load AutoConfig", "'num_attention_heads' expected int, got str"],
    ),
    "a rotary embedding that is none": (
        lambda _weights: None,
        {"rope_parameters": {"rope_type": "none", "rope_theta": 1e4}},
        ["cannot load AutoModelForCausalLM", "'none'"],
    ),
    "fewer tokens than the tokenizer's": (
        lambda weights: weights.update(
            {name: weights[name][:99].clone() for name in weights if len(weights[name]) == 259}
        ),
        {"vocab_size": 99},
        ["the tokenizer of", "the model knows 99 tokens", "trained with"],
    ),
}


@pytest.mark.parametrize("damage", SPOILED)
def test_a_model_that_is_not_whole_is_refused(damage: str, workspace, refuses) -> None:
    """Above all not to be gone on with, what is missing being random."""
    change, settings, fragments = SPOILED[damage]
    folder = Path(shutil.copytree(workspace.model, workspace.root / "model"))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings | {"layer_types": None}))
    for command in commands_with_a_model(workspace):
        refuses(command, "--model", str(folder), fragments=fragments)


def test_damaged_weights_are_refused(workspace, refuses) -> None:
    folder = Path(shutil.copytree(workspace.model, workspace.root / "model"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refuses(workspace.record, "--model", str(folder), fragments=[str(folder)])


def test_gguf_that_is_missing_or_ambiguous_is_refused(workspace, refuses) -> None:
    folder = workspace.root / "gguf"
    folder.mkdir()
    missing = str(folder / "none.gguf")
    refuses(workspace.record, "--model", missing, fragments=[missing, "does not exist", "give a hub id"])
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")
    refuses(workspace.record, "--model", str(folder), fragments=["holds 2 GGUF files", "name one of them", "a.gguf"])


def test_missing_text_is_refused(workspace, refuses) -> None:
    for command in commands_with_a_model(workspace):
        name = str(workspace.root / "none.txt")
        refuses(
            command, "--text", name, fragments=[name, "No such file", "UTF-8 text file", "wikitext2, c4, ptb, pydoc"]
        )
        refuses(command, "--text", str(workspace.root), fragments=[str(workspace.root), "directory", "text file"])
        refuses(command, "--text", f"{workspace.text}:80-20", fragments=["80-20", "0-100", "FILE:START-END"])


@pytest.mark.parametrize("content", [b"", b" \n\t "], ids=["empty", "blank"])
def test_empty_text_is_refused(content: bytes, workspace, refuses) -> None:
    (workspace.root / "empty.txt").write_bytes(content)
    for command in commands_with_a_model(workspace):
        refuses(
            command, "--text", str(workspace.root / "empty.txt"), fragments=["empty.txt", "is empty", "give a text"]
        )


def test_text_of_another_encoding_is_refused(workspace, refuses) -> None:
    (workspace.root / "latin.txt").write_bytes(b"abc \xe9t\xe9 " * 100)
    refuses(
        workspace.record,
        "--text",
        str(workspace.root / "latin.txt"),
        fragments=["latin.txt", "not UTF-8", "byte 4", "convert"],
    )


@pytest.mark.parametrize("corpus", ["wikitext2", "c4", "ptb"])
def test_unreachable_corpus_is_refused(corpus: str, workspace, refuses, monkeypatch) -> None:
    import datasets

    def offline(*_args: object, **_options: object) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    refuses(
        workspace.record, "--text", corpus, fragments=[repr(corpus), "no route to host", "--text pydoc or a text file"]
    )


def test_damaged_windows_are_refused(workspace, refuses) -> None:
    path = workspace.records / "window-00002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    remedy = f"delete it and run `python -m gradients --output {workspace.records}` again"
    refuses(workspace.fit, fragments=[str(path), "not a complete safetensors file", remedy])
    path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 0xFF]) + whole[-99:])
    refuses(workspace.fit, fragments=[str(path), "was altered after it was written", remedy])
    path.unlink()
    refuses(workspace.fit, fragments=[str(path), "is missing", "run `python -m gradients` again"])


@pytest.mark.parametrize(
    ("command", "options", "fragments"),
    [
        *(("record", ["--dtype", name], ["dtype", repr(name), "use auto"]) for name in ("int8", "float99", "nn")),
        ("record", ["--device", "abacus"], ["device", "abacus"]),
        ("record", ["--device", "cuda:99"], ["device 'cuda:99' is not there; use auto, cpu, or one"]),
        ("evaluate", ["--model", "none", "--results", "{root}"], ["--results", "{root}", "give another file"]),
        ("evaluate", ["--results", "{quantizers}/rows"], ["--results", "{quantizers}/rows", "give another file"]),
        ("record", ["--windows", "0"], ["--windows", "0 is not a positive integer", "--help"]),
        ("record", ["--seed", "-1"], ["--seed", "-1 is negative", "--help"]),
        ("record", ["--seqlen", "513"], ["--seqlen 513", "512 positions", "tiny-llama", "lower it"]),
        ("evaluate", ["--seqlen", "513"], ["--seqlen 513", "512 positions", "tiny-llama", "lower it"]),
        ("record", ["--seqlen", "1"], ["--seqlen 1", "at least 2"]),
        ("evaluate", ["--seqlen", "1"], ["--seqlen 1", "at least 2"]),
        ("record", ["--output", "{quantizers}"], ["cannot write", "{quantizers}"]),
        ("record", ["--output", "{quantizers}/records"], ["cannot write", "{quantizers}/records"]),
        ("evaluate", ["--bits", "3"], ["--bits 3", "python -m quant.evaluate --help"]),
        ("fit", ["--jobs", "many"], ["--jobs", "'many'", "--help"]),
        ("fit", ["--sink-tokens", "65"], ["--sink-tokens 65", "windows of 65 tokens"]),
        ("fit", ["--weights", "hessian"], ["--weights", "'hessian'", "fisher*s^2"]),
        ("fit", ["--records", "{root}/none"], ["{root}/none", "no manifest.json", "run `python -m gradients"]),
    ],
)
def test_options_that_cannot_be_are_refused(
    command: str, options: list[str], fragments: list[str], workspace, refuses
) -> None:
    places = {"root": workspace.root, "quantizers": workspace.quantizers}
    options, fragments = ([text.format(**places) for text in texts] for texts in (options, fragments))
    refuses(getattr(workspace, command), *options, fragments=fragments)


@pytest.mark.parametrize(
    ("command", "option", "place", "message"),
    [
        ("fit", "--output", "{text}", "another file is there"),
        ("fit", "--output", "{weights}", "another file is there"),
        ("fit", "--output", "{root}", "that is a folder"),
        ("fit", "--output", "/dev/null", "another file is there"),
        ("fit", "--output", "{window}", "in the folder of records"),
        ("generate", "--save-cache", "{quantizers}", "another file is there"),
        ("generate", "--save-cache", "{text}", "another file is there"),
        ("generate", "--save-cache", ".", "that is a folder"),
        ("generate", "--save-cache", "{quantizers}/cache", "is no folder that takes files"),
    ],
)
def test_nothing_takes_the_place_of_another_file(
    command: str, option: str, place: str, message: str, workspace, refuses
) -> None:
    """Be it the one that is read at the time; before any work is done for it."""
    text, weights = workspace.root / "book.txt", workspace.root / "model.safetensors"
    shutil.copy(workspace.text, text)
    shutil.copy(workspace.model / "model.safetensors", weights)
    places = {"text": text, "weights": weights, "root": workspace.root, "quantizers": workspace.quantizers}
    path = place.format(**places, window=next(Path(workspace.records).glob("*.safetensors")))
    refuses(getattr(workspace, command), option, path, fragments=["cannot write", repr(path), message])


def test_a_fit_without_a_scheme_is_refused(workspace) -> None:
    with pytest.raises(UserError, match="--scheme"):
        quant.fit.main(["--records", str(workspace.records), "--output", "q"])


@pytest.fixture(params=[float("nan"), float("inf")], ids=str)
def poisoned_model(request, workspace, make_model, save_model) -> str:
    """A folder of the tiny Llama with one bad weight in the second layer's value projection."""
    model = make_model("llama")
    model.get_decoder().layers[1].self_attn.v_proj.weight[3, 5] = request.param
    return str(save_model(model, workspace.root / "poisoned"))


@pytest.mark.parametrize(
    "options", [["--sample"], ["--beams", "2"], ["--max-new-tokens", "0", "--save-cache", "{root}/c"], []]
)
def test_an_answer_names_the_layer_where_activations_are_not_finite(
    options: list[str], poisoned_model, refuses, workspace
) -> None:
    """Of NaN the first token is the most likely one, and it would be said."""
    options = [text.format(root=workspace.root) for text in options]
    refuses(workspace.generate, "--model", poisoned_model, *options, fragments=["layer 1 value", "NaN or infinite"])


def test_evaluation_names_the_layer_where_activations_are_not_finite(poisoned_model, refuses, workspace) -> None:
    refuses(workspace.evaluate, "--model", poisoned_model, fragments=["layer 1 value", "NaN or infinite"])
