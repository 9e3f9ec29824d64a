import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dynamics.auditing.report import Severity, Verdict
from probes import Recorder
from probes.checks import (
    FailedCheckWarning,
    merge_facts,
    optimizer_state_facts,
    warn_about,
    weights_before_merge,
)


def adapted(**options):
    torch.manual_seed(0)
    layers = nn.ModuleDict({"first": nn.Linear(6, 8), "second": nn.Linear(8, 5)})
    model = get_peft_model(layers, LoraConfig(target_modules=["first", "second"], r=2, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def merged(model, change):
    """Facts of a merge in which `change(layer, update)` treats the second layer."""
    before = weights_before_merge(model)
    layers = [model.base_model.model[name] for name in ("first", "second")]
    with torch.no_grad():
        for layer in layers:
            update = layer.get_delta_weight("default")
            base, b = layer.get_base_layer().weight, layer.lora_B["default"].weight
            if layer is layers[1]:
                change(base, b, update)
            else:
                base += update
                b.zero_()
    return merge_facts(before)


def faithful(base, b, update):
    base += update
    b.zero_()


def unscaled(base, b, update):
    base += update / 4
    b.zero_()


def kept(base, b, update):
    base += update


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_faithful_merge_changes_nothing(fan_in_fan_out):
    model = adapted(lora_alpha=8)
    if fan_in_fan_out:  # as a GPT-2 layer stores it
        for name in ("first", "second"):
            layer = model.base_model.model[name]
            layer.fan_in_fan_out = True
            layer.get_base_layer().weight = nn.Parameter(
                layer.get_base_layer().weight.detach().T.contiguous()
            )
    facts = merged(model, faithful)
    assert facts["relative_change"] == 0
    assert facts["scale"] == pytest.approx(1, abs=1e-6)
    assert 0 < facts["tolerance"] < 1e-5
    assert json.loads(json.dumps(facts)) == facts


def test_the_layer_that_changed_is_named_with_its_scale():
    facts = merged(adapted(lora_alpha=8), unscaled)
    assert facts["worst_layer"] == "second.weight"
    assert facts["worst_scaling"] == 4
    assert facts["scale"] == pytest.approx(1 / 4, rel=1e-5)
    assert facts["relative_change"] == pytest.approx(3 / 4, rel=1e-5)


def test_an_adapter_that_goes_on_after_its_merge_counts_twice():
    facts = merged(adapted(), kept)
    assert facts["scale"] == pytest.approx(1, abs=1e-6)
    assert facts["relative_change"] == pytest.approx(1, rel=1e-5)


def test_a_zero_adapter_has_nothing_to_change():
    model = adapted()
    with torch.no_grad():
        for name in ("first", "second"):
            model.base_model.model[name].lora_B["default"].weight.zero_()
    assert merged(model, faithful)["relative_change"] == 0


def test_a_model_without_adapters_has_no_facts():
    assert merge_facts(weights_before_merge(nn.Linear(3, 3))) == {}


def trained_adam():
    parameters = {name: nn.Parameter(torch.ones(10, 10)) for name in ("one", "other")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    for _ in range(3):
        for each in parameters.values():
            each.grad = torch.randn(10, 10)
        optimizer.step()
    return optimizer, parameters


def test_a_full_state_and_an_empty_one():
    optimizer, parameters = trained_adam()
    facts = optimizer_state_facts(optimizer, parameters)
    assert facts["zero_exp_avg"] == facts["zero_exp_avg_sq"] == 0
    assert (facts["largest_step"], facts["parameters_with_state"]) == (3, 2)
    optimizer.state.clear()
    facts = optimizer_state_facts(optimizer, parameters)
    assert facts["zero_exp_avg"] == facts["zero_exp_avg_sq"] == 1
    assert (facts["largest_step"], facts["parameters_with_state"]) == (0, 0)
    assert facts["momentum_without_variance"] == 0


def test_momentum_without_variance_is_counted_and_its_parameter_named():
    optimizer, parameters = trained_adam()
    state = optimizer.state[parameters["other"]]
    state["exp_avg_sq"][:5] = 0
    state["exp_avg"][:2] = 0
    facts = optimizer_state_facts(optimizer, parameters)
    assert facts["zero_exp_avg"] == 20 / 200
    assert facts["zero_exp_avg_sq"] == 50 / 200
    assert facts["momentum_without_variance"] == 30 / 200
    assert facts["worst_parameter"] == "other"
    assert json.loads(json.dumps(facts)) == facts


def test_a_variance_that_underflowed_is_no_defect():
    optimizer, parameters = trained_adam()
    state = optimizer.state[parameters["one"]]
    state["exp_avg"].fill_(1e-25)  # its square is below float32
    state["exp_avg_sq"].zero_()
    assert optimizer_state_facts(optimizer, parameters)["momentum_without_variance"] == 0


def test_a_momentum_over_no_variance_does_blow_up_the_next_step():
    """The consequence that the check's sentence claims."""
    optimizer, parameters = trained_adam()
    optimizer.state[parameters["one"]]["exp_avg_sq"].zero_()
    before = {name: each.detach().clone() for name, each in parameters.items()}
    for each in parameters.values():
        each.grad = torch.full_like(each, 1e-3)
    optimizer.step()
    steps = {name: (each - before[name]).abs().max() for name, each in parameters.items()}
    assert steps["one"] > 10 * steps["other"]


def test_what_failed_is_warned_about_and_nothing_else():
    options = {"meaning": "It broke.", "step": 6, "threshold": 0.0}
    bad = Verdict(check="moments", severity=Severity.FAIL, measured=0.5, **options)
    good = Verdict(check="moments", severity=Severity.PASS, measured=0.0, **options)
    with pytest.warns(FailedCheckWarning) as warned:
        warn_about([good, bad])
    assert [str(each.message) for each in warned] == [
        "Step 6, moments: It broke. Measured 0.5; at most 0 is sound."
    ]


def recorded_warnings(model, path, change):
    """Messages of the warnings while a recorder writes steps 0 and 1; `change` comes between."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with Recorder(model, optimizer, path, every=1):
            with torch.no_grad():
                change(model)
            optimizer.step()
    return [str(each.message) for each in warned if each.category is FailedCheckWarning]


def test_a_recorder_warns_of_nan_in_the_record_that_has_it(tmp_path):
    def break_one(model):
        model.get_submodule("base_model.model.second").base_layer.weight[0, 0] = torch.nan

    assert recorded_warnings(adapted(), tmp_path / "run.zarr", break_one) == [
        "Step 1: weight/second.weight holds NaN or Inf."
    ]


def test_a_recorder_warns_once_of_an_adapter_that_is_zero_on_both_sides(tmp_path):
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "first.lora_" in name:
                parameter.zero_()
    assert recorded_warnings(model, tmp_path / "run.zarr", lambda _: None) == [
        "Step 0: A and B of first.weight are both zero: no gradient reaches either."
    ]


def test_a_recorder_is_silent_about_a_sound_run_and_a_fresh_adapter(tmp_path):
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert recorded_warnings(model, tmp_path / "run.zarr", lambda _: None) == []
