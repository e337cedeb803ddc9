"""--max-positions: linear RoPE scaling, the same in every stage."""

import pytest
import torch
from conftest import CONFIGS, build_model
from transformers import Qwen2Config

from deployment.generate import main as generate_main
from gradients.__main__ import main as record_main
from gradients.cli import UserError
from gradients.fingerprint import Fingerprint
from gradients.loading import load_model
from gradients.positions import extend_positions, usable_positions
from gradients.rope import rope_tables
from quant.artefact import load_quantizers
from quant.evaluate import main as evaluate_main
from quant.fit import main as fit_main


def test_angles_are_those_of_positions_divided(llama_folder, make_tokens) -> None:
    stock = load_model(str(llama_folder), device="cpu").model
    extended = load_model(str(llama_folder), device="cpu", max_positions=2048).model
    assert extended.config.max_position_embeddings == 2048
    cos, sin = rope_tables(stock, 101)
    wide_cos, wide_sin = rope_tables(extended, 401)
    assert torch.allclose(wide_cos[::4], cos, atol=1e-5) and torch.allclose(wide_sin[::4], sin, atol=1e-5)
    tokens = make_tokens(1, 30)
    expected = stock(tokens, position_ids=torch.arange(30)[None] / 4).logits
    assert torch.allclose(extended(tokens).logits, expected, atol=1e-3)
    assert not torch.allclose(extended(tokens).logits, stock(tokens).logits, atol=1e-1)


@pytest.mark.parametrize(
    ("name", "positions", "message"),
    [
        ("llama", 512, "--max-positions 512 does not exceed the 512 positions"),
        ("llama", 100, "--max-positions 100 does not exceed"),
        ("llama-yarn-mha", 4096, "RoPE scaling of its own \\(yarn\\)"),
        ("gemma3", 4096, "rotary embedding for each type of layer"),
    ],
)
def test_positions_that_cannot_be_extended_are_refused(name: str, positions: int, message: str) -> None:
    config = CONFIGS[name]()
    before = config.to_dict()
    with pytest.raises(UserError, match=message):
        extend_positions(config, positions)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("original", "held", "usable"), [(128, 128, 512), (128, 600, 600), (None, 128, 512), (32, 128, 128)]
)
def test_yarn_gives_the_positions_its_factor_says(original: int | None, held: int, usable: int) -> None:
    """Qwen's model cards add it to a config and leave `max_position_embeddings` as it is."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    named = {} if original is None else {"original_max_position_embeddings": original}
    config = Qwen2Config(max_position_embeddings=held, rope_parameters=yarn | named)
    assert usable_positions(config) == usable
    assert usable_positions(CONFIGS["gemma3"]()) == usable_positions(CONFIGS["llama"]()) == 512
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}  # as --max-positions sets it
    assert usable_positions(Qwen2Config(max_position_embeddings=512, rope_parameters=linear)) == 512


def test_yarn_is_used_to_its_end(save_model, text_file, tmp_path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    config = CONFIGS["qwen2"]()
    config.max_position_embeddings, config.rope_parameters = 128, yarn
    model = ["--model", str(save_model(build_model(config), tmp_path / "yarn")), "--device", "cpu"]
    text, fitted = ["--text", str(text_file), "--windows", "1"], str(tmp_path / "q.safetensors")
    record_main([*model, *text, "--seqlen", "300", "--output", str(tmp_path / "records")])
    fit_main(["--records", str(tmp_path / "records"), "--scheme", "nuq4-1%", "--output", fitted])
    prompt = ["--quantizers", fitted, "--prompt", "the key of " * 40, "--max-new-tokens"]  # 440 tokens
    assert generate_main([*model, *prompt, "8"])["tokens"] == 447
    with pytest.raises(UserError, match="the model's positions are 512"):
        generate_main([*model, *prompt, "80"])
    with pytest.raises(UserError, match="exceeds the 512 positions"):
        record_main([*model, *text, "--seqlen", "513", "--output", str(tmp_path / "none")])


def test_partial_rotary_embeddings_stay_partial() -> None:
    config = CONFIGS["phi3-partial"]()
    extend_positions(config, 1024)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    build_model(config)(torch.arange(3, 40)[None])


def test_all_stages_see_the_same_model(llama, llama_folder, text_file, quantizers_file, tmp_path) -> None:
    model = ["--model", str(llama_folder), "--device", "cpu"]
    longer = [*model, "--max-positions", "1024"]
    text = ["--text", str(text_file), "--windows", "1", "--seqlen", "600"]
    with pytest.raises(UserError, match="exceeds the 512 positions"):
        record_main([*model, *text, "--output", str(tmp_path / "none")])
    record_main([*longer, *text, "--output", str(tmp_path / "records")])
    fitted = str(tmp_path / "q.safetensors")
    fit_main(["--records", str(tmp_path / "records"), "--scheme", "nuq4-1%", "--output", fitted])
    assert '"rope_type":"linear"' in load_quantizers(fitted).fingerprint.rope
    assert load_quantizers(fitted).fingerprint != Fingerprint.of(llama.config)
    result = evaluate_main([*longer, *text, "--quantizers", fitted])
    assert result is not None and result["tokens"] == 599
    prompt = ["--prompt", "the key of " * 50, "--max-new-tokens", "8"]  # 550 tokens, more than the model's 512
    assert generate_main([*longer, "--quantizers", fitted, *prompt])["tokens"] == 557
    for arguments in ([*model, "--quantizers", fitted], [*longer, "--quantizers", str(quantizers_file)]):
        with pytest.raises(UserError, match="another model: rope.*same --max-positions"):
            generate_main([*arguments, *prompt])
