"""Tensor parallelism: two processes, each with half of the heads, make the tokens and the figures of one."""

from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, build_model
from launched import launched
from test_kernels_attention import DEVICE, make_quantizer
from test_quant_feedback import random_feedback
from transformers import PreTrainedModel

from deployment.evaluate import main as evaluate_main
from deployment.format.layout import PackedTensor
from deployment.generate import main as generate_main
from deployment.kernels.append import Side, append
from deployment.plan import main as plan_main
from gradients.cli import UserError
from gradients.parallel import WHOLE, Part, distribution, own_part
from quant.feedback import Feedback
from quant.parts import own_heads
from quant.quantizer import TokenQuantizer
from quant.results import read_rows
from quant.scheme import Scheme

# a token's own range; outliers and errors handed on beside it; ranges per channel, which need nobody else
SCHEMES = ["nuq3", "nuq3+fb", "nuq2-5%+fb", "rdnuq2.4"]


@pytest.fixture(scope="module")
def even_llama() -> PreTrainedModel:
    """The tiny Llama with an even vocabulary, which older versions of transformers ask for."""
    config = CONFIGS["llama"]()
    config.vocab_size = 260
    return build_model(config)


@pytest.mark.slow
def test_two_processes_with_half_of_the_heads_make_the_tokens_of_one(
    even_llama, save_model, fit_model, text_file, tmp_path
) -> None:
    model = ["--model", str(save_model(even_llama, tmp_path / "model"))]
    windows = ["--text", str(text_file), "--seqlen", "90", "--windows", "1", "--prefill-chunk", "40"]
    commands, alone = [], []
    for scheme in SCHEMES:
        file = tmp_path / f"{scheme}.safetensors"
        fit_model(even_llama, Scheme.parse(scheme)).save(file)
        chosen = [*model, "--quantizers", str(file)]
        prompt = ["--prompt", text_file.read_text()[:150], "--max-new-tokens", "24", "--prefill-chunk", "64"]
        commands.append(("deployment.generate", [*chosen, *prompt]))
        commands.append(("deployment.evaluate", [*chosen, *windows, "--dtype", "float64"]))
        alone += [generate_main(commands[-2][1]), evaluate_main(commands[-1][1])]
    together = [
        (name, [*arguments, "--tensor-parallel", *["2"] * (name == "deployment.evaluate")])
        for name, arguments in commands
    ]
    decoding = [
        "--tensor-parallel",
        "--shape",
        "tiny",
        "--layers",
        "2",
        "--scheme",
        "nuq2",
        "nuq3-1%",
        "--new-tokens",
        "4",
    ]
    decoding += ["--contexts", "300", "longest", "--device-memory", "455MiB", "--results", str(tmp_path / "rows")]
    refused = ("deployment.generate", [*commands[0][1], "--tensor-parallel", "4"])
    (main_process, other), printed = launched(tmp_path, [*together, ("scripts.bench.sharded", decoding), refused])

    assert other[:-1] == [None] * (len(together) + 1), "only the main process reports"
    rows = main_process[len(together)]["rows"]
    assert [row["fits"] for row in rows] == [True] * 4 and read_rows(tmp_path / "rows")[0]["tensor_parallel"] == 2
    assert rows[2]["context"] == rows[2]["planned_context"] > 1000
    assert all(abs(part["held_off_percent"]) < 1 for row in rows for part in row["memory"]), "bytes as planned"
    assert "4: 2 processes were started; use torchrun --nproc-per-node 4 -m deployment.generate" in other[-1]
    for (name, _), ours, theirs in zip(commands, main_process, alone, strict=False):
        assert theirs is not None
        if name == "deployment.generate":
            assert ours["text"] == theirs["text"] and ours["new_tokens"] == 24
            assert printed.count(ours["text"]) >= 1
            assert ours["bits_per_element"] == theirs["bits_per_element"], "what both hold counts once"
        else:
            assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-9)
    assert printed.count("cache_bits_per_element") == len(commands), "the other process is quiet"


def no_gathering(monkeypatch: pytest.MonkeyPatch, whole: torch.Tensor) -> None:
    """Let what all parts have be `whole`, as if others were there."""
    monkeypatch.setattr("quant.quantizer.gathered_heads", lambda x, part, dim: whole)


@pytest.mark.parametrize("scheme", ["nuq3", "int4-5%", "nuq2-5%+fb", "rdnuq2.4", "rdnuq2.4+fb"])
@pytest.mark.parametrize("kind", ["key", "value"])
def test_parts_encode_what_the_whole_does(llama, fit_model, monkeypatch, kind: str, scheme: str) -> None:
    whole = fit_model(llama, Scheme.parse(scheme))
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(1)) * 2
    no_gathering(monkeypatch, x)
    expected = whole.layers[1][kind].encode(x)
    decoded = whole.layers[1][kind].decode(expected)
    for number in (0, 1):
        part, channels = Part(number, 2), Part(number, 2).of(24)
        split = own_heads(whole, part)
        assert split.fingerprint == whole.fingerprint
        quantizer = split.layers[1][kind]
        own = quantizer.encode(x[..., channels])
        assert torch.equal(own.codes, expected.codes[..., channels])
        assert torch.equal(quantizer.decode(own), decoded[..., channels])
        if expected.outliers is not None:
            assert torch.equal(own.outliers, expected.outliers[..., channels])
        assert isinstance(quantizer, TokenQuantizer) == isinstance(whole.layers[1][kind], TokenQuantizer)


def test_tables_of_as_many_levels_as_heads_are_not_split(fit_model, make_model) -> None:
    """What is split goes by what a table is, not by how long it happens to be."""
    whole = fit_model(make_model("llama-yarn-mha"), Scheme.parse("int2"))  # 4 levels, 4 heads
    split = own_heads(whole, Part(1, 2)).layers[0]["key"].tables
    assert torch.equal(split["levels"], whole.layers[0]["key"].tables["levels"]) and len(split["levels"]) == 4
    assert torch.equal(split["scale"], whole.layers[0]["key"].tables["scale"][24:])


def test_what_cannot_be_split_is_refused(llama, fit_model, make_model, llama_folder, quantizers_file) -> None:
    with pytest.raises(UserError, match=r"^--tensor-parallel 3: 2 KV heads do not divide by 3 processes; start 2$"):
        own_heads(fit_model(llama, Scheme.parse("nuq3")), Part(0, 3))
    with pytest.raises(UserError, match="outlier_cap=1 cannot be split by heads.*drop --tensor-parallel"):
        own_heads(fit_model(llama, Scheme.parse("nuq3-1%", outlier_cap=1)), Part(0, 2))
    with pytest.raises(UserError, match="3: 2 KV heads do not divide"):
        distribution(llama.config, Part(0, 3))
    with pytest.raises(NotImplementedError, match="plan for model_type 'phi3' does not split keys"):
        distribution(make_model("phi3").config, Part(0, 2))
    command = ["--model", str(llama_folder), "--quantizers", str(quantizers_file), "--prompt", "a"]
    for options, message in (
        (
            ["--tensor-parallel"],
            "--tensor-parallel: 1 process was started; use torchrun --nproc-per-node 2 -m deployment",
        ),
        (["--tensor-parallel", "2"], "--tensor-parallel 2: 1 process was started; use torchrun --nproc-per-node 2"),
        (
            ["--tensor-parallel", "--save-cache", "f"],
            "--save-cache works in one process, which --tensor-parallel is not",
        ),
    ):
        with pytest.raises(UserError, match=message):
            generate_main([*command, *options])


class Several:
    """What a process of two sees of the others."""

    num_processes, process_index = 2, 1


def test_a_process_knows_its_part(monkeypatch) -> None:
    assert own_part(None, "this") is WHOLE and own_part(1, "this") is WHOLE
    monkeypatch.setattr("gradients.parallel.process_state", Several)
    assert own_part(0, "this") == own_part(2, "this") == Part(1, 2)
    assert own_part(None, "this") is WHOLE, "windows are shared then"
    for wrong in (1, 4):
        with pytest.raises(
            UserError, match=f"{wrong}: 2 processes were started; use torchrun --nproc-per-node {wrong} "
        ):
            own_part(wrong, "this")


@pytest.mark.parametrize(
    ("share", "feedback", "sizes"), [(0.05, False, [9, 1]), (0.0, False, [3, 1]), (0.05, True, [5, 1])]
)
def test_the_append_kernels_store_of_parts_what_they_store_of_the_whole(
    monkeypatch, share: float, feedback: bool, sizes: list[int]
) -> None:
    heads, dim, sinks = 4, 20, 1
    whole = make_quantizer(heads * dim, "token", 3, share)
    if feedback:
        whole = replace(whole, feedback=random_feedback(heads, dim).to(DEVICE))
    generator = torch.Generator().manual_seed(3)
    chunks = [torch.randn(1, heads, size, dim, generator=generator).to(DEVICE) * 2 for size in sizes]
    halves = [
        replace(
            whole,
            part=Part(number, 2),
            feedback=whole.feedback
            and Feedback(
                *(table[Part(number, 2).of(heads)] for table in (whole.feedback.order, whole.feedback.matrix))
            ),
        )
        for number in (0, 1)
    ]
    stored = [_stored_by_kernels(monkeypatch, quantizer, chunks, sinks) for quantizer in (whole, *halves)]
    for number, own in enumerate(stored[1:]):
        mine = Part(number, 2).of(heads)
        for part, all_of_it in zip(own, stored[0], strict=True):
            assert torch.equal(part, all_of_it if all_of_it.ndim == 2 else all_of_it[:, mine])


def _stored_by_kernels(
    monkeypatch: pytest.MonkeyPatch, quantizer: TokenQuantizer, chunks: list[torch.Tensor], sinks: int
) -> tuple[torch.Tensor, ...]:
    """(tokens, sink tokens, ranges) that a process with the quantizer's part of the heads has at the end."""
    heads = quantizer.part.of(chunks[0].shape[1])
    packed = PackedTensor(quantizer, 1, chunks[0][:, heads].shape[1], chunks[0].shape[-1], DEVICE, "value")
    tokens = sum(chunk.shape[2] for chunk in chunks)
    packed.reserve(tokens, exactly=True)
    page = packed.pages[0]
    if page.outliers is not None:
        page.outliers = page.outliers.with_room(tokens * packed.head_dim)
    stored, nobody, overflow = (
        torch.zeros(1, dtype=dtype, device=DEVICE) for dtype in (torch.int64,) * 2 + (torch.int32,)
    )
    exact = torch.zeros(1, packed.heads, sinks, packed.head_dim, dtype=torch.float16, device=DEVICE)
    for chunk in chunks:
        monkeypatch.setattr("deployment.kernels.side.gathered_heads", lambda x, part, dim, chunk=chunk: chunk)
        append([Side(packed, chunk[:, heads], exact, [page])], stored, nobody, overflow)
        stored += chunk.shape[2]
    assert page.scales is not None and not overflow.any()
    return packed.read(page), exact, page.scales[0]


@pytest.mark.parametrize(
    ("shape", "scheme"), [("llama-3-8b", "nuq2"), ("llama-7b", "nuq3-1%"), ("llama-7b", "rdnuq2.4")]
)
def test_parts_of_a_plan_add_up(shape: str, scheme: str) -> None:
    """But for what every process has: scales of tokens, gains of norms, and what the installed plan leaves whole."""
    context = ["--shape", shape, "--scheme", scheme, "--context", "1M"]
    whole, part = plan_main(context)["bytes"], plan_main([*context, "--tensor-parallel", "4"])["bytes"]
    for name in ("keys", "values", "outliers", "list_ends", "sink_tokens"):
        assert 4 * part[name] == pytest.approx(whole[name], rel=1e-3), name
    assert part["scales"] == whole["scales"]
    assert 0.999 < 4 * part["weights"] / whole["weights"] < 1.25


def test_plan_of_parts_fits_all_of_them_or_none() -> None:
    context = ["--shape", "llama-3-8b", "--scheme", "nuq2", "--context", "10000000"]
    assert plan_main([*context, "--tensor-parallel", "2"])["gpus_needed"] is None
    four = plan_main([*context, "--tensor-parallel", "4"])
    assert four["gpus_needed"] == four["gpus"] == 4 and four["largest_context"] > 10**7
    with pytest.raises(
        UserError, match="--tensor-parallel 3: 8 KV heads do not divide by 3 processes; start 2 or 4 or 8"
    ):
        plan_main([*context, "--tensor-parallel", "3"])
    with pytest.raises(UserError, match="--gpus 4 and --tensor-parallel 2 differ; drop --gpus"):
        plan_main([*context, "--tensor-parallel", "2", "--gpus", "4"])
