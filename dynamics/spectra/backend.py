"""What is the same for every matrix that stored numbers are part of, found once per array.

A checkpoint's weight is measured itself, and is a term of its update, of the next one and of its
displacement: whether it is finite, its hash and its rounding noise are the same each time, and so
is its copy on a GPU (`gpu_backend.py`).
"""

import hashlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense
from dynamics.spectra.noise import Stored, variance_sums


class ArrayFacts:
    """Facts about arrays that nobody changes, remembered as long as the arrays live.

    Attributes:
        measured_by: what finds them out besides NumPy, see `gpu_backend.measured_by`.
    """

    measured_by = ""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[Any, Any]] = {}

    def singular_values(self, matrix: Dense | Difference) -> tuple[np.ndarray, float] | None:
        """(s, error) where there is something faster than `spectrum.py` for this matrix."""
        return None

    def is_finite(self, array: np.ndarray) -> bool:
        """Whether all numbers are."""
        return bool(self._once(array, "finite", lambda: np.isfinite(array).all()))

    def digest(self, array: np.ndarray) -> bytes:
        """A hash of the numbers, their dtype and shape, and their order in memory.

        The order is that of summation, which the last digits of a result depend on. SHA-256: with
        the instructions that most processors have for it, twice as fast as BLAKE2.
        """
        return bytes(self._once(array, "digest", lambda: _digest(array)))

    def variance_sums(self, term: Stored) -> tuple[np.ndarray, np.ndarray]:
        """See `noise.variance_sums`."""
        if len(term) > 2:  # with a scale, which is not part of the array
            return variance_sums(term)
        found: tuple[np.ndarray, np.ndarray] = self._once(
            term[0], f"variance of {term[1]}", lambda: self._variance_sums(term)
        )
        return found

    def _variance_sums(self, term: Stored) -> tuple[np.ndarray, np.ndarray]:
        return variance_sums(term)

    def _once(self, array: np.ndarray, fact: str, find: Callable[[], Any]) -> Any:
        key = (id(array), fact)
        known = self._known.get(key)
        if known is None or known[0]() is not array:
            found = find()
            gone = weakref.ref(array, lambda _: self._known.pop(key, None))
            known = self._known[key] = gone, found
        return known[1]


def _digest(array: np.ndarray) -> bytes:
    layout = (array.dtype.str, array.shape, array.flags.c_contiguous, array.flags.f_contiguous)
    digest = hashlib.sha256(repr(layout).encode())
    digest.update(np.ascontiguousarray(array).data if array.size else b"")
    return digest.digest()
