"""Which sums of a tensor-parallel model's processes go to the kernel."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deployment.step import summed


class Doubling:
    """Sums of two processes that have the same."""

    def takes(self, numbers: int, dtype: torch.dtype) -> bool:
        return numbers <= 6 and dtype == torch.float32

    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        return 2 * part


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch):
    """Two layers that are split by rows and one that is not, of a model on a GPU."""
    model = nn.ModuleDict({name: nn.Linear(4, 3, bias=name == "o1") for name in ("o0", "o1", "gate")})
    model.tp_plan = {"o*": "rowwise", "gate": "colwise"}
    mesh = SimpleNamespace(get_group=lambda: "the group")
    for module in model.values():
        module.weight.to_local, module.weight.device_mesh = module.weight.detach, mesh
        module.forward = lambda x: torch.full((3,), 7.0)  # transformers' own
    monkeypatch.setattr(summed, "input_device", lambda _model: torch.device("cuda"))
    monkeypatch.setattr("deployment.kernels.sums.opened", lambda group, _device: Doubling() if group else None)
    return model


def test_small_sums_are_the_kernels_and_others_transformers_own(model) -> None:
    x, theirs = torch.randn(2, 4), torch.full((3,), 7.0)
    with summed.summed_at_once(model):
        with torch.no_grad():
            for name in ("o0", "o1"):
                module = model[name]
                expected = 2 * (x @ module.weight.T) + (0 if module.bias is None else module.bias)
                torch.testing.assert_close(module(x), expected)
                assert torch.equal(module(torch.randn(3, 4)), theirs), "too many"
                assert torch.equal(module(x.double()), theirs)
            assert torch.equal(model["gate"](x), theirs), "nothing is summed there"
        assert torch.equal(model["o0"](x), theirs), "gradients are recorded"
    with torch.no_grad():
        assert torch.equal(model["o0"](x), theirs)


def test_nothing_changes_where_gpus_are_not_linked(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployment.kernels.sums.opened", lambda *_: None)
    before = {name: module.forward for name, module in model.items()}
    with summed.summed_at_once(model):
        assert {name: module.forward for name, module in model.items()} == before


def test_a_layer_is_left_as_it_was(model) -> None:
    del model["o1"].forward  # the class's, as of a layer without a hook
    before = {name: dict(vars(module)) for name, module in model.items()}
    with summed.summed_at_once(model):
        assert vars(model["o0"]) != before["o0"]
    assert {name: vars(module) for name, module in model.items()} == before
