"""Which recorded weights the given optimizers step, and which they do not."""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from dynamics.runs import parameter_names
from probes.model.parameters import Tracked
from probes.optimizers.nesting import optimizer_parameters


class NoOptimizerWarning(UserWarning):
    """Recorded weights train, but belong to no optimizer that the recorder was given."""


def watched_weights(
    model: nn.Module, tracked: Sequence[Tracked], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that decides about the record: recorded weights, and what trains."""
    stepped = _stepped(optimizers)
    watched = {each.name: part for each in tracked for part in each.weight.parts}
    known = {id(part) for part in watched.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in stepped and id(parameter) not in known:
            watched[parameter_names.clean_name(name)] = parameter
    return watched


def warn_of_no_optimizer(
    model: nn.Module, tracked: Sequence[Tracked], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Name recorded weights, and factors of theirs, that train without one of `optimizers`."""
    stepped = _stepped(optimizers)
    recorded = {id(part): each.name for each in tracked for part in each.weight.parts}
    names = [
        recorded.get(id(parameter), parameter_names.clean_name(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and id(parameter) not in stepped
        and (id(parameter) in recorded or "lora_" in name)
    ]
    if names:
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        warnings.warn(
            f"{len(names)} recorded weights require a gradient, but are in no optimizer that the "
            f"recorder was given: {shown}. If another optimizer steps them, a record may hold them "
            "as they were before its step: give all optimizers, in the order in which they step. "
            "If none does, freeze them or leave them out with select=.",
            NoOptimizerWarning,
            stacklevel=3,
        )


def _stepped(optimizers: Sequence[torch.optim.Optimizer]) -> set[int]:
    return {id(each) for optimizer in optimizers for each in optimizer_parameters(optimizer)}
