"""Rounding to the dtype that is stored, and what it loses at both ends of the range."""

import numpy as np
import torch

from dynamics.errors import DynamicsError
from dynamics.recordings import GRADIENT, WEIGHT, decoded

_STORABLE = ("float64", "float32", "float16", "bfloat16")
_GROWTH = 10  # a loss is told again once it has grown by this factor


class StorageWarning(UserWarning):
    """Rounding to the stored dtype lost numbers."""


class StorageOverflowWarning(StorageWarning):
    """Numbers of a record are beyond the range of the dtype that they are stored in."""


class StorageUnderflowWarning(StorageWarning):
    """Numbers of a record are too small for the dtype that they are stored in."""


class StorageRounding:
    """Rounds weights and gradients of more precision to one dtype.

    LoRA factors are never rounded: they are small, and the base weight is computed from them.

    Args:
        name: of the dtype; None keeps the dtype of each tensor.

    Raises:
        DynamicsError: an unknown name.
    """

    def __init__(self, name: str | None = None):
        if name is not None and (not isinstance(name, str) or name not in _STORABLE):
            raise DynamicsError(
                f"storage_dtype takes one of {', '.join(_STORABLE)}; found {name!r}."
            )
        self._dtype: torch.dtype | None = None if name is None else getattr(torch, name)
        self._told: dict[tuple[str, type[StorageWarning]], int] = {}

    def round(self, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is stored: itself, or rounded."""
        if self._dtype is None or not _is_rounded(path, tensor.dtype, self._dtype):
            return tensor
        return tensor.to(self._dtype)

    def losses(
        self, step: int, path: str, numbers: np.ndarray, stored: torch.Tensor
    ) -> list[StorageWarning]:
        """What to warn of: numbers that became Inf or zero.

        It is told at first, and again when ten times as many are lost.

        Args:
            step: of the record.
            path: of the array.
            numbers: before rounding.
            stored: the same tensor after it.
        """
        name = _name(stored.dtype)
        is_narrow = stored.dtype == torch.float16
        advice = "record with storage_dtype='bfloat16' or leave" if is_narrow else "leave"
        kept = as_numpy(stored)
        found: list[StorageWarning] = []
        category: type[StorageWarning]
        for lost, what, category in (
            (
                np.isinf(kept) & np.isfinite(numbers),
                f"beyond the range of {name} and stored as Inf",
                StorageOverflowWarning,
            ),
            (
                (kept == 0) & (numbers != 0),
                f"too small for {name} and stored as 0",
                StorageUnderflowWarning,
            ),
        ):
            count = int(np.count_nonzero(lost))
            if count > _GROWTH * self._told.get((path, category), 0):
                self._told[path, category] = count
                found.append(
                    category(
                        f"Step {step}: {count} numbers of {decoded(path)} are {what}; that is "
                        f"{100 * count / numbers.size:.3g} % of it; {advice} storage_dtype out."
                    )
                )
        return found


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same numbers in a dtype of Zarr; float32 holds bfloat16 and float8 exactly."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16):
        tensor = tensor.to(torch.float32)
    return tensor.numpy()


def _is_rounded(path: str, dtype: torch.dtype, stored_as: torch.dtype) -> bool:
    """Whether to round: only weights and gradients, and only to less precision than they have."""
    of_a_weight = path.startswith((f"{WEIGHT}/", f"{GRADIENT}/"))
    return (
        of_a_weight
        and dtype.is_floating_point
        and torch.finfo(dtype).eps < torch.finfo(stored_as).eps
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
