"""Metrics of a spectrum, as pure functions of its singular values.

Every function takes singular values s (..., k), descending and >= 0, of one matrix or of several
along leading axes, and returns float64 (...). Multiplying a matrix by a positive number changes no
ratio. Sums of squares are taken of s/s₁, so nothing overflows.
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
    """exp(H(p)) with p = s/Σs and H(p) = -Σ pᵢ ln pᵢ, where 0·ln 0 = 0; between 1 and k.

    0 for the zero matrix. Roy & Vetterli 2007, "The effective rank: a measure of effective
    dimensionality", definition 1.

    Example:
        >>> effective_rank([[5.0, 5.0, 5.0], [7.0, 0.0, 0.0]]).round(12)  # k equal ones; rank 1
        array([3., 1.])
        >>> round(float(effective_rank([2.0, 1.0, 1.0])) ** 2, 12)  # H = 1.5 ln 2, so 2^1.5
        8.0
    """
    relative, _ = _relative(s)
    total = relative.sum(axis=-1, keepdims=True)
    p = np.divide(relative, total, out=np.zeros_like(relative), where=total > 0)
    entropy = -np.sum(p * np.log(p, out=np.zeros_like(p), where=p > 0), axis=-1)
    return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)


def above(s: ArrayLike, floor: ArrayLike) -> np.ndarray:
    """The singular values, (..., k), with those at or below `floor` (...) set to zero.

    Example:
        >>> above([4.0, 2.0, 1.0], floor=2.0)
        array([4., 0., 0.])
    """
    s = np.asarray(s, dtype=np.float64)
    return np.where(s > np.asarray(floor)[..., None], s, 0.0)


def proportional_effective_rank(s: ArrayLike) -> np.ndarray:
    """PER: effective rank / k, between 0 and 1. Diehl Martinez et al. 2024, arXiv 2410.11451.

    Example:
        >>> round(float(proportional_effective_rank([1.0, 1.0, 0.0, 0.0])), 12)  # 2 / 4
        0.5
    """
    return effective_rank(s) / np.shape(s)[-1]


def per_over_random(s: ArrayLike, rows: int, cols: int) -> np.ndarray:
    """PER / the PER of a matrix of the same shape with independent, identical entries.

    An initialisation has 1, whatever the shape; the zero matrix has 0. The PER of the random matrix
    is `spectra.random_matrices.random_per`: 0.966 for a d x 4d matrix.

    Example:
        >>> initialised = torch.randn(100, 400, generator=torch.Generator().manual_seed(0))
        >>> round(float(per_over_random(dy.singular_values(initialised), 100, 400)), 2)
        1.0
        >>> round(float(per_over_random(np.ones(100), 100, 400)), 3)  # orthogonal rows: 1 / 0.966
        1.035
    """
    return proportional_effective_rank(s) / random_per(rows, cols)


def outliers(s: ArrayLike, rows: int, cols: int, floor: ArrayLike) -> np.ndarray:
    """The number of singular values that stand out of the bulk of a random matrix, as float64.

    An outlier is above `floor` (...) and above the 99.9 % point of the largest singular value of
    independent entries with standard deviation σ. σ is the median of s divided by the
    Marchenko-Pastur median; a few outliers do not move the median (Gavish & Donoho 2014, IEEE
    Trans. Inf. Theory 60(8), section III.E). Where half of the singular values are zero, σ is 0 and
    every singular value above the floor is an outlier: r of them for an adapter. 0 for the zero
    matrix.

    Example:
        >>> noise = np.random.default_rng(0).standard_normal((60, 40))
        >>> spiked = noise + 5 * np.eye(60, 40)[:, :1] * np.ones(40)  # one direction of norm 32
        >>> [float(outliers(dy.singular_values(w), 60, 40, floor=0.0)) for w in (noise, spiked)]
        [0.0, 1.0]
    """
    s = np.asarray(s, dtype=np.float64)
    sigma = np.median(s, axis=-1) / marchenko_pastur_median(rows, cols)
    edge = sigma * largest_singular_value(rows, cols, TRACY_WIDOM_999)
    return numerical_rank(s, np.maximum(edge, floor))


def exceeds_rank_bound(
    s: ArrayLike, rank_bound: ArrayLike, floor: ArrayLike, error: ArrayLike
) -> np.ndarray:
    """1 where the raw effective rank or the numerical rank exceeds `rank_bound`, else 0; float64.

    A matrix of rank r cannot have an effective rank above r. If it has, it is no longer this
    matrix: it was rounded after it was multiplied out, or it is not what its name says. Singular
    values of at most `error` (...) come from the computation and do not count. A relative excess of
    1e-9 over the bound does not count either.

    Args:
        s: (..., k) singular values.
        rank_bound: (...) the largest rank that the matrix can have.
        floor: (...) what a singular value must exceed for the numerical rank.
        error: (...) the bound on the error of the singular values.

    Example:
        >>> s = [[1.0, 1.0, 1e-3], [1.0, 1.0, 1e-16]]  # rounding of a product; of an SVD
        >>> exceeds_rank_bound(s, rank_bound=2, floor=[1e-2, 1e-2], error=[1e-15, 1e-15])
        array([1., 0.])
    """
    allowed = np.asarray(rank_bound, dtype=np.float64) * (1 + 1e-9)
    raw = effective_rank(above(s, error))
    return ((raw > allowed) | (numerical_rank(s, floor) > allowed)).astype(np.float64)


def stable_rank(s: ArrayLike) -> np.ndarray:
    """‖W‖_F² / ‖W‖₂² = Σ (sᵢ/s₁)², between 1 and k; 0 for the zero matrix.

    Rudelson & Vershynin 2007, "Sampling from large matrices", section 1.

    Example:
        >>> float(stable_rank([4.0, 2.0, 2.0]))  # (16 + 4 + 4) / 16
        1.5
    """
    relative, _ = _relative(s)
    return np.sum(relative**2, axis=-1)


def numerical_rank(s: ArrayLike, floor: ArrayLike) -> np.ndarray:
    """The number of singular values above `floor` (...), as float64.

    Example:
        >>> numerical_rank([[4.0, 2.0, 1.0], [3.0, 0.0, 0.0]], floor=[1.0, 0.0])
        array([2., 1.])
    """
    return np.count_nonzero(above(s, floor), axis=-1).astype(np.float64)


def condition_number(s: ArrayLike, floor: ArrayLike) -> np.ndarray:
    """s₁/s_r with the numerical rank r: the condition number on the directions above the floor.

    NaN where no singular value is above `floor` (...).

    Example:
        >>> float(condition_number([8.0, 2.0, 1e-9], floor=1e-6))  # 8 / 2
        4.0
    """
    kept = above(s, floor)
    smallest = np.min(np.where(kept > 0, kept, np.inf), axis=-1)
    largest = kept[..., 0]
    return np.divide(
        largest, smallest, out=np.full_like(largest, np.nan), where=np.asarray(largest > 0)
    )


def condition_number_raw(s: ArrayLike, error: ArrayLike) -> np.ndarray:
    """s₁/s_k; Inf where s_k is at most the `error` (...) of its computation, NaN for zero matrices.

    A rank-deficient matrix has no finite condition number. The huge quotient that a float
    computation gives for one is rounding.

    Example:
        >>> condition_number_raw([[8.0, 2.0], [8.0, 1e-17]], error=[1e-15, 1e-15])
        array([ 4., inf])
    """
    s = np.asarray(s, dtype=np.float64)
    largest, smallest = s[..., 0], above(s, error)[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(largest > 0, largest / smallest, np.nan)


def frobenius_norm(s: ArrayLike) -> np.ndarray:
    """√(Σ sᵢ²).

    Example:
        >>> float(frobenius_norm([4.0, 3.0]))
        5.0
    """
    relative, largest = _relative(s)
    return largest[..., 0] * np.sqrt(np.sum(relative**2, axis=-1))


def spectral_norm(s: ArrayLike) -> np.ndarray:
    """s₁, the largest singular value.

    Example:
        >>> float(spectral_norm([4.0, 3.0]))
        4.0
    """
    return np.asarray(s, dtype=np.float64)[..., 0]


def nuclear_norm(s: ArrayLike) -> np.ndarray:
    """Σ sᵢ.

    Example:
        >>> float(nuclear_norm([4.0, 3.0]))
        7.0
    """
    return np.asarray(s, dtype=np.float64).sum(axis=-1)


def top_k_energy(s: ArrayLike, k: int) -> np.ndarray:
    """Σ_{i<=k} sᵢ² / Σ sᵢ²: the share of the squared Frobenius norm in the k leading directions.

    1 where the matrix has k directions or fewer; 0 for the zero matrix.

    Example:
        >>> float(top_k_energy([2.0, 1.0], k=1))  # 4 / (4 + 1)
        0.8
    """
    relative, _ = _relative(s)
    energy = relative**2
    total = energy.sum(axis=-1)
    return np.divide(
        energy[..., :k].sum(axis=-1), total, out=np.zeros_like(total), where=np.asarray(total > 0)
    )
