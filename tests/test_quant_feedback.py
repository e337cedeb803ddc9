"""Error feedback: its arithmetic against a loop over single numbers, what it is for, and what is refused."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from test_quant_artefact import rewrite
from torch import Tensor

from gradients.__main__ import main as record
from gradients.cli import UserError
from gradients.fisher import record_window
from gradients.models import KVSite, kv_sites
from gradients.records import Records
from quant.artefact import Quantizers, load_quantizers
from quant.codebook import Codebook, int_codebook, nf_codebook
from quant.compensate import fit_feedback, stretched
from quant.feedback import Feedback
from quant.fit import fit
from quant.mixed import MixedQuantizer
from quant.quantizer import ChannelQuantizer, Quantizer, TokenQuantizer
from quant.results import read_rows
from quant.scheme import Scheme
from quant.side import Side
from scripts.experiments.ablate_feedback import IDEAS
from scripts.experiments.ablate_feedback import main as ablate

HEADS, DIM = 2, 6
SCHEMES = ["nuq3+fb", "nuq2-1%+fb", "rdnuq2.4+fb", "rdnuq2.4g1-4%+fb", "int4+fb", "nf3-2%+fb"]


def random_feedback(heads: int, dim: int, seed: int = 0) -> Feedback:
    draw = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(dim, generator=draw) for _ in range(heads)])
    return Feedback(order, (torch.randn(heads, dim, dim, generator=draw) * 0.3).triu(1).half())


def quantizer_of(form: str, heads: int, dim: int) -> Quantizer:
    draw, channels, feedback = torch.Generator().manual_seed(1), heads * dim, random_feedback(heads, dim)
    scale = torch.rand(channels, generator=draw) + 0.5
    zero = torch.randn(channels, generator=draw) * 0.1
    if form == "channel":
        return ChannelQuantizer(Scheme.parse("nf3-2%+fb"), nf_codebook(8), scale, zero, feedback)
    if form == "token":
        return TokenQuantizer(Scheme.parse("int2-10%+fb"), int_codebook(4), None, feedback)
    widths = torch.arange(channels) % 4
    books = {width: int_codebook(2**width) for width in range(4)}
    return MixedQuantizer(Scheme.parse("rdnuq2-4%+fb"), books, widths.to(torch.uint8), scale, zero, feedback)


def by_hand(quantizer: Quantizer, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(codes, targets) `[T, C]`, number by number in float32."""
    feedback, encoded = quantizer.feedback, replace(quantizer, feedback=None).encode(x)
    heads, dim = feedback.order.shape
    codes, targets = np.zeros(x.shape, np.uint8), x.numpy().copy()
    for token in range(len(x)):
        for head in range(heads):
            order = (feedback.order[head] + head * dim).tolist()
            for i, channel in enumerate(order):
                if isinstance(quantizer, TokenQuantizer):
                    s, z = encoded.scale[token].float().numpy()[0], encoded.zero[token].float().numpy()[0]
                else:
                    s, z = quantizer.scale[channel].numpy(), quantizer.zero[channel].numpy()
                mixed = isinstance(quantizer, MixedQuantizer)
                book = quantizer.codebooks[int(quantizer.widths[channel])] if mixed else quantizer.codebook
                target = targets[token, channel]
                code = int((book.boundaries.numpy() < (target - z) / s).sum())
                value = book.levels.numpy()[code] * s + z
                if encoded.outliers is not None and encoded.outliers[token, channel]:
                    value = np.float32(np.float16(target))
                codes[token, channel] = code
                for j in range(i + 1, dim):
                    product = np.float32(target - value) * np.float32(feedback.matrix[head, i, j])
                    targets[token, order[j]] = np.float32(targets[token, order[j]] - product)
    return codes, targets


@pytest.mark.parametrize("form", ["channel", "token", "mixed"])
def test_codes_and_targets_are_those_of_a_loop_over_single_numbers(form: str) -> None:
    quantizer = quantizer_of(form, HEADS, DIM)
    x = torch.randn(9, HEADS * DIM, generator=torch.Generator().manual_seed(2)) * 1.2
    encoded, targets = quantizer.coded(x)
    codes, by_number = by_hand(quantizer, x)
    assert encoded.outliers.any()
    np.testing.assert_array_equal(encoded.codes.numpy(), codes)
    np.testing.assert_array_equal(targets.numpy(), by_number)
    torch.testing.assert_close(encoded.exact, targets[encoded.outliers].half(), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["channel", "token", "mixed"])
def test_the_kernel_of_the_simulation_is_the_loop_bit_for_bit(form: str, monkeypatch) -> None:
    feedback_kernel = pytest.importorskip("quant.feedback_kernel", exc_type=ImportError)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
    quantizer = quantizer_of(form, HEADS, DIM).to(device)
    x = torch.randn(35, HEADS * DIM, generator=torch.Generator().manual_seed(6)).mul_(1.2).to(device)
    monkeypatch.setattr("quant.feedback._in_one_launch", lambda _: False)
    looped, loop_targets = quantizer.coded(x)
    monkeypatch.setattr("quant.feedback._in_one_launch", lambda _: True)
    with patch.object(feedback_kernel, "feed_back", wraps=feedback_kernel.feed_back) as launch:
        encoded, targets = quantizer.coded(x)
    launch.assert_called_once()
    assert torch.equal(encoded.codes, looped.codes)
    assert torch.equal(targets, loop_targets)
    assert torch.equal(encoded.exact, looped.exact)


def test_tiles_shapes_and_one_token_at_a_time_change_nothing(monkeypatch) -> None:
    quantizer = quantizer_of("token", HEADS, DIM)
    x = torch.randn(2, 5, HEADS * DIM, generator=torch.Generator().manual_seed(4))
    whole, targets = quantizer.coded(x)
    single = [quantizer.coded(x[:, [token]]) for token in range(5)]
    assert torch.equal(torch.cat([encoded.codes for encoded, _ in single], 1), whole.codes)
    monkeypatch.setattr("quant.feedback._TILE_ELEMENTS", {"cpu": 3 * HEADS * DIM})
    tiled, tiled_targets = quantizer.coded(x)
    assert torch.equal(tiled.codes, whole.codes)
    assert torch.equal(tiled_targets, targets)
    assert quantizer.encode(x[:, :0]).codes.shape == (2, 0, HEADS * DIM)


def correlated_moment(dim: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(1, dim, dim, generator=draw, dtype=torch.float64)
    return root @ root.mT / dim + 0.05 * torch.eye(dim, dtype=torch.float64)


def test_the_matrix_is_the_inverse_factor_of_the_damped_moment() -> None:
    moment, damping = correlated_moment(8), 0.03
    feedback, left = fit_feedback(moment, torch.ones(1, 8), "here", damping)
    order = feedback.order[0]
    damped = moment[0][order][:, order] + damping * moment[0].diagonal().mean() * torch.eye(8, dtype=torch.float64)
    upper = feedback.matrix[0].double() + torch.eye(8, dtype=torch.float64)
    # A = U^-1 D U^-T with D the diagonal that is left
    diagonal = upper @ damped @ upper.T
    torch.testing.assert_close(diagonal, diagonal.diagonal().diag(), rtol=0, atol=5e-3)
    torch.testing.assert_close(left.double()[order], diagonal.diagonal() / damped.diagonal(), rtol=5e-3, atol=0)
    costs = moment[0].diagonal()[order]
    assert (costs.diff() <= 0).all()


def test_handed_on_errors_cost_less_under_the_whole_matrix() -> None:
    dim, draw = 16, torch.Generator().manual_seed(7)
    moment = correlated_moment(dim)
    feedback, left = fit_feedback(moment, torch.ones(1, dim), "here")
    plain = ChannelQuantizer(Scheme.parse("int3"), int_codebook(8), torch.full((dim,), 3.0), torch.zeros(dim))
    x = torch.randn(2000, dim, generator=draw)
    costs = []
    for quantizer in (plain, replace(plain, feedback=feedback)):
        error = (quantizer.decode(quantizer.encode(x)) - x).double()
        costs.append(float(torch.einsum("ti,ij,tj->t", error, moment[0], error).mean()))
    assert costs[1] < 0.8 * costs[0]
    assert float(left.min()) < 0.8


def test_a_moment_that_is_not_positive_is_damped_further_and_said() -> None:
    moment = correlated_moment(4)
    moment[0, 0, 1] = moment[0, 1, 0] = 10 * moment[0].diagonal().max()
    with pytest.warns(UserWarning, match="layer 3 key head 0: moments .* not positive semi-definite"):
        feedback, left = fit_feedback(moment, torch.ones(1, 4), "layer 3 key")
    assert feedback.matrix.isfinite().all()
    assert left.isfinite().all()


def test_a_head_without_gradients_hands_nothing_on() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feedback, left = fit_feedback(torch.zeros(1, 4, 4, dtype=torch.float64), torch.ones(1, 4), "here")
    assert not feedback.matrix.any()
    assert torch.equal(left, torch.ones(4))


def test_moments_are_the_products_of_the_gradients(model, make_tokens) -> None:
    tokens, gradients = make_tokens(12), {}

    def keep(site: KVSite) -> Callable[..., Tensor]:
        def hook(_module: object, _inputs: object, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_()
            output.register_hook(
                lambda gradient: gradients.__setitem__((site.layer, site.kind), site.read(gradient)[0])
            )
            return output

        return hook

    handles = [site.module.register_forward_hook(keep(site)) for site in kv_sites(model)]
    logits = model(input_ids=tokens[None], use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], tokens[1:]).backward()
    for handle in handles:
        handle.remove()
    recorded = record_window(model, tokens)
    for site in kv_sites(model):
        by_head = gradients[site.layer, site.kind][1:].unflatten(-1, (site.heads, site.head_dim)).double()
        expected = torch.einsum("tgi,tgj->gij", by_head, by_head)
        moment = recorded[f"layers.{site.layer}.{site.kind}.moment"]
        assert moment.dtype == torch.float32
        torch.testing.assert_close(moment.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_records_without_moments_refuse_feedback_in_one_line(records) -> None:
    old = replace(records, manifest=replace(records.manifest, moment_windows=0))
    with pytest.raises(UserError, match="hold no moments of gradients.*record again"):
        fit(old, Scheme.parse("nuq3+fb"))
    assert isinstance(fit(old, Scheme.parse("nuq3")), Quantizers)


def test_q_norm_and_foreign_forms_refuse_feedback() -> None:
    for name in ("kivi2+fb", "turbo3+fb", "flexgen4+fb", "datafree2+fb"):
        with pytest.raises(UserError, match="error feedback needs codes chosen element by element"):
            Scheme.parse(name)
    with pytest.raises(UserError, match="keys before RoPE"):
        Scheme.parse("nuq3+fb", key_rope="post")
    with pytest.raises(UserError, match="drop q_norm"):
        Scheme.parse("nuq2+fb", q_norm=True)


@pytest.mark.parametrize("fault", ["order", "lower", "missing"])
def test_artefacts_with_another_feedback_than_was_fitted_are_refused(fault: str, records, tmp_path) -> None:
    path = tmp_path / "fb.safetensors"
    fit(records, Scheme.parse("nuq3+fb")).save(path)

    def change(tensors: dict[str, Tensor], _content: object) -> None:
        if fault == "order":
            tensors["layers.1.key.order"][0, 0] = tensors["layers.1.key.order"][0, 1]
        elif fault == "lower":
            tensors["layers.0.value.feedback"][1, 3, 2] = 0.25
        else:
            del tensors["layers.0.value.feedback"]

    messages = {"order": "no permutation", "lower": "strictly upper triangular", "missing": "lacks tensor"}
    with pytest.raises(UserError, match=messages[fault]):
        load_quantizers(rewrite(path, tmp_path / "changed.safetensors", change))


def test_the_ablation_compares_every_idea_on_windows_it_has_not_seen(record_arguments, records, tmp_path) -> None:
    with pytest.raises(UserError, match="4 windows, 4 of moments; record at least 2, and --moment-windows beyond them"):
        ablate(["--records", str(records.folder)])
    folder, results = tmp_path / "records", tmp_path / "rows.jsonl"
    record([*record_arguments, "--windows", "2", "--moment-windows", "4", "--output", str(folder)])
    ablate(["--records", str(folder), "--schemes", "nuq2", "int3", "--results", str(results)])
    rows = {(row["scheme"], row["idea"]): row["error_ratio"] for row in read_rows(results)}
    assert len(rows) == 2 * len(IDEAS)
    assert rows["nuq2", "none"] == rows["int3", "none"] == 1
    # int's levels are not fitted, so that refitting changes nothing
    kept, fitted = list(IDEAS)[1:3]
    assert rows["int3", kept] == rows["int3", fitted]
    assert rows["nuq2", kept] != rows["nuq2", fitted]


def slope_of(quantizer: TokenQuantizer, x: Tensor) -> float:
    """Of decoded numbers on their targets, without those kept exactly, each channel about its mean."""
    encoded, targets = quantizer.coded(x)
    decoded = quantizer.decode(encoded)
    products, squares = [], []
    for channel in range(x.shape[1]):
        kept = ~encoded.outliers[:, channel] if encoded.outliers is not None else torch.ones(len(x), dtype=torch.bool)
        y, v = targets[kept, channel].double(), decoded[kept, channel].double()
        products.append(((y - y.mean()) * v).sum())
        squares.append((y - y.mean()).square().sum())
    return float(sum(products) / sum(squares))


@pytest.mark.parametrize("scheme", ["nuq2+fb", "nuq2-10%+fb"])
def test_stretched_levels_shrink_values_less(scheme: str) -> None:
    draw = torch.Generator().manual_seed(9)
    x = 0.3 * torch.randn(HEADS * DIM, generator=draw) + torch.randn(3000, HEADS * DIM, generator=draw)
    before = replace(
        quantizer_of("token", HEADS, DIM),
        scheme=Scheme.parse(scheme),
        codebook=Codebook.from_levels(torch.tensor([-0.6, -0.2, 0.2, 0.6])),
    )
    after = stretched(before, Side(x, torch.ones_like(x)))
    assert slope_of(before, x) < 0.9
    assert abs(1 - slope_of(after, x)) < 0.4 * (
        1 - slope_of(before, x)
    )  # codes follow the levels, so two steps do not get there
    ratio = after.codebook.levels / before.codebook.levels
    torch.testing.assert_close(ratio, ratio[:1].expand(4))
    torch.testing.assert_close(after.codebook.boundaries, before.codebook.boundaries * ratio[0])


def test_values_that_do_not_vary_are_not_stretched() -> None:
    quantizer = quantizer_of("token", HEADS, DIM)
    constant = torch.linspace(-1, 1, HEADS * DIM).expand(50, -1)
    assert stretched(quantizer, Side(constant, torch.ones_like(constant))) is quantizer


def test_only_fitted_levels_of_values_are_stretched(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watched(quantizer: TokenQuantizer, _side: Side) -> TokenQuantizer:
        asked.append(str(quantizer.scheme))
        return quantizer

    monkeypatch.setattr("quant.fit.stretched", watched)
    for name in ("nuq3+fb", "nuq2-1%+fb", "rdnuq2.4+fb", "int4+fb", "nuq3"):
        fit(records, Scheme.parse(name))
    layers = len(records.manifest.fingerprint.cached_layers)
    assert asked == ["nuq3+fb"] * layers + ["nuq2-1%+fb"] * layers
