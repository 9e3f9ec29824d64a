"""One record on its way from the training thread to the store."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from dynamics.errors import DynamicsError
from dynamics.recordings import GRADIENT, WEIGHT, RecordingWriter

_STORABLE = ("float64", "float32", "float16", "bfloat16")


class StorageOverflowWarning(UserWarning):
    """Numbers of a record are beyond the range of the dtype that they are stored in."""


def dtype_to_store(name: str | None) -> torch.dtype | None:
    """The dtype that weights and gradients are rounded to for storage; None keeps their own.

    Raises:
        DynamicsError: an unknown name.
    """
    if name is None:
        return None
    if name not in _STORABLE:
        raise DynamicsError(f"storage_dtype takes one of {', '.join(_STORABLE)}; found {name!r}.")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


class Record:
    """The tensors of one record, copied to the CPU, until they are written.

    Attributes:
        step: optimizer steps done.
        logged: name -> value of its scalars.
        copied: events of a GPU; when they have happened, the copies are complete.
        defects: array path -> one line that says what is wrong with it.
    """

    def __init__(self, step: int, logged: dict[str, Any]):
        self.step = step
        self.logged = logged
        self.copied: list[torch.cuda.Event] = []
        self.defects: dict[str, str] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._attrs: dict[str, dict[str, Any]] = {}

    def add(self, path: str, tensor: torch.Tensor, extra: Mapping[str, Any] | None = None) -> None:
        """Add the tensor of one array; `extra` are further attributes of that array."""
        self._tensors[path] = tensor
        self._attrs[path] = dict(extra or {})

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The copies."""
        return list(self._tensors.values())

    def write(
        self, recording: RecordingWriter, stored_as: torch.dtype | None = None
    ) -> dict[str, np.ndarray]:
        """Append this record to the recording; the writer's thread calls it.

        Args:
            recording: where to.
            stored_as: round weights and gradients of more precision to this dtype. LoRA factors
                are never rounded: they are small, and the base weight is computed from them.

        Returns:
            Array path -> its numbers before rounding.
        """
        for event in self.copied:
            event.synchronize()
        matrices, stored = {}, {}
        for path, tensor in self._tensors.items():
            matrices[path] = stored[path] = _as_numpy(tensor)
            dtype = tensor.dtype
            if stored_as is not None and _is_rounded(path, dtype, stored_as):
                stored[path] = _as_numpy(tensor.to(dtype := stored_as))
                self._warn_of_overflow(path, matrices[path], stored[path], dtype)
            self._attrs[path]["source_dtype"] = str(dtype).removeprefix("torch.")
        scalars = {name: float(value) for name, value in self.logged.items()}
        tokens = scalars.pop("tokens", None)
        recording.append(
            self.step,
            stored,
            attrs=self._attrs,
            scalars=scalars,
            tokens=None if tokens is None else int(tokens),
        )
        return matrices

    def _warn_of_overflow(
        self, path: str, numbers: np.ndarray, stored: np.ndarray, dtype: torch.dtype
    ) -> None:
        lost = int(np.count_nonzero(np.isinf(stored) & np.isfinite(numbers)))
        if lost:
            warnings.warn(
                f"Step {self.step}: {lost} numbers of {path} are beyond the range of "
                f"{str(dtype).removeprefix('torch.')} and stored as Inf; record with "
                "storage_dtype='bfloat16'.",
                StorageOverflowWarning,
                stacklevel=2,
            )


def _is_rounded(path: str, dtype: torch.dtype, stored_as: torch.dtype) -> bool:
    """Whether to round: only weights and gradients, and only to less precision than they have."""
    of_a_weight = path.startswith((f"{WEIGHT}/", f"{GRADIENT}/"))
    return of_a_weight and torch.finfo(dtype).eps < torch.finfo(stored_as).eps


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same numbers in a dtype of Zarr; float32 holds bfloat16 and float8 exactly."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16):
        tensor = tensor.to(torch.float32)
    return tensor.numpy()
