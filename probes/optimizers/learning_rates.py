"""The learning rates of a step, also of optimizers that make their own."""

import math
from collections.abc import Sequence
from typing import Any

import torch

LEARNING_RATE = "learning_rate"


def learning_rates(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Scalar name -> learning rate, as a number or a tensor; without those that cannot be told.

    `learning_rate` is that of the first parameter group of the first optimizer. Where groups
    differ, `learning_rate/NAME` are those of all groups: NAME is the `name` of the group, or its
    number, counted over all optimizers.

    An optimizer that makes its own rate is asked for it: Adafactor of transformers (for the first
    parameter of the group), Adafactor of torch (the relative step, which it multiplies by the size
    of each parameter), schedule-free ones (with their warmup).

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias]}]
        >>> learning_rates([torch.optim.SGD(groups, lr=0.2)])
        {'learning_rate': 0.1, 'learning_rate/0': 0.1, 'learning_rate/1': 0.2}
    """
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    rates = [_rate(optimizer, group) for optimizer, group in groups]
    found = {LEARNING_RATE: rates[0]}
    if _differ([(group.get("lr"), group.get("initial_lr")) for _, group in groups]) or _differ(
        rates
    ):
        names = [str(group.get("name", number)) for number, (_, group) in enumerate(groups)]
        if len(set(names)) < len(names):
            names = [str(number) for number in range(len(names))]
        found |= {f"{LEARNING_RATE}/{n}": rate for n, rate in zip(names, rates, strict=True)}
    return {name: rate for name, rate in found.items() if rate is not None}


def _differ(values: Sequence[Any]) -> bool:
    return any(each is not values[0] and each != values[0] for each in values)


def _rate(optimizer: Any, group: dict[str, Any]) -> Any:
    rate = group.get("scheduled_lr")  # schedule-free
    if rate is None:
        rate = group.get("lr")
    state = optimizer.state.get(group["params"][0], {}) if group["params"] else {}
    if isinstance(optimizer, torch.optim.Adafactor):
        step = float(state.get("step", 1))
        return min(float(group["lr"]), 1 / math.sqrt(max(step, 1.0)))
    if group.get("relative_step") and hasattr(optimizer, "_get_lr"):  # transformers
        return float(optimizer._get_lr(group, state)) if state.get("step") else None
    return rate if isinstance(rate, int | float | torch.Tensor) else None
