"""Optimizers inside of what the user gives: wrappers, dicts and lists of them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


def given_optimizers(optimizer: Any) -> tuple[Any, ...]:
    """What `Recorder(optimizer=...)` was given, as a tuple: one, a list, or the values of a dict.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> each = {p: torch.optim.SGD([p]) for p in model.parameters()}
        >>> len(given_optimizers(each)), len(given_optimizers(each[model.bias]))
        (2, 1)
    """
    if isinstance(optimizer, Mapping):
        return tuple(optimizer.values())
    if isinstance(optimizer, Iterable) and not hasattr(optimizer, "step"):
        return tuple(optimizer)
    return (optimizer,)


def optimizer_layers(optimizer: Any) -> list[Any]:
    """An optimizer and all optimizers inside of it, from outside to inside.

    A wrapper holds what it wraps in an attribute of any name: accelerate's and Lightning's in
    `optimizer`, SAM in `base_optimizer`, those that step in the backward pass in a dict.
    """
    layers, seen = [optimizer], {id(optimizer)}
    for layer in layers:  # grows
        for each in _held(layer):
            if id(each) not in seen:
                seen.add(id(each))
                layers.append(each)
    return layers


def innermost_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers that change weights: those that hold no other; itself where there is none."""
    layers = optimizer_layers(optimizer)
    return [layer for layer in layers if not any(_held(layer))] or layers[-1:]


def innermost_optimizer(optimizer: Any) -> Any:
    """The first optimizer inside all wrappers; the optimizer itself where there is none."""
    return innermost_optimizers(optimizer)[0]


def optimizers_of(model: nn.Module, given: Iterable[Any]) -> list[torch.optim.Optimizer]:
    """The optimizers inside of what was given that change parameters of the model, in order."""
    own = {id(parameter) for parameter in model.parameters()}
    return [
        each
        for outer in given
        for each in innermost_optimizers(outer)
        if any(id(parameter) in own for parameter in optimizer_parameters(each))
    ]


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Every parameter that the optimizer steps, group after group."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _held(optimizer: Any) -> Iterator[Any]:
    attributes = dict(getattr(optimizer, "__dict__", {}))
    if hasattr(type(optimizer), "optimizer"):  # a property
        attributes["optimizer"] = getattr(optimizer, "optimizer", None)
    for name, value in attributes.items():
        if _is_optimizer(value):
            yield value
        elif name != "state" and isinstance(value, list | tuple):
            yield from filter(_is_optimizer, value)
        elif name != "state" and isinstance(value, Mapping):
            yield from filter(_is_optimizer, value.values())


def _is_optimizer(value: Any) -> bool:
    if isinstance(value, torch.optim.Optimizer):
        return True
    if isinstance(value, nn.Module) or not callable(getattr(value, "step", None)):
        return False
    # A scheduler steps, too, but has neither.
    return hasattr(value, "param_groups") or callable(getattr(value, "zero_grad", None))
