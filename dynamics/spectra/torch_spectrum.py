"""What `numpy_spectrum.py` and `noise.py` compute, of a torch tensor, on the device that it is on.

For matrices that are there already (`probes.records.live_spectra`) and for those that a GPU
measures faster (`gpu_backend.py`). The same rules and bounds; last digits differ from NumPy's.
"""

from collections.abc import Iterator

import numpy as np
import torch

from dynamics.spectra import numpy_spectrum
from dynamics.spectra.gram import singular_values_from_gram
from dynamics.spectra.noise import precision

_BLOCK = 2**21  # numbers of a block of rows, at least
# Products that are summed up one after the other, at most. Where they are alike (a constant matrix)
# so are their roundings, u·σ₁² times half of this, while the bound of `gram.py` grows with √m only:
# it is 362·u·σ₁² for m = 512. MKL sums up thousands, 1.6 times the bound at 50304 x 32.
_ROWS = 512


@torch.no_grad()
def of_dense(matrix: torch.Tensor, before: torch.Tensor | None = None) -> tuple[np.ndarray, float]:
    """The singular values of `matrix` - `before` and the bound on their error, as `spectrum` has.

    Args:
        matrix: (m, n), of any floating-point dtype, finite.
        before: likewise, on the same device; nothing by default.

    Returns:
        s: (min(m, n),) float64, descending.
        error: no singular value's error exceeds it.
    """
    n, m = sorted(matrix.shape)
    if m * n > numpy_spectrum.SMALL:
        s, error = singular_values_from_gram(gram(matrix, before), m, eigvalsh)
        if error <= numpy_spectrum.TOLERANCE * s[-1]:
            return s, error
        s = singular_values(matrix, before)
    else:  # a GPU takes longer for it
        (whole,) = _blocks(matrix, before, m)
        s = numpy_spectrum.singular_values(whole.cpu().numpy())
    return s, m * numpy_spectrum.EPS * float(s[0])


def gram(matrix: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """`gram.gram` of `matrix` - `before`: (n, n) float64, n the smaller side."""
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
    """The eigenvalues of a symmetric (n, n) float64 tensor, ascending."""
    return torch.linalg.eigvalsh(product).cpu().numpy()


@torch.no_grad()
def singular_values(matrix: torch.Tensor, before: torch.Tensor | None = None) -> np.ndarray:
    """All singular values of `matrix` - `before` in float64, (min(m, n),), descending.

    Each is within m·2⁻⁵²·σ₁, m the longer side, of the exact one. LAPACK's gesdd on the CPU. On a
    GPU those of an (n, n) R are the upper half of the eigenvalues of [[0, Rᵀ], [R, 0]]: 1.7 to 2.4
    times as fast there as cuSOLVER's gesvd, while its Jacobi method, torch's choice, has errors of
    2.3 times the above. A matrix 8 times as tall as wide, or as wide as tall, goes by blocks of
    rows, as in `dynamics.singular_values`, so that an embedding is never whole in float64.
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
        both[n:, :n] = triangle  # only what is below the diagonal is read
        return np.maximum(eigvalsh(both)[: n - 1 : -1], 0.0)
    except torch.linalg.LinAlgError:  # no convergence
        return numpy_spectrum.singular_values(triangle.cpu().numpy())


@torch.no_grad()
def variance_sums(matrix: torch.Tensor, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """`noise.variance_sums` of (m, n) numbers stored as `dtype`: (m,) and (n,) float64.

    Raises:
        DynamicsError: an unknown dtype.
    """
    significand, smallest = precision(dtype)
    m, n = matrix.shape
    rows, cols = (matrix.new_zeros(size, dtype=torch.float64) for size in (m, n))
    columns = _not_8_bits(matrix).any(dim=0)
    height = max(1, _BLOCK // n)
    for first in range(0, m, height):
        values = _wide_enough(matrix[first : first + height])
        # As in `noise`: 2^e of each number are the bits of its exponent alone.
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
    """Whether all numbers are."""
    return bool(torch.isfinite(_not_8_bits(matrix)).all())


def _not_8_bits(matrix: torch.Tensor) -> torch.Tensor:
    """The same numbers: torch has next to nothing for floats of 8 bits."""
    return matrix if matrix.itemsize > 1 else matrix.float()


def _wide_enough(matrix: torch.Tensor) -> torch.Tensor:
    """The same numbers, exactly, as float32 or float64, whose bits `variance_sums` knows."""
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _blocks(
    matrix: torch.Tensor, before: torch.Tensor | None, height: int
) -> Iterator[torch.Tensor]:
    """`matrix` - `before`, or its transpose if that is taller, in float64 blocks of rows."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix, before = matrix.T, None if before is None else before.T
    for first in range(0, matrix.shape[0], height):
        block = matrix[first : first + height].double()
        yield block if before is None else block - before[first : first + height].double()
