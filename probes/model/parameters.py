"""What a model computes with: its parameters, and W_base + s·B·A where PEFT put a LoRA layer."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from dynamics.errors import DynamicsError
from dynamics.runs import parameter_names

Selection = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None


class Factors(NamedTuple):
    """A LoRA layer's factors: its adapter is scaling · B @ A, transposed for (in, out) weights."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Tracked:
    """One matrix of a model, under its clean name; `lora_layer` is PEFT's where it has one."""

    name: str
    parameter: nn.Parameter
    lora_layer: Any = None

    def effective_weight(self) -> torch.Tensor:
        """The weight that the model computes with, as merging would store it.

        The parameter itself where there is no adapter: training goes on to change it.
        """
        weight = self.parameter.detach()
        adapter = _active_adapter(self.name, self.lora_layer)
        if adapter is None:
            return weight
        with torch.no_grad():
            return weight.clone().add_(self.lora_layer.get_delta_weight(adapter))

    def factors(self) -> Factors | None:
        """The active adapter's factors as they train, None where there is no adapter."""
        adapter = _active_adapter(self.name, self.lora_layer)
        if adapter is None:
            return None
        layer = self.lora_layer
        scaling = float(layer.scaling[adapter])
        if adapter in layer.lora_A:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            return Factors(a.detach(), b.detach(), scaling, layer.fan_in_fan_out)
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return Factors(a.detach(), b.detach(), scaling, True)


def tracked_parameters(model: nn.Module, select: Selection = None) -> list[Tracked]:
    """The two-dimensional parameters that `select` chooses, LoRA factors not among them.

    Args:
        model: any module; its wrappers' prefixes are stripped from the names.
        select: globs over clean names ("*_proj" matches with or without ".weight"), or a
            predicate of (clean name, parameter); all by default.

    Raises:
        DynamicsError: nothing is selected, or an adapter that is no plain LoRA is.
    """
    lora = {id(layer.get_base_layer().weight): layer for layer in _lora_layers(model)}
    factors = {
        id(parameter)
        for layer in lora.values()
        for parameter in layer.parameters()
        if id(parameter) not in lora
    }
    found = []
    for raw_name, parameter in model.named_parameters():
        name = parameter_names.clean_name(raw_name)
        if (
            parameter.ndim != 2
            or id(parameter) in factors
            or not _selected(name, parameter, select)
        ):
            continue
        found.append(Tracked(name, parameter, lora.get(id(parameter))))
        _active_adapter(name, found[-1].lora_layer)  # refuses what cannot be recorded
    if not found:
        known = [
            parameter_names.clean_name(name)
            for name, each in model.named_parameters()
            if each.ndim == 2
        ]
        raise DynamicsError(
            f"No two-dimensional parameter matches select={select!r}; "
            f"the model has {len(known)}: {', '.join(known[:4])}, ..."
        )
    return found


def _selected(name: str, parameter: nn.Parameter, select: Selection) -> bool:
    if select is None:
        return True
    return select(name, parameter) if callable(select) else parameter_names.matches(name, select)


def _lora_layers(model: nn.Module) -> Iterator[Any]:
    if "peft" not in sys.modules:  # then no module of it can be in the model
        return
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            yield module


def _active_adapter(name: str, layer: Any) -> str | None:
    """The adapter whose product adds to the base weight now; None if merged, disabled or none."""
    if layer is None or layer.merged or layer.disable_adapters:
        return None
    known = (*layer.lora_A, *layer.lora_embedding_A)
    active = [adapter for adapter in layer.active_adapters if adapter in known]
    if len(active) > 1:
        raise DynamicsError(
            f"{name} has {len(active)} active adapters ({', '.join(active)}); record one."
        )
    if active and layer.use_dora.get(active[0]):
        raise DynamicsError(f"{name} has a DoRA adapter; only LoRA's W + s·B·A can be recorded.")
    return active[0] if active else None
