"""Copies of modules that may be changed, so that nothing happens to the modules themselves.

Some weights can only be told by doing what changes a module: merging an adapter, running a
parametrisation. `twin` gives a copy for it. `copy.deepcopy` does not do: it copies hooks, with
whatever they are bound to, and fails for sharded modules and for tensors that are no leaves.
"""

import copy
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# Hooks that compute a weight before a forward pass; they hold no state of the module's.
WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


def twin(module: nn.Module) -> Any:
    """A copy in evaluation mode, with tensors, containers and flags of its own.

    Sharded tensors are gathered: every process that holds a part must call this.
    It has no hooks but those that compute a weight. Parameters do not require a gradient.
    Parameters of classes of their own (packed ones) are empty in the copy: see `plain`.

    Args:
        module: any module, also one that is sharded or parametrised.
    """
    return _twin(module, {})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All values of a tensor, gathered if it is sharded; every process must call this then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    """Give a twin a plain parameter, instead of a parametrised, computed or packed one."""
    if parametrize.is_parametrized(module):
        names = list(cast(nn.ModuleDict, module.parametrizations))
        computed = {each: getattr(module, each) for each in names}
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
        module._parameters.update({each: nn.Parameter(computed[each]) for each in computed})
    module._forward_pre_hooks.clear()
    module.__dict__.pop(name, None)
    module._buffers.pop(name, None)
    module._parameters[name] = nn.Parameter(weight, requires_grad=False)


def _twin(module: nn.Module, done: dict[int, Any]) -> Any:
    if id(module) in done:
        return done[id(module)]
    copied = done[id(module)] = object.__new__(type(module))
    for key, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            value = _copy(value, done)
        elif "_hooks" in key and isinstance(value, OrderedDict):
            value = OrderedDict()
        elif isinstance(value, dict | list | set):
            value = copy.copy(value)
        vars(copied)[key] = value
    state = vars(copied)
    for key in ("forward", "_hf_hook", "_compiled_call_impl"):  # of the original module
        state.pop(key, None)
    state["_compiled_call_impl"] = None
    state["training"] = False
    for number, hook in module._forward_pre_hooks.items():
        if isinstance(hook, WEIGHT_HOOKS):
            state["_forward_pre_hooks"][number] = hook
    if hasattr(module, "merged_adapters"):  # an attribute of the class in some tuners of PEFT
        state["merged_adapters"] = list(module.merged_adapters)  # type: ignore[arg-type]
    for kind in ("_parameters", "_buffers"):
        state[kind] = {
            name: None if tensor is None else _copy(tensor, done)
            for name, tensor in state[kind].items()
        }
    state["_modules"] = {
        name: None if child is None else _twin(child, done)
        for name, child in state["_modules"].items()
    }
    return copied


def _copy(tensor: torch.Tensor, done: dict[int, Any]) -> torch.Tensor:
    if id(tensor) not in done:
        if type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer, DTensor):
            copied = whole(tensor.detach()).clone()
        else:
            copied = torch.empty(0)
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=False)
        done[id(tensor)] = copied
    return done[id(tensor)]
