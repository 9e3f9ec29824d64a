"""Singular values with the error of their computation and the noise floor of their numbers.

How the singular values of a matrix are computed, and what decides it. The times are of one BLAS
thread on one machine; their ratios are what counts (`make bench`, docs/performance.md).

1. A product of known low rank (an adapter, a sum of them, a circuit, differences of circuits) from
   its factors: QR of each, then an r x r matrix. For adapters 100 to 7000 times faster than a dense
   SVD, 5 times for ten accumulated ones, and no rounding can give it more rank than r. A difference
   that adapters made is *not* among these: the stored weights hold the roundings of its merges,
   which are of full rank.
2. No more than 2¹⁵ entries: `singular_values`, which costs next to nothing there.
3. Others: from the float64 Gram matrix (`gram.py`), 2 to 4 times faster than an SVD, if the bound
   on the error of the smallest singular value is at most `TOLERANCE` of it. All metrics then are
   within that of their value, and usually much nearer: the larger a singular value, the smaller
   its error (of an ordinary 384 x 384 weight, the effective rank is within 1e-13).
4. Where the bound is larger, because the condition number is (above 1.7e5 at m = 384), or the
   matrix is rank-deficient: `singular_values`, whose error is some u·σ₁ for all alike.

The routines are those of NumPy's and SciPy's OpenBLAS throughout: the eigenvalues of a 384 x 384
matrix take 7.5 ms (`gram.eigvalsh`) where NumPy's take 8.3 and torch's (MKL) 12.7, and YᵀY half of
torch's time. That also makes results independent of torch's build. On a GPU, if one is asked for,
rules 3 and 4 are torch's (`torch_spectrum.py`).
"""

import numpy as np

from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense, Factored, Spectrum
from dynamics.spectra.backend import Backend, NumpyBackend
from dynamics.spectra.noise import noise_floor, product_noise_bound
from dynamics.spectra.numpy_spectrum import EPS, singular_values

# To be raised whenever `spectrum` or the noise give other numbers: those kept by a
# `spectrum_cache` are then measured again.
MEASURE_VERSION = 5


def singular_values_of_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The min(m, r, n) leading singular values of left @ right, all others being exactly zero.

    left (m, r), right (r, n). With left = Q₁R₁ and rightᵀ = Q₂R₂ they are those of R₁R₂ᵀ: the
    (m, n) product is never formed, and rounding cannot give it more rank than r.
    """
    r1, r2 = _triangles(left, right)
    return singular_values(r1 @ r2.T)


def _triangles(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R of the QR decompositions of left and rightᵀ: (min(m, r), r) and (min(n, r), r)."""
    tall = (np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64).T)
    r1, r2 = (np.asarray(np.linalg.qr(each, mode="r")) for each in tall)
    return r1, r2


def spectrum(
    matrix: Dense | Factored | Difference | Spectrum,
    *,
    rank_bound: int | None = None,
    backend: Backend | None = None,
) -> Spectrum:
    """The spectrum of a matrix of a run, by the cheapest way that keeps float64 accuracy.

    Args:
        matrix: what to measure; a spectrum was, and is returned as it is.
        rank_bound: the rank that the matrix was made with, where its entries do not show it: a
            stored product B·A of r-column factors is dense, and rounding gives it full rank.
        backend: what computes; a `NumpyBackend` of its own by default. One backend for several
            matrices computes what their arrays share only once.

    Raises:
        ValueError: the matrix holds NaN or Inf.
    """
    if isinstance(matrix, Spectrum):
        return matrix
    backend = backend or NumpyBackend()
    rows, cols = matrix.shape
    k = min(rows, cols)
    if isinstance(matrix, Factored):
        r1, r2 = _triangles(matrix.left, matrix.right)
        leading = abs(matrix.scale) * singular_values(r1 @ r2.T)
        s = np.zeros(k)
        s[: leading.size] = leading
        bound = matrix.rank_bound
        # Backward error of two QRs and a product is relative to ‖left‖‖right‖, not to s₁.
        norms = float(singular_values(r1)[0]), float(singular_values(r2)[0])
        error = max(rows, cols) * EPS * abs(matrix.scale) * norms[0] * norms[1]
        noise = _product_noise(matrix, norms)
    else:
        s, error = backend.singular_values(matrix)
        known = matrix.rank_bound if isinstance(matrix, Difference) else None
        bound = known or k
        noise = noise_of(matrix, backend)
    bound = bound if rank_bound is None else min(bound, rank_bound)
    return Spectrum(s, rows, cols, bound, error, noise)


def noise_of(matrix: Dense | Factored | Difference, backend: Backend | None = None) -> float:
    """The spectral norm of the rounding noise in the stored numbers of a matrix of a run."""
    if isinstance(matrix, Factored):
        return _product_noise(matrix)
    return noise_floor(*matrix.stored, sums=(backend or NumpyBackend()).variance_sums)


def _product_noise(matrix: Factored, norms: tuple[float, float] | None = None) -> float:
    left, right = (matrix.left, matrix.dtype), (matrix.right, matrix.dtype)
    return abs(matrix.scale) * product_noise_bound(left, right, norms)
