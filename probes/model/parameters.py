"""The weights a model computes with: its parameters, or W_base + s·B·A in a LoRA layer of PEFT."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dynamics.errors import DynamicsError
from dynamics.runs import parameter_names
from probes.model.weights import Factors, Weight, find_weights

Selection = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None


@dataclass(frozen=True)
class Tracked:
    """One matrix of a model.

    Attributes:
        name: its parameter name, without the prefixes of wrappers.
        parameter: the parameter; in a LoRA layer, the base weight.
        weight: where it is read.
    """

    name: str
    parameter: nn.Parameter
    weight: Weight

    def effective_weight(self) -> torch.Tensor:
        """The weight that the model computes with, as merging would store it: (m, n).

        Without an adapter this is the parameter itself, which training will change.
        """
        return self.weight.read()

    def factors(self) -> Factors | None:
        """The factors of the active adapter, not copied; None where there is no adapter."""
        return self.weight.factors()


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
    weights = [each for each in find_weights(model)[0] if len(each.shape) == 2]
    tracked = []
    for each in weights:
        if each.parameter is not None and _selected(each.name, each.parameter, select):
            each.factors()  # raises for what cannot be recorded
            tracked.append(Tracked(each.name, each.parameter, each))
    if not tracked:
        known = [each.name for each in weights]
        raise DynamicsError(
            f"No two-dimensional parameter matches select={select!r}; "
            f"the model has {len(known)}: {', '.join(known[:4])}, ..."
        )
    return tracked


def _selected(name: str, parameter: nn.Parameter, select: Selection) -> bool:
    if select is None:
        return True
    return select(name, parameter) if callable(select) else parameter_names.matches(name, select)
