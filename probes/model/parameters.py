"""The weights a model computes with: its parameters, or W_base + s·B·A in a LoRA layer of PEFT."""

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
    """Factors of a LoRA layer: its adapter is scaling · B @ A, transposed for (in, out) weights."""

    a: torch.Tensor  # (r, in)
    b: torch.Tensor  # (out, r)
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Tracked:
    """One matrix of a model.

    Attributes:
        name: its parameter name, without the prefixes of wrappers.
        parameter: the parameter; in a LoRA layer, the base weight.
        lora_layer: the LoRA layer of PEFT that the parameter belongs to, or None.
    """

    name: str
    parameter: nn.Parameter
    lora_layer: Any = None

    def effective_weight(self) -> torch.Tensor:
        """The weight that the model computes with, as merging would store it: (m, n).

        Without an adapter this is the parameter itself, which training will change.
        """
        weight = self.parameter.detach()
        adapter = _active_adapter(self.name, self.lora_layer)
        if adapter is None:
            return weight
        with torch.no_grad():
            return weight.clone().add_(self.lora_layer.get_delta_weight(adapter))

    def factors(self) -> Factors | None:
        """The factors of the active adapter, not copied; None where there is no adapter."""
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
    """The two-dimensional parameters that `select` chooses, without LoRA factors.

    Args:
        model: any module. Prefixes of wrappers are removed from the names.
        select: globs over clean names ("*_proj" matches with or without ".weight"), or a
            predicate of (clean name, parameter); all by default.

    Raises:
        DynamicsError: nothing is selected, or a selected weight has an adapter that is not plain
            LoRA.
    """
    lora = {id(layer.get_base_layer().weight): layer for layer in _lora_layers(model)}
    factors = {
        id(parameter)
        for layer in lora.values()
        for parameter in layer.parameters()
        if id(parameter) not in lora
    }
    tracked = []
    for raw_name, parameter in model.named_parameters():
        name = parameter_names.clean_name(raw_name)
        if (
            parameter.ndim != 2
            or id(parameter) in factors
            or not _selected(name, parameter, select)
        ):
            continue
        tracked.append(Tracked(name, parameter, lora.get(id(parameter))))
        _active_adapter(name, tracked[-1].lora_layer)  # raises for what cannot be recorded
    if not tracked:
        known = [
            parameter_names.clean_name(name)
            for name, each in model.named_parameters()
            if each.ndim == 2
        ]
        raise DynamicsError(
            f"No two-dimensional parameter matches select={select!r}; "
            f"the model has {len(known)}: {', '.join(known[:4])}, ..."
        )
    return tracked


def _selected(name: str, parameter: nn.Parameter, select: Selection) -> bool:
    if select is None:
        return True
    return select(name, parameter) if callable(select) else parameter_names.matches(name, select)


def _lora_layers(model: nn.Module) -> Iterator[Any]:
    if "peft" not in sys.modules:  # then the model cannot contain a layer of PEFT
        return
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            yield module


def _active_adapter(name: str, layer: Any) -> str | None:
    """The adapter whose product adds to the base weight now; None if it is merged or disabled."""
    if layer is None or layer.merged or layer.disable_adapters:
        return None
    known = (*layer.lora_A, *layer.lora_embedding_A)
    active = [adapter for adapter in layer.active_adapters if adapter in known]
    if len(active) > 1:
        raise DynamicsError(
            f"{name} has {len(active)} active adapters ({', '.join(active)}), and only "
            "one can be recorded: activate one with set_adapter()."
        )
    if active and layer.use_dora.get(active[0]):
        raise DynamicsError(
            f"{name} has a DoRA adapter, and only the W + s·B·A of LoRA can be recorded: leave it "
            "out with select=."
        )
    return active[0] if active else None
