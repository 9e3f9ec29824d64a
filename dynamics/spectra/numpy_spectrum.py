"""What `NumpyBackend` computes: the singular values of a matrix whose numbers are all stored.

The rules that decide between the two ways stand in `spectrum.py`; `torch_spectrum.py` does the same
with torch.
"""

import numpy as np
import scipy.linalg

from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense
from dynamics.spectra.gram import gram, singular_values_from_gram

EPS = float(np.finfo(np.float64).eps)
_BLOCK = 2**21  # numbers of a block of rows, at least
# The largest relative error of the smallest singular value that a Gram matrix may leave.
TOLERANCE = 1e-3
SMALL = 2**15  # entries of a matrix


def of_dense(matrix: Dense | Difference) -> tuple[np.ndarray, float]:
    """(s, error) by rules 2 to 4 of `spectrum.py`."""
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


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """All singular values of (m, n) `matrix`, computed in float64: (min(m, n),), descending.

    Each is within max(m, n)·2⁻⁵²·σ₁ of the exact one. LAPACK's gesdd; gesvd where that does not
    converge. Of a matrix 8 times as tall as wide (or the other way round), such as an embedding,
    those of the R of its QR decomposition, made from blocks of rows, so that it is never held in
    float64.

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
