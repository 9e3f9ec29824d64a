"""Metrics of two matrices: how their directions lie relative to each other.

A subspace is given by an orthonormal basis, (n, k), as `leading_subspaces` returns it.
"""

from typing import NamedTuple

import numpy as np

from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense, Factored
from dynamics.spectra.numpy_spectrum import EPS
from dynamics.spectra.spectrum import noise_of


class Subspaces(NamedTuple):
    """The leading singular directions of a matrix.

    Attributes:
        left: (m, k) orthonormal, the leading left singular vectors.
        s: (k,) descending singular values.
        right: (n, k) orthonormal, the leading right singular vectors.
    """

    left: np.ndarray
    s: np.ndarray
    right: np.ndarray

    def leading(self, k: int) -> "Subspaces":
        """The first k directions."""
        return Subspaces(self.left[:, :k], self.s[:k], self.right[:, :k])


def leading_subspaces(matrix: Dense | Factored | Difference, k: int) -> Subspaces:
    """The k leading singular triplets of a matrix, in float64.

    There are fewer than k where fewer singular values exceed the matrix's noise floor and the error
    of their computation. A product L·R of factors is not multiplied out: with L = Q₁R₁ and
    Rᵀ = Q₂R₂ its triplets are those of the small R₁R₂ᵀ, rotated by Q₁ and Q₂.

    Args:
        matrix: (m, n), finite.
        k: directions, at most.

    Example:
        >>> from dynamics.runs.run import Dense
        >>> matrix = Dense(np.diag([5.0, 3.0, 1e-9]), "float32")
        >>> leading_subspaces(matrix, k=3).s  # float32 cannot hold 1e-9 beside 5
        array([5., 3.])
    """
    every = all_subspaces(matrix)
    return every.leading(min(k, count_above(every.s, matrix, noise_of(matrix))))


def count_above(s: np.ndarray, matrix: Dense | Factored | Difference, noise: float) -> int:
    """How many singular values of a matrix exceed its noise and the error of their computation."""
    return int(np.count_nonzero(s > max(noise, max(matrix.shape) * EPS * s[0])))


def all_subspaces(matrix: Dense | Factored | Difference) -> Subspaces:
    """All singular triplets of a matrix, those of rounding among them, in float64.

    Args:
        matrix: (m, n), finite.

    Returns:
        Of min(m, n) directions; for a product of factors, of the r that it can have.

    Example:
        >>> from dynamics.runs.run import Dense
        >>> all_subspaces(Dense(np.diag([5.0, 0.0]), "float32")).s
        array([5., 0.])
    """
    if isinstance(matrix, Factored):
        q1, r1 = np.linalg.qr(matrix.scale * matrix.left.astype(np.float64))
        q2, r2 = np.linalg.qr(matrix.right.astype(np.float64).T)
        u, s, vt = np.linalg.svd(r1 @ r2.T, full_matrices=False)
        left, right = q1 @ u, q2 @ vt.T
    else:
        left, s, vt = np.linalg.svd(matrix.values.astype(np.float64), full_matrices=False)
        right = vt.T
    return Subspaces(left, s, right)


def principal_angle_cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The cosines of the principal angles between two subspaces: 1 shared, 0 orthogonal.

    They are the singular values of one.T @ other (Björck & Golub 1973, theorem 1).

    Args:
        one: (n, j), orthonormal.
        other: (n, k), orthonormal.

    Returns:
        (min(j, k),), descending; empty where a subspace is.

    Example:
        >>> identity = np.eye(3)
        >>> principal_angle_cosines(identity[:, :2], identity[:, 1:])  # they share one direction
        array([1., 0.])
    """
    if min(one.shape[1], other.shape[1]) == 0:
        return np.empty(0)
    return np.clip(np.linalg.svd(one.T @ other, compute_uv=False), 0.0, 1.0)


def subspace_overlap(one: np.ndarray, other: np.ndarray) -> float:
    """‖one.T @ other‖_F² / min(j, k): the mean cos² of the principal angles, between 0 and 1.

    This is φ of LoRA's subspace analysis (Hu et al. 2021, arXiv 2106.09685, equation 4). Two random
    subspaces of dimensions j and k in n dimensions have max(j, k)/n on average.

    Args:
        one: (n, j), orthonormal.
        other: (n, k), orthonormal.

    Returns:
        The overlap; NaN where a subspace is empty.

    Example:
        >>> identity = np.eye(3)
        >>> subspace_overlap(identity[:, :2], identity[:, 1:])  # (1² + 0²) / 2
        0.5
    """
    cosines = principal_angle_cosines(one, other)
    return float(np.mean(cosines**2)) if cosines.size else float("nan")


def energy_in_subspaces(
    matrix: Dense | Factored | Difference, left: np.ndarray, right: np.ndarray
) -> float:
    """‖left.T @ W @ right‖_F² / ‖W‖_F²: the share of W within two subspaces, between 0 and 1.

    Args:
        matrix: W, (m, n).
        left: (m, j), orthonormal.
        right: (n, k), orthonormal.

    Returns:
        The share; NaN for the zero matrix.

    Example:
        >>> from dynamics.runs.run import Dense
        >>> matrix, identity = Dense(np.diag([3.0, 1.0]), "float64"), np.eye(2)
        >>> energy_in_subspaces(matrix, identity[:, :1], identity)  # 3² / (3² + 1²)
        0.9
    """
    if isinstance(matrix, Factored):
        scaled = matrix.scale * matrix.left.astype(np.float64)
        inside = (left.T @ scaled) @ (matrix.right.astype(np.float64) @ right)
        total = _squared_norm_of_product(scaled, matrix.right.astype(np.float64))
    else:
        values = matrix.values.astype(np.float64)
        inside, total = left.T @ values @ right, float(np.sum(values**2))
    return float(np.sum(inside**2) / total) if total > 0 else float("nan")


def alignment(one: Dense | Factored | Difference, other: Dense | Factored | Difference) -> float:
    """⟨X, Y⟩_F / (‖X‖_F ‖Y‖_F): the cosine of the angle between two matrices, between -1 and 1.

    Two products of factors are not multiplied out: ⟨L₁R₁, L₂R₂⟩ = Σ (L₁ᵀL₂) ∘ (R₁R₂ᵀ).

    Returns:
        The cosine; NaN where one matrix is zero.

    Raises:
        ValueError: their shapes differ.

    Example:
        >>> from dynamics.runs.run import Dense
        >>> one, other = (Dense(np.diag(d), "float64") for d in ([1.0, 0.0], [3.0, 4.0]))
        >>> alignment(one, other)  # 3 / (1 · 5)
        0.6
    """
    if one.shape != other.shape:
        raise ValueError(f"Expected matrices of one shape, found {one.shape} and {other.shape}.")
    squared = _inner(one, one) * _inner(other, other)
    return _inner(one, other) / float(np.sqrt(squared)) if squared > 0 else float("nan")


def _inner(one: Dense | Factored | Difference, other: Dense | Factored | Difference) -> float:
    if isinstance(one, Factored) and isinstance(other, Factored):
        left = one.left.astype(np.float64).T @ other.left.astype(np.float64)
        right = one.right.astype(np.float64) @ other.right.astype(np.float64).T
        return one.scale * other.scale * float(np.sum(left * right))
    return float(np.sum(_values(one) * _values(other)))


def _values(matrix: Dense | Factored | Difference) -> np.ndarray:
    if isinstance(matrix, Factored):
        return matrix.product()
    return matrix.values.astype(np.float64)


def _squared_norm_of_product(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.sum((left.T @ left) * (right @ right.T)))
