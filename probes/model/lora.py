"""Adapters of PEFT: the weight that a layer computes with, and the factors of LoRA."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dynamics.errors import DynamicsError
from dynamics.runs import parameter_names
from probes.model.weight import Factors, NotRead, Source, Weight

Walk = Callable[[nn.Module, str], Iterator[Weight | NotRead]]


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether the module is a layer of PEFT that wraps another one."""
    if "peft" not in sys.modules:  # then the model cannot contain a layer of PEFT
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def weights_of_tuner_layer(layer: Any, path: str, walk: Walk) -> Iterator[Weight | NotRead]:
    """The weights of the wrapped layer, with what the adapter does to them, and the factors."""
    adapted = parameter_names.clean_name(f"{path}.weight")
    for each in walk(layer.base_layer, path):
        if isinstance(each, Weight) and each.name == adapted:
            source = LoraSource(each.name, layer, each.source)
            yield replace(each, source=source)
        else:
            yield each
    for child, module in layer.named_children():
        if child != "base_layer":
            for name, parameter in module.named_parameters():
                yield NotRead(
                    parameter_names.clean_name(f"{path}.{child}.{name}"),
                    tuple(parameter.shape),
                    parameter.numel(),
                    parameter.requires_grad,
                    "adapter factors",
                    recorded_elsewhere=True,
                )


@dataclass(frozen=True)
class LoraSource:
    """W_base + s·B·A of a LoRA layer."""

    name: str
    layer: Any
    inner: Source

    def read(self) -> torch.Tensor:
        """The base weight with the active adapter added, as merging would store it."""
        weight = self.inner.read()
        adapter = self._active_adapter()
        if adapter is None:
            return weight
        with torch.no_grad():
            return weight.clone().add_(self.layer.get_delta_weight(adapter))

    def base(self) -> torch.Tensor | None:
        """The base weight."""
        return self.inner.base()

    def factors(self) -> Factors | None:
        """The factors of the active adapter."""
        adapter = self._active_adapter()
        if adapter is None:
            return None
        layer = self.layer
        scaling = float(layer.scaling[adapter])
        if adapter in layer.lora_A:
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            return Factors(a.detach(), b.detach(), scaling, layer.fan_in_fan_out)
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return Factors(a.detach(), b.detach(), scaling, True)

    def _active_adapter(self) -> str | None:
        """The adapter that adds to the base weight now; None if it is merged or disabled."""
        layer = self.layer
        if layer.merged or layer.disable_adapters:
            return None
        known = (*layer.lora_A, *layer.lora_embedding_A)
        active = [adapter for adapter in layer.active_adapters if adapter in known]
        if len(active) > 1:
            raise DynamicsError(
                f"{self.name} has {len(active)} active adapters ({', '.join(active)}), and only "
                "one can be recorded: activate one with set_adapter()."
            )
        if active and layer.use_dora.get(active[0]):
            raise DynamicsError(
                f"{self.name} has a DoRA adapter, and only the W + s·B·A of LoRA can be recorded: "
                "leave it out with select=."
            )
        return active[0] if active else None
