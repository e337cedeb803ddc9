"""Stage 1's numbers: against finite differences, against the sites themselves; and what recording leaves behind."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gradients.cli import UserError
from gradients.fisher import next_token_loss, record_window
from gradients.models import KVSite, kv_sites

# relative half step of bf16, doubled for what float32 adds
BF16_ERROR = 2.0**-8


def loss_with_one_element_moved(
    model: PreTrainedModel, tokens: Tensor, site: KVSite, token: int, channel: int, step: float
) -> float:
    """The mean next-token loss in float64, one element of one site moved by `step`."""

    def move(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, token, channel] += step
        return x

    with site.rewriting(move), torch.no_grad():
        predictions = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return -float(predictions.gather(1, tokens[1:, None]).mean())


def test_fisher_is_the_squared_slope_of_the_loss(model, make_tokens) -> None:
    """At every site, the five-point difference at elements of large Fisher, which rounding cannot blur.

    The model runs in float64, but its norms compute in float32, hence the wide step.
    """
    tokens, step = make_tokens(31), 0.03
    recorded = record_window(model, tokens)
    precise = type(model)(model.config).double().eval().requires_grad_(False)
    precise.load_state_dict(model.state_dict())
    for site in kv_sites(precise):
        fisher = recorded[f"layers.{site.layer}.{site.kind}.fisher"].double()
        by_size = fisher.flatten().argsort(descending=True)
        for rank in (0, 7, 40):
            token, channel = divmod(int(by_size[rank]), site.channels)
            loss = {
                steps: loss_with_one_element_moved(precise, tokens, site, token, channel, steps * step)
                for steps in (-2, -1, 1, 2)
            }
            slope = (8 * (loss[1] - loss[-1]) - (loss[2] - loss[-2])) / (12 * step)
            place = (site.layer, site.kind, token, channel)
            assert float(fisher[token, channel]) == pytest.approx(slope**2, rel=BF16_ERROR), place


def test_activations_are_the_sites_in_fp16(model, captured_sites, make_tokens) -> None:
    tokens = make_tokens(33)
    with captured_sites(model) as seen:
        model(input_ids=tokens[None], use_cache=False)
    recorded = record_window(model, tokens)
    assert set(recorded) == {
        f"layers.{i}.{kind}.{what}" for i, kind in seen for what in ("activation", "fisher", "moment")
    }
    for (layer, kind), x in seen.items():
        activation = recorded[f"layers.{layer}.{kind}.activation"]
        fisher = recorded[f"layers.{layer}.{kind}.fisher"]
        assert (activation.dtype, fisher.dtype) == (torch.float16, torch.bfloat16)
        assert torch.equal(activation, x[0].half())
        assert fisher.shape == activation.shape == (33, x.shape[-1])
        assert (fisher[:-1] > 0).float().mean() > 0.9


def test_nothing_is_left_behind(model, make_tokens, hook_count) -> None:
    tokens, hooks = make_tokens(31), hook_count(model)
    before = model(input_ids=tokens[None], use_cache=False).logits
    for checkpointing in (False, True):
        record_window(model, tokens, checkpointing)
        assert hook_count(model) == hooks
        assert not any(module.training for module in model.modules())
        assert not model.is_gradient_checkpointing
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(IndexError):
        record_window(model, torch.tensor([5, 10**6]))
    assert hook_count(model) == hooks
    after = model(input_ids=tokens[None], use_cache=False).logits
    assert torch.equal(after, before)
    assert not after.requires_grad


def test_recording_twice_gives_the_same_bits(model, make_tokens) -> None:
    one, other = (record_window(model, make_tokens(33)) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_checkpointing_changes_nothing(model, make_tokens) -> None:
    plain, checkpointed = (record_window(model, make_tokens(33), checkpointing) for checkpointing in (False, True))
    assert plain.keys() == checkpointed.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, checkpointed[name]), name


def test_checkpointing_does_checkpoint(llama, make_tokens) -> None:
    """With it, the backward pass runs each layer's attention a second time."""
    runs = []
    handle = llama.get_decoder().layers[0].self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    record_window(llama, make_tokens(9))
    assert len(runs) == 1
    record_window(llama, make_tokens(9), checkpointing=True)
    handle.remove()
    assert len(runs) == 3


@pytest.mark.parametrize("tokens", [2, 3, 257])
def test_windows_of_any_length(tokens: int, llama, make_tokens) -> None:
    recorded = record_window(llama, make_tokens(tokens))
    assert {tuple(tensor.shape) for tensor in recorded.values()} == {(tokens, 24), (2, 12, 12)}
    # the last token predicts nothing that counts
    assert all(not tensor[-1].any() for name, tensor in recorded.items() if name.endswith("fisher"))


def test_the_loss_is_the_mean_over_predicted_tokens(make_tokens) -> None:
    logits = torch.randn(2, 7, 259, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = make_tokens(2, 7)
    by_hand = [
        logits[row, place].logsumexp(0) - logits[row, place, tokens[row, place + 1]]
        for row in range(2)
        for place in range(6)
    ]
    assert float(next_token_loss(logits, tokens)) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-6)


def test_half_precision_models_keep_small_gradients(make_model, make_tokens) -> None:
    tokens = make_tokens(33)
    precise = record_window(make_model("llama"), tokens)
    half = record_window(make_model("llama").half(), tokens)
    for name in (name for name in precise if name.endswith("fisher")):
        wanted, got = precise[name].float(), half[name].float()
        assert float((got - wanted).norm() / wanted.norm()) < 0.05, name
        assert ((got == 0) == (wanted == 0)).float().mean() > 0.999, name


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_layer(
    poison: float, kind: str, layer: int, make_model, make_tokens, hook_count
) -> None:
    model = make_model("llama")
    attention = model.get_decoder().layers[layer].self_attn
    (attention.k_proj if kind == "key" else attention.v_proj).weight[3, 5] = poison
    with pytest.raises(UserError) as caught:
        record_window(model, make_tokens(33))
    assert f"layer {layer} {kind} activation" in str(caught.value)
    assert "NaN or infinite" in str(caught.value)
    assert "--dtype float32" in str(caught.value)
    assert hook_count(model) == 0


def test_activations_beyond_fp16_name_their_layer(make_model, make_tokens) -> None:
    model = make_model("llama")
    model.get_decoder().layers[1].self_attn.v_proj.weight.mul_(1e6)
    with pytest.raises(UserError, match=r"layer 1 value activation: .* of 792 elements .* as torch.float16"):
        record_window(model, make_tokens(33))


def test_a_gradient_that_is_not_finite_names_its_layer(make_model, make_tokens) -> None:
    model = make_model("llama")
    model.get_output_embeddings().weight[7, 7] = float("nan")
    with pytest.raises(UserError, match=r"layer 0 key fisher: .* NaN or infinite"):
        record_window(model, make_tokens(33))
