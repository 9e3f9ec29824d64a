"""Singular values from the float64 Gram matrix of the smaller side, with a bound on their error.

With Y (m, n), m >= n, the singular values are the roots of the eigenvalues of G = YᵀY. Half of a
dense SVD's work or less, and G is (n, n) whatever m is; but what is lost in G is lost: an error of
u·σ₁² in λ = σ² is one of u·σ₁²/σ in σ. The bound that says when that matters:

    |λ̂ᵢ - σᵢ²| <= δ = 16·√m·u·σ₁²,   |σ̂ᵢ - σᵢ| = |λ̂ᵢ - σᵢ²| / (σ̂ᵢ + σᵢ) <= δ/σ̂ᵢ,   u = 2⁻⁵³

By Weyl's inequality δ is the norm of all that is added to G: the rounding of its sums of m products
and the backward error of the eigenvalue solver. The rigorous form of the first, m·u·‖Y‖_F²
(Higham 2002, section 3.5), takes all roundings to point the same way and is 100 to 10⁵ times what
happens. Independent ones grow as √m (Higham & Mary 2019, SIAM J. Sci. Comput. 41(5)); the worst
are those of constant matrices, whose partial sums all round alike. OpenBLAS sums up to 384 products
at a time, which bounds even these (MKL sums up thousands, see `torch_spectrum.py`). 16 is three
times the worst found, 5.3√m·u·σ₁² (a constant 96 x 96 matrix; 4.6 for a 384 x 384 one of random
signs; 2.4 Gaussian): no violation in `tests/dynamics/spectra/test_gram.py`.

Never in float32: its u is 5·10⁸ times larger, and what is below 3·10⁻³·σ₁ would be noise.
"""

from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

import numpy as np
from scipy.linalg import lapack

from dynamics.runs.differences import Difference

_UNIT = 2.0**-53
# A block of rows has as many numbers, or three times as many rows as columns: the more blocks,
# the more often an (n, n) product is completed and added, half of the time of 8192 x 2048 in 32.
_BLOCK = 2**17
# ‖Y‖_F² within these: neither do squares overflow, nor those that matter underflow.
_SMALLEST, _LARGEST = 1e-200, 1e200


def gram(matrix: np.ndarray | Difference) -> np.ndarray:
    """YᵀY (n, n) float64 of a matrix or its transpose, whichever is Y (m, n) with m >= n.

    Added up from blocks of Y's rows, each converted (and subtracted) when its turn comes: of an
    embedding, no more than 1 MB or thrice the size of YᵀY is held in float64. NumPy sees a product
    of one array with its own transpose and calls BLAS' syrk, which does half the work of a product
    of two.
    """
    total: np.ndarray | None = None
    with np.errstate(over="ignore", invalid="ignore"):  # seen in `singular_values_from_gram`
        for block in _blocks(matrix):
            product = block.T @ block
            total = product if total is None else np.add(total, product, out=total)
    assert total is not None, "a matrix has rows"
    return total


def eigvalsh(product: np.ndarray) -> np.ndarray:
    """The eigenvalues of a symmetric (n, n) float64 matrix, ascending.

    What `np.linalg.eigvalsh` does, LAPACK's sytrd and sterf, in 0.73 to 0.95 of its time: with
    narrower panels, which stay in the cache, and without scaling, which a Gram matrix needs only
    where `singular_values_from_gram` gives up.

    Raises:
        LinAlgError: no convergence.
    """
    n = len(product)
    if n == 1:  # SciPy's sterf has no such case
        return product[0].copy()
    width = 16 if n < 1000 else 32
    _, diagonal, beside, _, _ = lapack.dsytrd(product.T, lower=1, lwork=n * width)
    eigenvalues, info = lapack.dsterf(diagonal, beside, overwrite_d=1, overwrite_e=1)
    if info != 0:
        raise np.linalg.LinAlgError("Eigenvalues did not converge")
    return eigenvalues


def singular_values_from_gram(
    product: Any, m: int, eigvalsh: Callable[[Any], np.ndarray] = eigvalsh
) -> tuple[np.ndarray, float]:
    """The singular values of Y (m, n) from YᵀY, and the bound on the error of the least of them.

    Args:
        product: YᵀY (n, n) float64, an array or a tensor.
        m: rows of Y.
        eigvalsh: gives its eigenvalues, ascending.

    Returns:
        s: (n,) float64, descending. Eigenvalues that rounding made negative are 0.
        error: δ/s_n, which no singular value's error exceeds; Inf where s_n is 0, and where ‖Y‖_F²
            is 0, not finite, or so large or small that squares leave float64: s is NaN then.
    """
    if not _SMALLEST < float(product.trace()) < _LARGEST:
        return np.full(len(product), np.nan), np.inf
    eigenvalues = eigvalsh(product)[::-1]
    s = np.sqrt(np.maximum(eigenvalues, 0.0))
    return s, float(gram_error(eigenvalues[0], m) / s[-1]) if s[-1] > 0 else np.inf


def gram_error(largest_eigenvalue: float, m: int) -> float:
    """δ: what the squares of the singular values may be off by, see above."""
    return 16 * float(np.sqrt(m)) * _UNIT * largest_eigenvalue


def _blocks(matrix: np.ndarray | Difference) -> Iterator[np.ndarray]:
    if isinstance(matrix, Difference):
        parts = [matrix.now.values, matrix.before.values]
    else:
        parts = [matrix]
    if parts[0].shape[0] < parts[0].shape[1]:
        parts = [part.T for part in parts]
    m, n = parts[0].shape
    count = ceil(m / max(_BLOCK // n, 3 * n))
    height = ceil(m / count)
    for first in range(0, m, height):
        rows = [part[first : first + height] for part in parts]
        if len(rows) == 1:
            yield rows[0].astype(np.float64, copy=False)
        else:
            yield np.subtract(*rows, dtype=np.float64)
