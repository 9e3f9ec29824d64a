"""Metrics of one spectrum, as pure functions of its singular values.

Every function takes s (..., k), descending and >= 0, and returns (...). Scaling a matrix by a
positive number changes no ratio; sums of squares are taken of s/s₁ so that nothing overflows.
"""

import numpy as np
from numpy.typing import ArrayLike

from dynamics.spectra.random_matrices import (
    TRACY_WIDOM_999,
    largest_singular_value,
    marchenko_pastur_median,
    random_per,
)


def _relative(s: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(s/s₁, s₁) with 0/0 = 0, shapes (..., k) and (..., 1)."""
    s = np.asarray(s, dtype=np.float64)
    largest = s[..., :1]
    return np.divide(s, largest, out=np.zeros_like(s), where=largest > 0), largest


def effective_rank(s: ArrayLike) -> np.ndarray:
    """exp(H(p)) with p = s/Σs and H(p) = -Σ pᵢ ln pᵢ, 0·ln 0 = 0; between 1 and k.

    The zero matrix has effective rank 0. Roy & Vetterli 2007, "The effective rank: a measure of
    effective dimensionality", definition 1.
    """
    relative, _ = _relative(s)
    total = relative.sum(axis=-1, keepdims=True)
    p = np.divide(relative, total, out=np.zeros_like(relative), where=total > 0)
    entropy = -np.sum(p * np.log(p, out=np.zeros_like(p), where=p > 0), axis=-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def above(s: ArrayLike, floor: ArrayLike) -> np.ndarray:
    """The singular values with those at or below `floor` (...) set to zero, (..., k)."""
    s = np.asarray(s, dtype=np.float64)
    return np.where(s > np.asarray(floor)[..., None], s, 0.0)


def proportional_effective_rank(s: ArrayLike) -> np.ndarray:
    """PER: effective rank / k, between 0 and 1. Diehl Martinez et al. 2024, arXiv 2410.11451."""
    return effective_rank(s) / np.shape(s)[-1]


def per_over_random(s: ArrayLike, rows: int, cols: int) -> np.ndarray:
    """PER / PER of independent, identically distributed entries of the same shape.

    1 is what an initialisation gives, whatever the shape; 0 for the zero matrix. The random
    matrix's PER is `random_matrices.random_per`: 0.966 for a matrix of d x 4d.
    """
    return proportional_effective_rank(s) / random_per(rows, cols)


def outliers(s: ArrayLike, rows: int, cols: int, floor: ArrayLike) -> np.ndarray:
    """The number of singular values that stand out of a random matrix's bulk, as float64.

    Those above the 99.9 % point of the largest one of independent entries with standard deviation
    σ, and above `floor` (...). σ is the median of s over the Marchenko-Pastur median: outliers,
    if they are few, do not move it (Gavish & Donoho 2014, IEEE Trans. Inf. Theory 60(8), section
    III.E). Where half of the singular values are zero, σ is 0 and all above the floor are
    outliers: r for an adapter. 0 for the zero matrix.
    """
    s = np.asarray(s, dtype=np.float64)
    sigma = np.median(s, axis=-1) / marchenko_pastur_median(rows, cols)
    edge = sigma * largest_singular_value(rows, cols, TRACY_WIDOM_999)
    return numerical_rank(s, np.maximum(edge, floor))


def exceeds_rank_bound(
    s: ArrayLike, rank_bound: ArrayLike, floor: ArrayLike, error: ArrayLike
) -> np.ndarray:
    """1 where the raw effective rank or the numerical rank is above what theory allows, else 0.

    A matrix of rank r has no effective rank above r. One that shows it is no longer that matrix:
    it was rounded after it was multiplied out, or is not what its name says. Values within `error`
    (...) of zero are the computation's and do not count; nor does an excess of 1e-9 of the bound.
    """
    allowed = np.asarray(rank_bound, dtype=np.float64) * (1 + 1e-9)
    raw = effective_rank(above(s, error))
    return ((raw > allowed) | (numerical_rank(s, floor) > allowed)).astype(np.float64)


def stable_rank(s: ArrayLike) -> np.ndarray:
    """‖W‖_F² / ‖W‖₂² = Σ (sᵢ/s₁)², between 1 and k; 0 for the zero matrix.

    Rudelson & Vershynin 2007, "Sampling from large matrices", section 1.
    """
    relative, _ = _relative(s)
    return np.sum(relative**2, axis=-1)


def numerical_rank(s: ArrayLike, floor: ArrayLike) -> np.ndarray:
    """The number of singular values above `floor` (...), as float64."""
    return np.count_nonzero(above(s, floor), axis=-1).astype(np.float64)


def condition_number(s: ArrayLike, floor: ArrayLike) -> np.ndarray:
    """s₁/s_r over the numerical rank r: what the matrix does to the directions it has.

    NaN where no singular value is above the floor.
    """
    kept = above(s, floor)
    smallest = np.min(np.where(kept > 0, kept, np.inf), axis=-1)
    largest = kept[..., 0]
    return np.divide(
        largest, smallest, out=np.full_like(largest, np.nan), where=np.asarray(largest > 0)
    )


def condition_number_raw(s: ArrayLike, error: ArrayLike) -> np.ndarray:
    """s₁/s_k, Inf where s_k is zero or no larger than the `error` (...) of its computation.

    NaN for the zero matrix. A rank-deficient matrix has no finite condition number; the huge
    quotient that a float computation gives instead is rounding.
    """
    s = np.asarray(s, dtype=np.float64)
    largest, smallest = s[..., 0], above(s, error)[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(largest > 0, largest / smallest, np.nan)


def frobenius_norm(s: ArrayLike) -> np.ndarray:
    """sqrt(Σ sᵢ²)."""
    relative, largest = _relative(s)
    return largest[..., 0] * np.sqrt(np.sum(relative**2, axis=-1))


def spectral_norm(s: ArrayLike) -> np.ndarray:
    """s₁, the largest singular value."""
    return np.asarray(s, dtype=np.float64)[..., 0]


def nuclear_norm(s: ArrayLike) -> np.ndarray:
    """Σ sᵢ."""
    return np.asarray(s, dtype=np.float64).sum(axis=-1)


def top_k_energy(s: ArrayLike, k: int) -> np.ndarray:
    """Σ_{i<=k} sᵢ² / Σ sᵢ², the share of the squared Frobenius norm in the k leading directions.

    1 where there are no more than k directions; 0 for the zero matrix.
    """
    relative, _ = _relative(s)
    energy = relative**2
    total = energy.sum(axis=-1)
    return np.divide(
        energy[..., :k].sum(axis=-1), total, out=np.zeros_like(total), where=np.asarray(total > 0)
    )
