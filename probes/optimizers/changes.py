"""Weights that something else than the watched optimizers has changed."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch


class UnseenStepWarning(UserWarning):
    """Weights change without a step of the optimizers that the recorder was given."""


class WeightVersions:
    """Notices writes into weights by the counters that autograd keeps, without reading numbers.

    Args:
        weights: name -> parameter.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        self._weights = weights
        self._versions = self._now()

    def note(self) -> None:
        """Compare with the weights as they are now from now on."""
        self._versions = self._now()

    def changed(self) -> list[str]:
        """Names of the weights that were written into since."""
        now = self._now()
        return [name for name, version in self._versions.items() if now[name] != version]

    def _now(self) -> dict[str, Any]:
        return {name: _version(parameter) for name, parameter in self._weights.items()}


def _version(parameter: torch.Tensor) -> Any:
    local = getattr(parameter, "_local_tensor", parameter)  # of a sharded one
    return None if local.is_inference() else (local._version, local.data_ptr())


def warn_of_changes(step: int, names: list[str]) -> None:
    """Say that the record at `step` does not hold these weights as training went on with them."""
    warnings.warn(
        f"Step {step}: something else than the optimizers that the recorder was given has changed "
        f"{_some(names)} after the step, so the record holds what was there before. Give the "
        "recorder the outermost optimizer; call recorder.event(...) where you change weights "
        "yourself, as in a merge. If they were put back (averaged weights for an evaluation), "
        "ignore this.",
        UnseenStepWarning,
        stacklevel=2,
    )


def warn_of_no_step(optimizer: Any, names: list[str]) -> None:
    """Say that weights changed while no step of the optimizer was seen, if there are any."""
    if not names:
        return
    warnings.warn(
        f"No step of {type(optimizer).__name__} was seen, and {_some(names)} changed: the "
        "recording has no record of this training. Give the recorder the optimizer whose step() "
        "changes them.",
        UnseenStepWarning,
        stacklevel=2,
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} weights ({shown})"
