"""Weights that are computed from parameters before each forward pass.

`torch.nn.utils.parametrize` (weight norm, spectral norm, orthogonal ones, those of users), the
older hooks for weight norm and spectral norm, and the masks of `torch.nn.utils.prune`, also on top
of each other.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from probes.model.twin import WEIGHT_HOOKS, twin
from probes.model.weight import Factors, Weight


def computed_weights(module: nn.Module, path: str) -> Iterator[Weight]:
    """The weights that `module` computes from other parameters.

    `parameter` of such a weight is the original that it is computed from, if there is one of the
    same shape; its gradient is that of the original. Weight norm has two originals.

    Args:
        module: any module; only its own weights are looked at, not those of its children.
        path: its name, with a dot at the end unless it is the model itself.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    originals: dict[str, list[nn.Parameter]] = {}
    for name, computation in _parametrisations(module).items():
        parts[name] = list(computation.parameters())
        originals[name] = [each for each in computation._parameters.values() if each is not None]
    for name in _hooked(module):
        originals[name] = parts[name] = [
            parameter
            for each, parameter in module._parameters.items()
            if _is_part(each, name) and parameter is not None
        ]
    for name in parts:
        source = ComputedSource(module, name)
        weight = source.read()
        one = originals[name] if len(originals[name]) == 1 else []
        yield Weight(
            path + name,
            one[0] if one and one[0].shape == weight.shape else None,
            tuple(weight.shape),
            weight.dtype,
            module,
            source,
            tuple(parts[name]),
        )


@dataclass(frozen=True)
class ComputedSource:
    """A weight as an evaluation would compute it now, on a copy of what it is computed from.

    In evaluation mode spectral norm takes no step of its power iteration, and parametrisations
    with noise have none. Random numbers that they draw nevertheless are put back.
    """

    module: nn.Module
    name: str

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """The weight."""
        devices = {each.device for each in self.module.parameters() if each.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            parametrisations = _parametrisations(self.module)
            if self.name in parametrisations:
                weight = twin(parametrisations[self.name])()
            else:
                copied = twin(self.module)
                for hook in copied._forward_pre_hooks.values():
                    hook(copied, ())
                weight = getattr(copied, self.name)
            return cast(torch.Tensor, weight.detach())

    def base(self) -> torch.Tensor:
        """The weight: no adapter adds to it."""
        return self.read()

    def factors(self) -> Factors | None:
        """None: no adapter adds to it."""
        return None


def is_computed(module: nn.Module) -> bool:
    """Whether the module computes a weight of its own from other parameters."""
    return parametrize.is_parametrized(module) or any(_hooked(module))


def _parametrisations(module: nn.Module) -> Mapping[str, nn.Module]:
    if not parametrize.is_parametrized(module):
        return {}
    return cast(Mapping[str, nn.Module], module.parametrizations)


def _hooked(module: nn.Module) -> Iterator[str]:
    """Names of the tensors that hooks of torch compute, and that are no part of another one."""
    names = set()
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WEIGHT_HOOKS):
            names.add(str(getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)))
    for name in sorted(names):
        # pruning the v of weight norm makes `weight_v` of `weight_v_orig`
        if not any(_is_part(name, other) for other in names):
            yield name


def _is_part(name: str, whole: str) -> bool:
    """Whether a hook of torch named a parameter so because it computes `whole` from it."""
    return re.fullmatch(rf"{re.escape(whole)}(_g|_v|_orig)+", name) is not None
