"""Singular values from the float64 Gram matrix of the smaller side, with a bound on their error.

The singular values of Y (m, n), m >= n, are the roots of the eigenvalues of G = YᵀY. This takes at
most half the work of a dense SVD, and G is (n, n) whatever m is. But G loses accuracy: an error of
u·σ₁² in λ = σ² is an error of u·σ₁²/σ in σ. A bound says when this matters:

    |λ̂ᵢ - σᵢ²| <= δ = 16·√m·u·σ₁²,   |σ̂ᵢ - σᵢ| = |λ̂ᵢ - σᵢ²| / (σ̂ᵢ + σᵢ) <= δ/σ̂ᵢ,   u = 2⁻⁵³

By Weyl's inequality, δ has to cover the norm of everything that is added to G: the rounding of its
sums of m products, and the backward error of the eigenvalue solver. The rigorous bound on the
first is m·u·‖Y‖_F² (Higham 2002, section 3.5). It assumes that all roundings point the same way,
and is 100 to 10⁵ times larger than what happens. Independent roundings grow as √m (Higham & Mary
2019, SIAM J. Sci. Comput. 41(5)). The worst are those of constant matrices, where all partial sums
round alike; OpenBLAS adds up at most 384 products at a time, which bounds even these (MKL adds up
thousands, see `torch_spectrum.py`). The largest error we saw is 5.3·√m·u·σ₁², of a constant 96 x 96
matrix (4.6 for a 384 x 384 matrix of random signs, 2.4 for Gaussian ones). The factor 16 is three
times that; `tests/dynamics/spectra/test_gram.py` finds no violation.

G is never computed in float32: its u is 5·10⁸ times larger, and every singular value below
3·10⁻³·σ₁ would be noise.
"""

from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

import numpy as np

from dynamics.runs.differences import Difference
from dynamics.spectra import lapack

_UNIT = 2.0**-53
# A block of rows has this many entries, or three times as many rows as columns if that is more.
# With more blocks, more (n, n) products are completed and added: with 32 blocks, that takes half of
# the time of an 8192 x 2048 matrix.
_BLOCK = 2**17
# With ‖Y‖_F² between these, no square overflows, and none that matters underflows.
_SMALLEST, _LARGEST = 1e-200, 1e200


def gram(matrix: np.ndarray | Difference) -> np.ndarray:
    """YᵀY, (n, n) float64, where Y (m, n), m >= n, is the matrix or its transpose.

    It is added up from blocks of the rows of Y. Each block is converted to float64 (and subtracted)
    when its turn comes: at most 1 MB of an embedding, or three times the size of YᵀY, is in float64
    at a time. NumPy recognises the product of an array with its own transpose and calls BLAS' syrk,
    which does half the work of a general product.

    Example:
        >>> gram(np.array([[1.0, 2.0], [0.0, 1.0], [0.0, 0.0]]))
        array([[1., 2.],
               [2., 5.]])
    """
    total: np.ndarray | None = None
    # `singular_values_from_gram` notices what overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        for block in _blocks(matrix):
            product = block.T @ block
            total = product if total is None else np.add(total, product, out=total)
    assert total is not None, "a matrix has rows"
    return total


def eigvalsh(product: np.ndarray) -> np.ndarray:
    """The eigenvalues of a symmetric (n, n) float64 matrix, (n,) ascending.

    LAPACK's sytrd and sterf compute them, as in `np.linalg.eigvalsh`, but in 0.73 to 0.95 of its
    time. The panels are narrower, so they stay in the cache. The matrix is not scaled: a Gram
    matrix needs that only where `singular_values_from_gram` gives up.

    Raises:
        LinAlgError: the eigenvalues did not converge.

    Example:
        >>> eigvalsh(np.diag([5.0, 2.0]))
        array([2., 5.])
    """
    n = len(product)
    if n == 1:  # SciPy's sterf has no such case
        return product[0].copy()
    width = 16 if n < 1000 else 32
    return lapack.eigenvalues_of_tridiagonal(*lapack.tridiagonal(product, width))


def singular_values_from_gram(
    product: Any, m: int, eigvalsh: Callable[[Any], np.ndarray] = eigvalsh
) -> tuple[np.ndarray, float]:
    """The singular values of Y (m, n) from YᵀY, and the bound on the error of the smallest one.

    Args:
        product: YᵀY, (n, n) float64, an array or a tensor.
        m: rows of Y.
        eigvalsh: computes the eigenvalues of `product`, ascending.

    Returns:
        s: (n,) float64, descending; 0 where rounding made an eigenvalue negative. NaN where ‖Y‖_F²
            is 0, not finite, or so large or small that squares overflow or underflow.
        error: δ/s_n, which no singular value's error exceeds; Inf where s_n is 0 or NaN.

    Example:
        >>> s, error = singular_values_from_gram(np.diag([16.0, 9.0]), m=4)
        >>> s
        array([4., 3.])
        >>> error == gram_error(16.0, m=4) / 3
        True
    """
    if not _SMALLEST < float(product.trace()) < _LARGEST:
        return np.full(len(product), np.nan), np.inf
    eigenvalues = eigvalsh(product)[::-1]
    s = np.sqrt(np.maximum(eigenvalues, 0.0))
    return s, float(gram_error(eigenvalues[0], m) / s[-1]) if s[-1] > 0 else np.inf


def gram_error(largest_eigenvalue: float, m: int) -> float:
    """δ = 16·√m·u·σ₁², the bound on the error of the squares of the singular values.

    Args:
        largest_eigenvalue: σ₁².
        m: rows of Y.

    Example:
        >>> gram_error(1.0, m=4) == 32 * 2.0**-53
        True
    """
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
