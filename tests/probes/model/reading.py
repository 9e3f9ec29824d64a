"""What the tests of weights share: reading them all, and seeing that nothing else happened."""

import contextlib
import copy

import torch
from torch import nn

from dynamics.runs.parameter_names import clean_name
from probes.model.weights import find_weights


def randomised(model):
    """The model with random parameters wherever they were zeros or ones, as after some training."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@contextlib.contextmanager
def untouched(model):
    """Fails if anything of the model, or the state of the random numbers, changes meanwhile."""
    before = _state(model)
    yield
    after = _state(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = (
            torch.equal(value, after[key])
            if isinstance(value, torch.Tensor)
            else value == after[key]
        )
        assert same, key


def _state(model):
    state = {"rng": torch.get_rng_state()}
    for name, module in _modules(model, ""):
        state[f"{name} flags"] = {
            key: str(value)
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | list | dict) and key[:1] != "_"
        }
        state[f"{name} hooks"] = [
            str(value) for key, value in vars(module).items() if "hooks" in key
        ]
        state[f"{name} class"] = type(module)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                about = (id(tensor), tensor.requires_grad, tensor._version, tensor.is_leaf)
                numbers = tensor.detach()
                if type(numbers).dequantize is not torch.Tensor.dequantize:
                    numbers = numbers.dequantize()
                state[f"{name}.{key}"] = numbers.clone()
                state[f"{name}.{key} about"] = (*about, tensor.grad is None)
    return state


def _modules(module, name):
    """As `named_modules`, which replaces parameters in an attention layer with LoRA."""
    yield name, module
    for child, each in module._modules.items():
        if each is not None:
            yield from _modules(each, f"{name}.{child}")


def read_all(model, tied=False):
    """Name -> the weight, after a look that nothing else happened and nothing was forgotten."""
    with untouched(model):
        weights, not_read = find_weights(model)
        values = {each.name: each.read().clone() for each in weights if each.readable}
        for each in weights:
            each.factors()
    for each in weights:
        if each.readable:
            value = values[each.name]
            assert (tuple(value.shape), value.dtype) == (each.shape, each.dtype), each.name
            assert not value.requires_grad
    names = [each.name for each in weights]
    assert len(names) == len(set(names))
    parts = [id(part) for each in weights for part in each.parts]
    parts += [id(each.parameter) for each in not_read if each.parameter is not None]
    assert tied or len(parts) == len(set(parts))
    return values


def by_name(model):
    """Name -> weight, and name -> reason of what is not read."""
    weights, not_read = find_weights(model)
    return {each.name: each for each in weights}, {each.name: each.reason for each in not_read}


def assert_as_merged(model):
    """Each parameter of the merged model is read, with the same bits, and nothing else is."""
    values = read_all(model)
    merged = copy.deepcopy(model).merge_and_unload()
    expected = {clean_name(name): each for name, each in merged.named_parameters()}
    assert set(values) == set(expected)
    for name, parameter in expected.items():
        assert values[name].dtype == parameter.dtype, name
        assert torch.equal(values[name], parameter), name
    return values


class Mixed(nn.Module):
    """One layer of each kind that LoRA adapts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.linear = nn.Linear(8, 12)
        self.conv1d = nn.Conv1d(4, 6, 3)
        self.conv2d = nn.Conv2d(4, 6, (3, 2))
        self.conv1x1 = nn.Conv2d(4, 6, 1)
        self.conv3d = nn.Conv3d(2, 4, 2)
        self.norm = nn.LayerNorm(8)
