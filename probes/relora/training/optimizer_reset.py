"""Resetting the optimizer state of the adapters at a restart."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dynamics.errors import DynamicsError
from probes.optimizers.nesting import innermost_optimizer
from probes.relora.config import RESET_MODES


def reset_optimizer(
    optimizer: Any,
    parameters: Iterable[nn.Parameter],
    *,
    mode: str = "drop",
    ratio: float = 0.99,
    shared_mask: bool = True,
    generator: torch.Generator | None = None,
) -> int:
    """Reset the optimizer state of some parameters; all others keep theirs.

    - "drop" removes the state. Adam starts again at its step 1, with the bias correction that a
      start needs. The default.
    - "zero" sets the moments to zero and keeps the step count. The first update is then
      (1 - β1)/√(1 - β2) = 3.2 learning rates instead of one.
    - "random_prune" sets a random share `ratio` of the entries to zero.
    - "magnitude_prune" sets the share `ratio` of the entries with the smallest |m| to zero.

    Pruning empties the same entries of all moments. A momentum that stays where its variance was
    removed makes the next step there 1/√(1 - β2) times too large, or worse. It is doubtful what the
    kept moments are worth for a newly drawn A; only the full reset has a clear meaning.

    Source: Lialin et al. 2023, arXiv 2307.05695, section 3 (magnitude pruning of 99 %). Their code
    and Weiss et al. 2025 have all these modes, but draw a mask of its own for each moment.

    Args:
        optimizer: a torch optimizer, or a wrapper of one such as accelerate's.
        parameters: whose state to reset.
        mode: one of "drop", "zero", "random_prune", "magnitude_prune".
        ratio: share of the entries of each parameter that pruning empties, rounded up.
        shared_mask: False draws a mask of its own for each moment, as the published code does.
            Magnitude pruning then takes the smallest entries of each moment itself.
        generator: for the random mask, on the CPU; the generator of torch by default.

    Returns:
        The number of parameters that had a state.

    Raises:
        DynamicsError: an unknown mode, or a ratio outside [0, 1].

    Example:
        >>> from probes.relora import reset_optimizer
        >>> layer = torch.nn.Linear(4, 2)
        >>> adam = torch.optim.Adam(layer.parameters())
        >>> layer(torch.ones(3, 4)).sum().backward()
        >>> adam.step()
        >>> reset_optimizer(adam, [layer.weight]), list(adam.state[layer.weight])
        (1, [])
    """
    if mode not in RESET_MODES:
        raise DynamicsError(f"No optimizer reset {mode!r}; known: {', '.join(RESET_MODES)}.")
    if not 0 <= ratio <= 1:
        raise DynamicsError(f"ratio is {ratio!r}; it must be between 0 and 1.")
    optimizer = innermost_optimizer(optimizer)
    if mode == "drop":
        return sum(optimizer.state.pop(parameter, None) is not None for parameter in parameters)
    count = 0
    for parameter in parameters:
        moments = [
            value
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape
        ]
        count += bool(moments)
        if not moments:
            continue
        empty: torch.Tensor | None = None
        for moment in moments:  # Adam's first moment is the first of its state
            if empty is None or not shared_mask:
                empty = _entries_to_empty(moment, mode, ratio, generator)
            moment.masked_fill_(empty, 0)
    return count


def _entries_to_empty(
    moment: torch.Tensor, mode: str, ratio: float, generator: torch.Generator | None
) -> torch.Tensor:
    """A mask of the moment's shape, True where it becomes zero."""
    if mode == "zero":
        return torch.ones_like(moment, dtype=torch.bool)
    if mode == "random_prune":
        scores = torch.rand(moment.shape, generator=generator).to(moment.device)
    else:
        scores = moment.abs()
    lowest = scores.flatten().argsort()[: math.ceil(ratio * scores.numel())]
    empty = torch.zeros(moment.numel(), dtype=torch.bool, device=moment.device)
    return empty.index_fill(0, lowest, True).view_as(moment)
