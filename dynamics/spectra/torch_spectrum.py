"""What `numpy_spectrum.py` and `rounding.py` compute, for torch tensors on any device.

It serves matrices that are on a device already (`probes.records.live_spectra`) and matrices that a
GPU measures faster (`gpu_backend.py`). The rules and bounds are those of NumPy; the last digits
differ from NumPy's.
"""

from collections.abc import Iterator

import numpy as np
import torch

from dynamics.spectra import numpy_spectrum
from dynamics.spectra.gram import singular_values_from_gram
from dynamics.spectra.rounding import precision

_BLOCK = 2**21  # entries of a block of rows, at least
# At most so many products are added up one after the other. Those of a constant matrix are alike,
# and so are their roundings, which add up to u·σ₁² times half of this number. The bound of
# `gram.py` grows only with √m: it is 362·u·σ₁² for m = 512. MKL adds up thousands of products; the
# error is then 1.6 times the bound at 50304 x 32.
_ROWS = 512


@torch.no_grad()
def of_dense(matrix: torch.Tensor, before: torch.Tensor | None = None) -> tuple[np.ndarray, float]:
    """The singular values of `matrix` - `before`, and the bound on their error.

    Args:
        matrix: (m, n), finite, of any float dtype.
        before: likewise, on the same device; by default nothing is subtracted.

    Returns:
        s: (min(m, n),) float64, descending.
        error: no singular value's error exceeds it.

    Example:
        >>> s, error = of_dense(torch.diag(torch.tensor([3.0, 4.0])))
        >>> s, error <= 1e-14
        (array([4., 3.]), True)
    """
    n, m = sorted(matrix.shape)
    if m * n > numpy_spectrum.SMALL:
        s, error = singular_values_from_gram(gram(matrix, before), m, eigvalsh)
        if error <= numpy_spectrum.TOLERANCE * s[-1]:
            return s, error
        s = singular_values(matrix, before)
    else:  # a GPU would take longer than NumPy
        (whole,) = _blocks(matrix, before, m)
        s = numpy_spectrum.singular_values(whole.cpu().numpy())
    return s, m * numpy_spectrum.EPS * float(s[0])


def gram(matrix: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """`gram.gram` of `matrix` - `before`: (n, n) float64 with the smaller side n.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0]])).tolist()
        [[5.0]]
    """
    n = min(matrix.shape)
    product = matrix.new_zeros((n, n), dtype=torch.float64)
    for block in _blocks(matrix, before, _ROWS * max(1, _BLOCK // (_ROWS * n))):
        whole = len(block) // _ROWS
        pieces = block[: whole * _ROWS].reshape(whole, _ROWS, n)
        product += (pieces.mT @ pieces).sum(dim=0)
        if (rest := block[whole * _ROWS :]).numel():
            product.addmm_(rest.T, rest)
    return product


def eigvalsh(product: torch.Tensor) -> np.ndarray:
    """The eigenvalues of a symmetric (n, n) float64 tensor, (n,) ascending.

    Example:
        >>> eigvalsh(torch.diag(torch.tensor([5.0, 2.0], dtype=torch.float64)))
        array([2., 5.])
    """
    return torch.linalg.eigvalsh(product).cpu().numpy()


@torch.no_grad()
def singular_values(matrix: torch.Tensor, before: torch.Tensor | None = None) -> np.ndarray:
    """All singular values of `matrix` - `before` in float64, (min(m, n),), descending.

    Each is within m·2⁻⁵²·σ₁ of the exact one, where m is the longer side. On the CPU, LAPACK's
    gesdd computes them. On a GPU, the matrix is first reduced to an (n, n) R; its singular values
    are the upper half of the eigenvalues of [[0, Rᵀ], [R, 0]]. That is 1.7 to 2.4 times as fast
    as cuSOLVER's gesvd. torch's own choice, cuSOLVER's Jacobi method, has errors of up to 2.3 times
    the bound above. A matrix with one side more than 8 times as long as the other is reduced by
    blocks of rows, as in `dynamics.singular_values`, so an embedding is never whole in float64.

    Args:
        matrix: (m, n), finite, of any float dtype.
        before: likewise, on the same device; by default nothing is subtracted.

    Example:
        >>> singular_values(torch.diag(torch.tensor([3.0, 4.0])).bfloat16())
        array([4., 3.])
    """
    n, m = sorted(matrix.shape)
    triangle = matrix.new_zeros((0, n), dtype=torch.float64)
    for block in _blocks(matrix, before, m if m <= 8 * n else max(8 * n, _BLOCK // n)):
        if m == n or (m <= 8 * n and not matrix.is_cuda):
            triangle = block  # the whole matrix
        else:
            triangle = torch.linalg.qr(torch.cat([triangle, block]), mode="r").R
    try:
        if not triangle.is_cuda:
            return torch.linalg.svdvals(triangle).numpy()
        both = triangle.new_zeros((2 * n, 2 * n))
        both[n:, :n] = triangle  # eigvalsh reads only what is below the diagonal
        return np.maximum(eigvalsh(both)[: n - 1 : -1], 0.0)
    except torch.linalg.LinAlgError:  # it did not converge
        return numpy_spectrum.singular_values(triangle.cpu().numpy())


@torch.no_grad()
def variance_sums(matrix: torch.Tensor, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """`rounding.variance_sums` of numbers stored in `dtype`: (m,) and (n,) float64.

    Args:
        matrix: (m, n), in any float dtype that holds the numbers exactly.
        dtype: the float dtype that they were stored in.

    Raises:
        DynamicsError: `dtype` has no rounding model.

    Example:
        >>> rows, cols = variance_sums(torch.tensor([[3.0]]), "bfloat16")
        >>> rows[0] == (2.0**-6) ** 2 / 12  # numbers from 2 to 4 have an ulp of 2⁻⁶
        np.True_
    """
    significand, smallest = precision(dtype)
    m, n = matrix.shape
    rows, cols = (matrix.new_zeros(size, dtype=torch.float64) for size in (m, n))
    columns = _not_8_bits(matrix).any(dim=0)
    height = max(1, _BLOCK // n)
    for first in range(0, m, height):
        values = _wide_enough(matrix[first : first + height])
        # As in `rounding`: the exponent's bits alone are the number 2^e.
        bits = values.view(torch.int64 if values.itemsize == 8 else torch.int32)
        exponent = 0x7FF0000000000000 if values.itemsize == 8 else 0x7F800000
        binade = (bits & exponent).view(values.dtype)
        variance = binade.clamp(min=2.0**smallest).double().square_() * (4.0**-significand / 12)
        halved = (binade == values.abs()) & (binade > 2.0**smallest)
        variance *= torch.where(halved, 0.75, 1.0)
        variance *= values.any(dim=1, keepdim=True) & columns
        rows[first : first + height] = variance.sum(dim=1)
        cols += variance.sum(dim=0)
    return rows.cpu().numpy(), cols.cpu().numpy()


def is_finite(matrix: torch.Tensor) -> bool:
    """Whether the tensor holds neither NaN nor Inf.

    Example:
        >>> is_finite(torch.tensor([[1.0, torch.inf]]))
        False
    """
    return bool(torch.isfinite(_not_8_bits(matrix)).all())


def _not_8_bits(matrix: torch.Tensor) -> torch.Tensor:
    """The same numbers in a wider dtype: torch can do almost nothing with 8-bit floats."""
    return matrix if matrix.itemsize > 1 else matrix.float()


def _wide_enough(matrix: torch.Tensor) -> torch.Tensor:
    """The same numbers, exactly, as float32 or float64: `variance_sums` reads their bits."""
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _blocks(
    matrix: torch.Tensor, before: torch.Tensor | None, height: int
) -> Iterator[torch.Tensor]:
    """Blocks of rows, in float64, of `matrix` - `before`, or of its transpose if that is taller."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix, before = matrix.T, None if before is None else before.T
    for first in range(0, matrix.shape[0], height):
        block = matrix[first : first + height].double()
        yield block if before is None else block - before[first : first + height].double()
