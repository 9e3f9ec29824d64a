"""Weights computed from parameters: as an evaluation computes them, without side effects."""

import warnings

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.probes.model.reading import by_name, randomised, read_all, untouched


class Symmetric(nn.Module):
    """A parametrisation of a user."""

    def forward(self, x):
        return x.triu() + x.triu(1).mT


class Noise(nn.Module):
    """A parametrisation that draws random numbers and counts how often it ran."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + torch.randn_like(x)


class LowRank(nn.Module):
    """LoRA as a parametrisation, with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, x):
        return x + self.b @ self.a


def _with(parametrisation):
    def apply(module):
        parametrize.register_parametrization(module, "weight", parametrisation())

    return apply


def _old(norm):
    def apply(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            norm(module)

    return apply


def _masked(module, name="weight"):
    prune.l1_unstructured(module, name, amount=0.3)


def _stacked(*applications):
    def apply(module):
        for each in applications:
            each(module)

    return apply


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "symmetric": _with(Symmetric),
    "low_rank": _with(LowRank),
    "two": _stacked(_with(Symmetric), parametrizations.spectral_norm),
    "old_weight_norm": _old(nn.utils.weight_norm),
    "old_spectral_norm": _old(nn.utils.spectral_norm),
    "pruned": _masked,
    "pruned_twice": _stacked(_masked, lambda each: prune.random_unstructured(each, "weight", 0.2)),
    "weight_norm_of_pruned": _stacked(
        _old(nn.utils.weight_norm), lambda each: _masked(each, "weight_v")
    ),
    "parametrisation_of_pruned": _stacked(
        _with(Symmetric), lambda each: _masked(each.parametrizations.weight, "original")
    ),
}
ONE_PARAMETER = {"spectral_norm", "orthogonal", "symmetric", "low_rank", "two"} | {
    "old_spectral_norm",
    "pruned",
    "pruned_twice",
    "parametrisation_of_pruned",
}


def _model(way):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    torch.manual_seed(2)
    WAYS[way](model[0])
    return model


def _adapted(way, config):
    """The model with an adapter: PEFT finds no layers that are parametrised before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    adapted = randomised(peft.get_peft_model(model, config))
    torch.manual_seed(2)
    WAYS[way](adapted.base_model.model[0].base_layer)
    return adapted


def _stepped(model):
    """After one step of training, so that what hooks computed before is out of date."""
    model.train()
    model(torch.randn(3, 8)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    return model


@pytest.mark.parametrize("way", WAYS)
def test_the_weight_is_what_an_evaluation_computes_with(way):
    model = _stepped(_model(way))
    values = read_all(model)
    assert set(values) == {f"{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")}
    used = []
    model[0].register_forward_hook(lambda *call: used.append((call[0].weight.clone(), *call[1:])))
    model.eval()(torch.randn(3, 8))
    weight, (x,), y = used[0]
    assert torch.equal(values["0.weight"], weight)
    assert torch.equal(nn.functional.linear(x, values["0.weight"], values["0.bias"]), y)


@pytest.mark.parametrize("way", WAYS)
def test_its_parameter_is_the_one_original_of_its_shape(way):
    model = _model(way)
    weight = by_name(model)[0]["0.weight"]
    assert weight.shape == (8, 8)
    assert weight.trains
    assert (weight.parameter is not None) == (way in ONE_PARAMETER)
    ids = {id(parameter) for parameter in model[0].parameters()}
    assert {id(part) for part in weight.parts} == ids - {id(model[0].bias)}


@pytest.mark.parametrize("way", WAYS)
def test_the_weight_below_an_adapter_is_the_computed_one(way):
    base = read_all(_model(way))["0.weight"]
    adapted = _adapted(way, peft.LoraConfig(r=2, target_modules=["0"]))
    layer = adapted.base_model.model[0]
    weight = by_name(adapted)[0]["0.weight"]
    expected = base + layer.get_delta_weight("default")
    assert torch.equal(read_all(adapted)["0.weight"], expected)
    assert weight.factors() is not None
    assert torch.equal(weight.base(), base)


@pytest.mark.parametrize("way", WAYS)
def test_other_methods_merge_into_the_computed_weight(way):
    adapted = _adapted(way, peft.IA3Config(target_modules=["0"], feedforward_modules=[])).eval()
    values, x = read_all(adapted), torch.randn(3, 8)
    expected = adapted.base_model.model[0](x)
    got = nn.functional.linear(x, values["0.weight"], values["0.bias"])
    torch.testing.assert_close(got, expected)


def test_random_numbers_and_buffers_of_a_parametrisation_are_put_back():
    model = nn.Sequential(nn.Linear(8, 8))
    parametrize.register_parametrization(model[0], "weight", Noise())
    with untouched(model):
        weight = by_name(model)[0]["0.weight"]
        assert torch.equal(weight.read(), weight.read())


def test_reading_inside_of_a_cache_of_parametrisations_leaves_the_cache_alone():
    model = _model("symmetric")
    weight = by_name(model)[0]["0.weight"]
    with parametrize.cached():
        stale = model[0].weight.detach().clone()
        with torch.no_grad():
            model[0].parametrizations.weight.original.mul_(2)
        assert torch.equal(weight.read(), 2 * stale)
        assert torch.equal(model[0].weight, stale)


def test_reading_does_not_advance_the_power_iteration():
    for way in ("spectral_norm", "old_spectral_norm"):
        model, without = _model(way).train(), _model(way).train()
        weight = by_name(model)[0]["0.weight"]
        for _ in range(3):
            weight.read()
            torch.manual_seed(1)
            _stepped(model)
            torch.manual_seed(1)
            _stepped(without)
        for name, value in model.state_dict().items():
            assert torch.equal(value, without.state_dict()[name])


def test_attention_layers_and_convolutions_are_computed_too():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "attn": nn.MultiheadAttention(8, 2)})
    parametrizations.weight_norm(model["conv"])
    parametrizations.spectral_norm(model["attn"], "in_proj_weight")
    values = read_all(model.eval())
    assert torch.equal(values["conv.weight"], model["conv"].weight)
    assert torch.equal(values["attn.in_proj_weight"], model["attn"].in_proj_weight)


def test_a_hook_computes_only_its_own_weight():
    model = nn.LSTM(8, 4, bidirectional=True)
    names = {name for name, _ in model.named_parameters()}
    _old(lambda each: nn.utils.weight_norm(each, "weight_hh_l0"))(model)
    assert set(read_all(model)) == names
    weights, _ = by_name(model)
    assert weights["weight_hh_l0_reverse"].parameter is model.weight_hh_l0_reverse
    assert len(weights["weight_hh_l0"].parts) == 2
