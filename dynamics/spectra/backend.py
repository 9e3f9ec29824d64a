"""Backends: what computes the singular values and the rounding noise of stored numbers.

`NumpyBackend` computes on the CPU, `gpu_backend.GpuBackend` on a GPU what that is faster at.

A stored array is part of several matrices: a checkpoint's weight is measured itself, and it is a
term of two updates and of its displacement. Whether it is finite, its hash, its rounding noise and
its copy on a GPU are the same each time. A backend computes them once per array.
"""

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from dynamics.runs.code_errors import CodeErrors
from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense
from dynamics.spectra import numpy_spectrum, rounding

Result = TypeVar("Result")


class Backend(ABC):
    """Computes with arrays that nobody changes; keeps what it computed as long as they live.

    Attributes:
        version: what decides the last digits besides NumPy and SciPy, see
            `gpu_backend.backend_version`.
    """

    version = ""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], tuple[Any, Any]] = {}

    @abstractmethod
    def singular_values(self, matrix: Dense | Difference) -> tuple[np.ndarray, float]:
        """All singular values, (k,) float64 descending, and the bound on their absolute error."""

    @abstractmethod
    def is_finite(self, array: np.ndarray) -> bool:
        """Whether no number of the array is NaN or Inf."""

    @abstractmethod
    def variance_sums(self, term: rounding.Stored) -> tuple[np.ndarray, np.ndarray]:
        """See `rounding.variance_sums`."""

    def digest(self, array: np.ndarray) -> bytes:
        """A hash of the numbers, their dtype and shape, and their order in memory.

        The order in memory is the order of summation, which decides the last digits of a result.
        SHA-256: most processors have instructions for it, which make it twice as fast as BLAKE2.
        """
        return self._once(array, "digest", lambda: _digest(array))

    def _once(
        self, array: np.ndarray | CodeErrors, what: str, compute: Callable[[], Result]
    ) -> Result:
        key = (id(array), what)
        kept = self._kept.get(key)
        if kept is None or kept[0]() is not array:
            result = compute()
            reference = weakref.ref(array, lambda _: self._kept.pop(key, None))
            kept = self._kept[key] = reference, result
        value: Result = kept[1]
        return value


class NumpyBackend(Backend):
    """Computes with NumPy and SciPy on the CPU."""

    def singular_values(self, matrix: Dense | Difference) -> tuple[np.ndarray, float]:
        """See `Backend`."""
        return numpy_spectrum.of_dense(matrix)

    def is_finite(self, array: np.ndarray) -> bool:
        """See `Backend`."""
        return self._once(array, "finite", lambda: bool(np.isfinite(array).all()))

    def variance_sums(self, term: rounding.Stored) -> tuple[np.ndarray, np.ndarray]:
        """See `Backend`."""
        if len(term) > 2:  # with a scale, which is not part of the array
            if isinstance(term[2], CodeErrors):
                return self._once(term[2], "variance", lambda: rounding.variance_sums(term))
            return rounding.variance_sums(term)
        return self._once(term[0], f"variance of {term[1]}", lambda: rounding.variance_sums(term))


def _digest(array: np.ndarray) -> bytes:
    layout = (array.dtype.str, array.shape, array.flags.c_contiguous, array.flags.f_contiguous)
    digest = hashlib.sha256(repr(layout).encode())
    digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.digest()
