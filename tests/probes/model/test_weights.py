"""Which weights a model has: one for each parameter, under the names of the unwrapped model."""

import warnings

import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import dynamics as dy
from probes import Recorder
from probes.model.weights import find_weights
from tests.probes.model.reading import by_name, randomised, read_all, untouched


def _layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 2, 3))


def test_each_parameter_is_a_weight_in_the_order_of_the_model():
    model = _layers()
    weights, not_read = find_weights(model)
    assert not_read == []
    assert [each.name for each in weights] == [name for name, _ in model.named_parameters()]
    for weight, parameter in zip(weights, model.parameters(), strict=True):
        assert weight.parameter is parameter
        assert weight.parts == (parameter,)
        assert weight.shape == tuple(parameter.shape)
        assert weight.numbers == parameter.numel()
        assert weight.read().data_ptr() == weight.base().data_ptr() == parameter.data_ptr()
        assert weight.factors() is None
    assert weights[0].module is model[0]


def test_a_weight_trains_as_long_as_its_parameter_does():
    model = _layers()
    weight = by_name(model)[0]["1.weight"]
    assert weight.trains
    model.requires_grad_(False)
    assert not weight.trains


def test_modules_and_parameters_that_are_shared_count_once():
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    other.weight = layer.weight
    assert set(read_all(nn.ModuleDict({"a": layer, "again": layer, "tied": other}))) == {
        "a.weight",
        "a.bias",
    }


WRAPPERS = {
    "compiled": torch.compile,
    "checkpointed": checkpoint_wrapper,
    "data_parallel": nn.DataParallel,
    "lora": lambda model: peft.get_peft_model(model, peft.LoraConfig(target_modules=["1"])),
    "lora_below_compile": lambda model: torch.compile(WRAPPERS["lora"](model)),
    "native_peft": lambda model: peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["1"]), model
    ),
}


@pytest.mark.parametrize(
    "wrapper",
    [
        pytest.param(each, marks=pytest.mark.slow) if "compile" in each else each
        for each in WRAPPERS
    ],
)
def test_names_are_those_of_the_unwrapped_model(wrapper):
    expected = set(read_all(_layers()))
    assert set(read_all(WRAPPERS[wrapper](_layers()))) == expected


def test_a_replicated_layer_has_a_weight_of_its_own_above_the_shared_base():
    """`layer_replication` of PEFT, and other adapters on layers that share their weight."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    adapted = randomised(peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"])))
    values = read_all(adapted, tied=True)
    for name in "01":
        layer = adapted.base_model.model.get_submodule(name)
        expected = layer.base_layer.weight + layer.get_delta_weight("default")
        assert torch.equal(values[f"{name}.weight"], expected)
    assert not torch.equal(values["0.weight"], values["1.weight"])
    weights, _ = by_name(adapted)
    assert [weights[f"{name}.weight"].parameter is None for name in "01"] == [False, True]


class OwnLora(nn.Linear):
    """LoRA as other libraries write it."""

    def __init__(self):
        super().__init__(4, 4)
        self.lora_a, self.lora_b = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x):
        return super().forward(x) + self.lora_b(self.lora_a(x))


def test_the_weight_of_an_unknown_kind_of_lora_is_left_out_by_name():
    model = nn.Sequential(OwnLora(), nn.Linear(4, 4))
    names = {"0.bias", "0.lora_a.weight", "0.lora_b.weight", "1.weight", "1.bias"}
    assert set(read_all(model)) == names
    assert by_name(model)[1] == {"0.weight": "weights under adapters that are not PEFT's (OwnLora)"}


def test_finding_and_reading_in_a_training_model_changes_nothing():
    model = WRAPPERS["lora"](_layers()).train()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient) if parameter.requires_grad else None
    with untouched(model):
        for weight in find_weights(model)[0]:
            weight.read()


@pytest.mark.parametrize("change", ["added", "removed", "none"])
def test_a_recorder_says_once_that_adapters_came_or_went(tmp_path, change):
    model = nn.Sequential(nn.Linear(4, 4))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    if change == "added":
        adapted.unload()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
            if change == "added":
                peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model)
            elif change == "removed":
                adapted.unload()
            for _ in range(2):
                model(torch.ones(3, 4)).sum().backward()
                optimizer.step()
    said = [each for each in caught if "came or went" in str(each.message)]
    assert len(said) == (change != "none")


@pytest.mark.slow
def test_weights_are_found_the_same_inside_of_autocast(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recorder = Recorder(model, optimizer, tmp_path / "run.zarr", every=1)
        recorder.attach()
        recorder.close()
    read = dy.open_run(tmp_path / "run.zarr").read("0.weight", 0, "weight")
    assert read.dtype == "float32"
    assert (read.values == model[0].weight.detach().numpy()).all()
