"""The torch optimizer inside wrappers such as accelerate's or Lightning's."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def optimizer_layers(optimizer: Any) -> list[Any]:
    """An optimizer and everything inside it, from outside to inside.

    Wrappers (accelerate's, Lightning's) hold what they wrap as their attribute `optimizer`.
    """
    layers = [optimizer]
    while hasattr(layers[-1], "optimizer"):
        layers.append(layers[-1].optimizer)
    return layers


def innermost_optimizer(optimizer: Any) -> Any:
    """The optimizer inside all wrappers; the optimizer itself where there is none."""
    return optimizer_layers(optimizer)[-1]


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Every parameter that the optimizer steps, group after group."""
    for group in optimizer.param_groups:
        yield from group["params"]
