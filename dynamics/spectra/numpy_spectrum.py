"""Singular values with NumPy and SciPy, of matrices whose entries are all stored.

`spectrum.py` explains the rules; `torch_spectrum.py` follows the same rules with torch.
"""

from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense
from dynamics.spectra.arrays import stored_numbers
from dynamics.spectra.gram import gram, singular_values_from_gram

if TYPE_CHECKING:
    from dynamics.spectra.arrays import Array

EPS = float(np.finfo(np.float64).eps)
_BLOCK = 2**21  # entries of a block of rows, at least
# A Gram matrix is used if it gives the smallest singular value with this relative error or less.
TOLERANCE = 1e-3
SMALL = 2**15  # entries of a matrix for which an SVD costs next to nothing


def of_dense(matrix: Dense | Difference) -> tuple[np.ndarray, float]:
    """(s, error) by the rules 2 to 4 of `spectrum.py`; s (k,) float64, descending."""
    rows, cols = matrix.shape
    longest = max(rows, cols)
    if rows * cols > SMALL:
        s, error = singular_values_from_gram(
            gram(matrix if isinstance(matrix, Difference) else matrix.values), longest
        )
        if error <= TOLERANCE * s[-1]:
            return s, error
    s = singular_values(matrix.values)
    return s, longest * EPS * float(s[0])


def singular_values(matrix: "Array") -> np.ndarray:
    """All singular values of a matrix, computed in float64 on the CPU.

    LAPACK's gesdd computes them, and gesvd where gesdd does not converge. Where one side is more
    than 8 times as long as the other, as in an embedding, they are the singular values of R of a QR
    decomposition. R is made from blocks of rows, so that the whole matrix is never in float64.

    Args:
        matrix: (m, n), finite: a NumPy array or a torch tensor of any float dtype. Integers and
            booleans are converted to float64.

    Returns:
        (min(m, n),) float64, descending. Each is within max(m, n)·2⁻⁵²·σ₁ of the exact one.

    Raises:
        DynamicsError: `matrix` is not an array, its numbers are not real, it does not have two
            dimensions, it has no entries, or it holds NaN or Inf.

    Example:
        >>> dy.singular_values(np.array([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]]))
        array([4., 3.])
    """
    values, _ = stored_numbers(matrix)
    values = values.T if values.shape[0] < values.shape[1] else values
    m, n = values.shape
    if m > 8 * n:
        values = _triangle(values)
    values = values.astype(np.float64, copy=False)
    try:
        return np.linalg.svd(values, compute_uv=False)
    except np.linalg.LinAlgError:
        return scipy.linalg.svd(values, compute_uv=False, lapack_driver="gesvd")


def _triangle(matrix: np.ndarray) -> np.ndarray:
    """R (n, n) float64 of a QR decomposition of a tall (m, n) matrix, from blocks of its rows.

    Each step takes the QR of the present R stacked on the next block. This is as stable as one
    Householder QR (Demmel et al. 2012, "Communication-optimal parallel and sequential QR",
    section 5).
    """
    m, n = matrix.shape
    height = max(8 * n, _BLOCK // max(n, 1))
    r = np.zeros((0, n))
    for first in range(0, m, height):
        block = matrix[first : first + height].astype(np.float64)
        r = np.asarray(np.linalg.qr(np.vstack([r, block]), mode="r"))
    return r
