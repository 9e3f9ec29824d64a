"""Metrics of two matrices: how their directions lie to each other.

Subspaces are given by orthonormal bases, (n, k), as `leading_subspaces` returns them.
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


def leading_subspaces(matrix: Dense | Factored | Difference, k: int) -> Subspaces:
    """The k leading singular triplets, or as many as are above the matrix's noise floor.

    Computed in float64. A factored matrix L·R stays factored: with L = Q₁R₁ and Rᵀ = Q₂R₂ its
    triplets are those of the small R₁R₂ᵀ, rotated by Q₁ and Q₂.
    """
    if isinstance(matrix, Factored):
        q1, r1 = np.linalg.qr(matrix.scale * matrix.left.astype(np.float64))
        q2, r2 = np.linalg.qr(matrix.right.astype(np.float64).T)
        u, s, vt = np.linalg.svd(r1 @ r2.T, full_matrices=False)
        left, right = q1 @ u, q2 @ vt.T
    else:
        left, s, vt = np.linalg.svd(matrix.values.astype(np.float64), full_matrices=False)
        right = vt.T
    floor = max(noise_of(matrix), max(matrix.shape) * EPS * s[0])
    count = min(k, int(np.count_nonzero(s > floor)))
    return Subspaces(left[:, :count], s[:count], right[:, :count])


def principal_angle_cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cos θᵢ of the principal angles between two subspaces, descending, (min(j, k),).

    The singular values of one.T @ other for orthonormal `one` (n, j) and `other` (n, k); 1 is a
    shared direction, 0 an orthogonal one. Björck & Golub 1973, theorem 1.
    """
    if min(one.shape[1], other.shape[1]) == 0:
        return np.empty(0)
    return np.clip(np.linalg.svd(one.T @ other, compute_uv=False), 0.0, 1.0)


def subspace_overlap(one: np.ndarray, other: np.ndarray) -> float:
    """‖one.T @ other‖_F² / min(j, k): the mean cos² of the principal angles, 0 to 1.

    The φ of LoRA's subspace analysis (Hu et al. 2021, arXiv 2106.09685, equation 4). NaN where a
    subspace is empty. Two random subspaces of dimensions j and k in n have max(j, k)/n on average.
    """
    cosines = principal_angle_cosines(one, other)
    return float(np.mean(cosines**2)) if cosines.size else float("nan")


def energy_in_subspaces(
    matrix: Dense | Factored | Difference, left: np.ndarray, right: np.ndarray
) -> float:
    """‖left.T @ W @ right‖_F² / ‖W‖_F²: the share of W within two subspaces, 0 to 1.

    left (m, j) and right (n, k) orthonormal. NaN for the zero matrix.
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
    """⟨X, Y⟩_F / (‖X‖_F ‖Y‖_F), the cosine of the angle between two matrices, -1 to 1.

    NaN where one is zero. Two factored matrices are never multiplied out:
    ⟨L₁R₁, L₂R₂⟩ = Σ (L₁ᵀL₂) ∘ (R₁R₂ᵀ).

    Raises:
        ValueError: their shapes differ.
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
