"""A spectrum: the singular values of one matrix, with what is known about their errors."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spectrum:
    """All singular values of one matrix, or of several of one shape along leading axes.

    Attributes:
        s: (k,) float64, descending, >= 0, k = min(rows, cols).
        rows: m.
        cols: n.
        rank_bound: the largest rank the matrix can have: r for a factored one, that of the
            adapters for a difference that adapters alone made, else k.
        error: bound on |computed - exact| for every singular value. Where they come from a Gram
            matrix it is that of the smallest, and the others are nearer to theirs by s_k/s.
        noise_floor: spectral norm of the rounding noise in the stored numbers.
    """

    s: np.ndarray
    rows: int
    cols: int
    rank_bound: int
    error: float
    noise_floor: float

    @property
    def floor(self) -> float:
        """What a singular value must exceed to be a property of the model: noise or error."""
        return np.maximum(self.noise_floor, self.error)
