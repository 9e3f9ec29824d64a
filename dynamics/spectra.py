"""Singular values with the error of their computation and the noise floor of their numbers."""

import numpy as np
import scipy.linalg

from dynamics.derived import Difference
from dynamics.noise import noise_floor, product_noise_bound
from dynamics.run import Dense, Factored, Spectrum

EPS = float(np.finfo(np.float64).eps)
_BLOCK = 2**21  # numbers of a block of rows, at least
# To be raised whenever `spectrum` or the noise give other numbers: those kept by a
# `spectrum_cache` are then measured again.
MEASURE_VERSION = 2


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """All singular values of (m, n) `matrix`, computed in float64: (min(m, n),), descending.

    LAPACK's gesdd; gesvd where that does not converge. Of a matrix 8 times as tall as wide (or the
    other way round), such as an embedding, those of the R of its QR decomposition, made from blocks
    of rows, so that it is never held in float64.

    Raises:
        ValueError: the matrix is not two-dimensional or holds NaN or Inf.
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(f"Expected a finite (m, n) matrix, found shape {matrix.shape} or NaN/Inf.")
    matrix = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    m, n = matrix.shape
    if m > 8 * n:
        matrix = _triangle(matrix)
    matrix = matrix.astype(np.float64, copy=False)
    try:
        return np.linalg.svd(matrix, compute_uv=False)
    except np.linalg.LinAlgError:
        return scipy.linalg.svd(matrix, compute_uv=False, lapack_driver="gesvd")


def _triangle(matrix: np.ndarray) -> np.ndarray:
    """R (n, n) of a QR decomposition of a tall (m, n) matrix, float64, one block of rows a time.

    Each step is the QR of the R so far on top of the next block: as stable as one Householder QR
    (Demmel et al. 2012, "Communication-optimal parallel and sequential QR", section 5).
    """
    m, n = matrix.shape
    height = max(8 * n, _BLOCK // max(n, 1))
    r = np.zeros((0, n))
    for first in range(0, m, height):
        block = matrix[first : first + height].astype(np.float64)
        r = np.asarray(np.linalg.qr(np.vstack([r, block]), mode="r"))
    return r


def singular_values_of_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The min(m, r, n) leading singular values of left @ right, all others being exactly zero.

    left (m, r), right (r, n). With left = Q₁R₁ and rightᵀ = Q₂R₂ they are those of R₁R₂ᵀ: the
    (m, n) product is never formed, and rounding cannot give it more rank than r.
    """
    _, r1 = np.linalg.qr(np.asarray(left, dtype=np.float64))
    _, r2 = np.linalg.qr(np.asarray(right, dtype=np.float64).T)
    return singular_values(r1 @ r2.T)


def spectrum(
    matrix: Dense | Factored | Difference | Spectrum, *, rank_bound: int | None = None
) -> Spectrum:
    """The spectrum of a matrix of a run, by the cheapest way that keeps float64 accuracy.

    Args:
        matrix: what to measure; a spectrum was, and is returned as it is.
        rank_bound: the rank that the matrix was made with, where its entries do not show it: a
            stored product B·A of r-column factors is dense, and rounding gives it full rank.

    Raises:
        ValueError: the matrix holds NaN or Inf.
    """
    if isinstance(matrix, Spectrum):
        return matrix
    rows, cols = matrix.shape
    k = min(rows, cols)
    if isinstance(matrix, Factored):
        leading = abs(matrix.scale) * singular_values_of_product(matrix.left, matrix.right)
        s = np.zeros(k)
        s[: leading.size] = leading
        bound = matrix.rank_bound
        # Backward error of two QRs and a product is relative to ‖left‖‖right‖, not to s₁.
        size = abs(matrix.scale) * _norm(matrix.left) * _norm(matrix.right)
    else:
        s = singular_values(matrix.values)
        known = matrix.rank_bound if isinstance(matrix, Difference) else None
        bound, size = known or k, float(s[0])
    bound = bound if rank_bound is None else min(bound, rank_bound)
    return Spectrum(s, rows, cols, bound, max(rows, cols) * EPS * size, noise_of(matrix))


def noise_of(matrix: Dense | Factored | Difference) -> float:
    """The spectral norm of the rounding noise in the stored numbers of a matrix of a run."""
    if isinstance(matrix, Factored):
        noise = product_noise_bound((matrix.left, matrix.dtype), (matrix.right, matrix.dtype))
        return abs(matrix.scale) * noise
    return noise_floor(*matrix.stored)


def _norm(factor: np.ndarray) -> float:
    return float(singular_values(factor)[0])
