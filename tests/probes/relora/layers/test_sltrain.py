"""SLTrain layers: a low-rank product plus a sparse matrix in the place of a weight."""

import pytest
import torch

from probes.relora import build_model, parameter_counts
from probes.relora.layers.of_method import with_layers_of
from probes.relora.layers.sltrain import SLTrainLinear
from probes.relora.sweep_plan import plan
from tests.probes.relora.conftest import tiny_config


def model(**changes):
    config = tiny_config(method="sltrain", **changes)
    return with_layers_of(config, build_model(config)), config


def test_all_else_is_that_of_the_twin_and_the_seed_draws_the_rest():
    made, config = model(target_modules=("q_proj", "up_proj"))
    twin = dict(build_model(tiny_config(method="full_rank")).named_parameters())
    for name, parameter in made.named_parameters():
        if "lora" not in name and "sparse" not in name:
            assert torch.equal(parameter, twin[name]), name
    state, again = made.state_dict(), model(target_modules=("q_proj", "up_proj"))[0].state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    other = model(target_modules=("q_proj", "up_proj"), seed=config.seed + 1)[0].state_dict()
    name = "model.layers.0.self_attn.q_proj.sparse_index"
    assert not torch.equal(state[name], other[name])


def test_parameters_are_counted_without_a_model():
    made, config = model(sparsity=0.1)
    count = sum(parameter.numel() for parameter in made.parameters())
    assert parameter_counts(config) == (count, count)


def test_the_first_weight_is_s_and_what_is_added_has_rank_r():
    layer = SLTrainLinear(24, 18, rank=4, scaling=2.0, sparsity=0.1).double()
    first, index = layer.weight.detach(), layer.sparse_index
    assert int(first.count_nonzero()) == int(0.1 * 18 * 24) == len(index.unique())
    assert torch.equal(first.flatten()[index], layer.sparse_value)
    assert first.abs().max() <= 24**-0.5
    with torch.no_grad():
        layer.lora_B.normal_()
    added = layer.weight - first
    assert int(torch.linalg.matrix_rank(added)) == 4
    torch.testing.assert_close(added, 2.0 * layer.lora_B @ layer.lora_A)


def test_three_steps_equal_the_formulas_of_the_paper():
    """Equation 2 and its gradients, by hand in float64, with the plain formula of Adam."""
    torch.manual_seed(0)
    layer = SLTrainLinear(6, 5, rank=2, scaling=0.5, sparsity=0.2).double()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.0)
    a, b, v = (p.detach().clone() for p in (layer.lora_A, layer.lora_B, layer.sparse_value))
    rows, cols = layer.sparse_index // 6, layer.sparse_index % 6
    moments = [[torch.zeros_like(each), torch.zeros_like(each)] for each in (a, b, v)]
    for step in (1, 2, 3):
        x, target = torch.randn(7, 6).double(), torch.randn(7, 5).double()
        loss = (layer(x) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        weight = 0.5 * b @ a
        weight[rows, cols] += v
        g = 2 * (x @ weight.T - target).T @ x
        gradients = (0.5 * b.T @ g, 0.5 * g @ a.T, g[rows, cols])
        for each, gradient, (m, s) in zip((a, b, v), gradients, moments, strict=True):
            m.mul_(0.9).add_(gradient, alpha=0.1)
            s.mul_(0.999).add_(gradient**2, alpha=0.001)
            each -= 1e-2 * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
        for trained, expected in zip(layer.parameters(), (a, b, v), strict=True):
            torch.testing.assert_close(trained.detach(), expected, rtol=1e-10, atol=1e-12)


def test_a_sweep_varies_what_matters_and_matches_parameters_by_the_rank():
    words = ("sparsity=0.03,0.1", "lora_alpha=8,16", "lora_dropout=0,0.1")
    runs = plan("micro", methods=("full_rank", "sltrain"), words=words)
    assert [run.name.partition("-")[0] for run in runs] == ["full_rank"] + 4 * ["sltrain"]
    matched = plan("micro", methods=("sltrain", "cola"), match="trainable_parameters")
    one, other = (parameter_counts(run.config)[0] for run in matched)
    assert other == pytest.approx(one, rel=0.02)
