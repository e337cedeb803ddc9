"""Models that somebody adds to `SITES` although they attend in a way that is not ours."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import _SIZES
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    PreTrainedModel,
    StableLmConfig,
)

from deployment.attention import packed_attention
from deployment.cache import PackedCache
from deployment.step import same_attention
from gradients.models import SITES
from quant.scheme import Scheme

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
REFUSED: dict[str, tuple[str, Callable[[], Any]]] = {
    "interleaved pairs": ("rotates", lambda: CohereConfig(**_SIZES)),
    "interleaved pairs of a part": ("rotates", lambda: GlmConfig(**_SIZES, head_dim=12)),
    "capped scores": ("softcap", lambda: Gemma2Config(**_SIZES, head_dim=12, sliding_window=16)),
    "sinks of its own": (
        "s_aux",
        lambda: GptOssConfig(**_SIZES, head_dim=12, num_local_experts=4, num_experts_per_tok=2, rope_parameters=_ROPE),
    ),
}
TAKEN: dict[str, Callable[[], Any]] = {
    "a scale of its own": lambda: GraniteConfig(**_SIZES, attention_multiplier=0.7),
    "a part of each head": lambda: StableLmConfig(**_SIZES, rope_parameters=_ROPE | {"partial_rotary_factor": 0.5}),
}


def built(config: Any, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """A random model whose architecture was added as the message of a refusal says."""
    monkeypatch.setitem(SITES, config.model_type, SITES["llama"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("case", REFUSED)
def test_attention_that_is_not_ours_is_refused(case: str, monkeypatch) -> None:
    reason, config = REFUSED[case]
    model = built(config(), monkeypatch)
    for _ in range(2):  # the second time it is not forgotten
        with pytest.raises(NotImplementedError, match=reason), packed_attention(model):
            pass
    assert model.config._attn_implementation == "eager"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("case", TAKEN)
def test_attention_that_is_ours_equals_stock(case: str, monkeypatch, fit_model, make_tokens) -> None:
    model, ids = built(TAKEN[case](), monkeypatch), make_tokens(1, 40)
    expected = model(ids, use_cache=False).logits
    cache = PackedCache(fit_model(model, Scheme.parse("int4", sink_tokens=150)), model.config)
    with packed_attention(model):
        logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(20, dim=1)], dim=1)
    assert (logits - expected).square().mean().sqrt() < 3e-3 * expected.square().mean().sqrt()


def test_a_layer_that_does_not_rotate_is_found(make_model) -> None:
    """As SmolLM3 has some; a setting tells it from the others."""
    model = make_model("llama")
    module = model.model.layers[1].self_attn
    module.use_rope = False
    original = module.forward

    def forward(position_embeddings: tuple[Tensor, Tensor], **options: Any) -> Any:
        cos, sin = position_embeddings
        return original(position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **options)

    module.forward = forward
    with pytest.raises(NotImplementedError, match="layer 1 in another way"), packed_attention(model):
        pass


def test_attention_that_keeps_arguments_to_itself_is_refused(make_model) -> None:
    model = make_model("llama")
    module = model.model.layers[0].self_attn
    original = module.forward

    def forward(packed_layer: object = None, **options: Any) -> Any:
        return original(**options)

    module.forward = forward
    with pytest.raises(NotImplementedError, match="keeps arguments from its attention"), packed_attention(model):
        pass


def test_a_model_is_asked_once(make_model, monkeypatch) -> None:
    model, asked = make_model("gemma3"), []
    rotation = same_attention._refuse_other_rotation
    monkeypatch.setattr(
        same_attention, "_refuse_other_rotation", lambda *given: asked.append(given[1]) or rotation(*given)
    )
    for _ in range(2):
        with packed_attention(model):
            pass
    assert asked == [0, 1]  # a sliding and a full layer of four
