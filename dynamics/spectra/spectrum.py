"""The spectrum of a matrix: singular values, the error of their computation, and the noise floor.

Four rules decide how the singular values are computed. The times are of one BLAS thread on one
machine; their ratios are what counts (`make bench`, docs/performance.md).

1. A product of known low rank is measured from its factors: an adapter, a sum of adapters, a
   circuit, a difference of circuits. A QR decomposition of each factor leaves an r x r matrix. For
   adapters this is 100 to 7000 times faster than a dense SVD, for ten accumulated ones 5 times, and
   rounding cannot give the product more rank than r. A difference of two weights that adapters
   changed is *not* such a product: the stored weights hold the roundings of the merges, and these
   have full rank.
2. A matrix of at most 2¹⁵ entries goes to `singular_values`, which costs next to nothing there.
3. A larger matrix is measured from its float64 Gram matrix (`gram.py`), 2 to 4 times faster than by
   an SVD, if the bound on the error of the smallest singular value is at most `TOLERANCE` times its
   value. Then every metric is within `TOLERANCE` of its value, and usually much nearer: the
   larger a singular value, the smaller its error. The effective rank of an ordinary 384 x 384
   weight is within 1e-13.
4. Where the bound is larger, the matrix goes to `singular_values`, whose error is a few u·σ₁ for
   all singular values. This happens to matrices with a large condition number (above 1.7e5 at
   m = 384) and to rank-deficient ones.

All routines come from the OpenBLAS of NumPy and SciPy. The eigenvalues of a 384 x 384 matrix take
7.5 ms (`gram.eigvalsh`); NumPy's own take 8.3 ms and torch's (MKL) 12.7 ms, and YᵀY takes half of
torch's time. Results are therefore also independent of torch's build. Only on a GPU, and only if
one is asked for, rules 3 and 4 are carried out by torch (`torch_spectrum.py`).
"""

from typing import TYPE_CHECKING

import numpy as np

from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense, Factored, Spectrum
from dynamics.spectra.arrays import stored_numbers
from dynamics.spectra.backend import Backend, NumpyBackend
from dynamics.spectra.noise import noise_floor, product_noise_bound
from dynamics.spectra.numpy_spectrum import EPS, singular_values

if TYPE_CHECKING:
    from dynamics.spectra.arrays import Array

# Raise this whenever `spectrum` or the noise gives other numbers: spectra in a cache
# (`analysis.cache`) are then measured again.
MEASURE_VERSION = 5


def singular_values_of_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The leading singular values of left @ right; all others are exactly zero.

    With left = Q₁R₁ and rightᵀ = Q₂R₂ they are the singular values of R₁R₂ᵀ. The (m, n) product is
    never formed, and rounding cannot give it more rank than r.

    Args:
        left: (m, r).
        right: (r, n).

    Returns:
        (min(m, r, n),) float64, descending.

    Raises:
        DynamicsError: a factor holds NaN or Inf.

    Example:
        >>> left, right = np.array([[3.0], [4.0]]), np.array([[2.0, 0.0]])
        >>> singular_values_of_product(left, right)  # ‖left‖·‖right‖
        array([10.])
    """
    r1, r2 = _triangles(left, right)
    return singular_values(r1 @ r2.T)


def _triangles(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R of the QR decompositions of left and rightᵀ: (min(m, r), r) and (min(n, r), r)."""
    tall = (np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64).T)
    r1, r2 = (np.asarray(np.linalg.qr(each, mode="r")) for each in tall)
    return r1, r2


def spectrum(
    matrix: "Dense | Factored | Difference | Spectrum | Array",
    *,
    rank_bound: int | None = None,
    backend: Backend | None = None,
) -> Spectrum:
    """The spectrum of a matrix, in the cheapest way that keeps float64 accuracy.

    Args:
        matrix: (m, n), finite. An array or tensor: its dtype decides the noise floor, so pass a
            bfloat16 weight as bfloat16. Integers and booleans are converted to float64; dequantise
            quantised weights first. Or a matrix of a run (`Dense`, `Factored`, `Difference`). A
            `Spectrum` is returned as it is.
        rank_bound: the rank that the matrix was made with, where its entries do not show it. A
            stored product B·A of factors with r columns is dense, and rounding gives it full rank.
        backend: what computes, by default a new `NumpyBackend`. Pass one backend for several
            matrices that share arrays: what they share is then computed once.

    Returns:
        A `Spectrum`: `s` (min(m, n),) float64, descending, `rows`, `cols`, `rank_bound`, `error`
        and `noise_floor`. The metrics of `dynamics.METRICS` take it.

    Raises:
        DynamicsError: `matrix` is not an array, its numbers are not real, its dtype has no rounding
            model (see `rounding`), it does not have two dimensions, it has no entries, or it holds
            NaN or Inf.

    Example:
        >>> weight = torch.diag(torch.tensor([4.0, 3.0, 0.0]))
        >>> measured = dy.spectrum(weight)
        >>> measured.s
        array([4., 3., 0.])
        >>> float(dy.METRICS["stable_rank"].function(measured))  # (16 + 9 + 0) / 16
        1.5625
        >>> dy.spectrum(weight.bfloat16()).noise_floor / measured.noise_floor  # 16 bits fewer
        65536.0
    """
    if isinstance(matrix, Spectrum):
        return matrix
    if not isinstance(matrix, Dense | Factored | Difference):
        matrix = Dense(*stored_numbers(matrix))
    backend = backend or NumpyBackend()
    rows, cols = matrix.shape
    k = min(rows, cols)
    if isinstance(matrix, Factored):
        r1, r2 = _triangles(matrix.left, matrix.right)
        leading = abs(matrix.scale) * singular_values(r1 @ r2.T)
        s = np.zeros(k)
        s[: leading.size] = leading
        bound = matrix.rank_bound
        # The backward error of two QRs and a product is relative to ‖left‖‖right‖, not to s₁.
        norms = float(singular_values(r1)[0]), float(singular_values(r2)[0])
        error = max(rows, cols) * EPS * abs(matrix.scale) * norms[0] * norms[1]
        noise = _product_noise(matrix, matrix.noise, norms)
        storage = matrix.storage_noise and _product_noise(matrix, matrix.storage_noise, norms)
    else:
        s, error = backend.singular_values(matrix)
        bound = (matrix.rank_bound if isinstance(matrix, Difference) else None) or k
        stored, sums = matrix.stored, backend.variance_sums  # products of adapters: made once
        trained = matrix.rounded_in_training if isinstance(matrix, Difference) else None
        noise = noise_floor(*stored, repeated=trained, sums=sums)
        storage = None if trained is None else noise_floor(*stored, sums=sums)
    bound = bound if rank_bound is None else min(bound, rank_bound)
    return Spectrum(s, rows, cols, bound, error, noise, storage)


def noise_of(matrix: Dense | Factored | Difference) -> float:
    """The spectral norm of the noise of all roundings behind a matrix of a run: its noise floor."""
    if isinstance(matrix, Factored):
        return _product_noise(matrix, matrix.noise)
    trained = matrix.rounded_in_training if isinstance(matrix, Difference) else None
    return noise_floor(*matrix.stored, repeated=trained)


def _product_noise(
    matrix: Factored,
    noise: tuple[float, float] | None,
    norms: tuple[float, float] | None = None,
) -> float:
    left, right = (matrix.left, matrix.dtype), (matrix.right, matrix.dtype)
    return abs(matrix.scale) * product_noise_bound(left, right, norms, noise)
