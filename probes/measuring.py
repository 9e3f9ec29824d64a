"""Spectra of live matrices, measured where they are: on the device that trains."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from dynamics import spectra
from dynamics.derived import product_roundings
from dynamics.gram import singular_values_from_gram
from dynamics.noise import bound_of_sums
from dynamics.run import Factored, Spectrum
from probes.effective import Factors

_BLOCK = 2**21  # numbers of a block of rows, at least


@torch.no_grad()
def measured(
    matrix: torch.Tensor,
    *,
    before: torch.Tensor | None = None,
    merges: int = 0,
    rank_bound: int | None = None,
    adapter: Factors | None = None,
) -> Spectrum:
    """What `dynamics.spectrum` gives for the stored matrix: float64 singular values, same floors.

    Args:
        matrix: (m, n), of any floating-point dtype: the noise is its rounding.
        before: an earlier matrix to subtract; its rounding counts too.
        merges: how often an adapter was merged in between, see `derived.Difference`.
        rank_bound: the largest rank it can have, where adapters alone moved it.
        adapter: what `matrix` is the sum of, beside its base; the product's rounding counts.

    Returns:
        All NaN, but for sizes and rank bound, where a number is NaN or Inf.
    """
    rows, cols = matrix.shape
    k = min(rows, cols)
    bound = k if rank_bound is None else min(rank_bound, k)
    terms = [(matrix, 1 + merges)] if before is None else [(matrix, 1 + merges), (before, 1)]
    if not all(_is_finite(each) for each, _ in terms):
        return Spectrum(np.full(k, np.nan), rows, cols, bound, math.nan, math.nan)
    s, error = _of_dense(matrix, before)
    row_sums, col_sums = np.zeros(rows), np.zeros(cols)
    for each, count in terms:
        of_rows, of_cols = _variance_sums(each)
        row_sums, col_sums = row_sums + count * of_rows, col_sums + count * of_cols
    if adapter is not None:
        count = product_roundings(adapter.a.shape[0], _name(matrix.dtype))
        of_rows, of_cols = _variance_sums(_product(adapter), matrix.dtype)
        row_sums, col_sums = row_sums + count * of_rows, col_sums + count * of_cols
    return Spectrum(s, rows, cols, bound, error, bound_of_sums(row_sums, col_sums))


def measured_adapter(factors: Factors) -> Spectrum:
    """The spectrum of s·B·A from its factors, which are small and go to the CPU."""
    dtype = _name(factors.a.dtype)
    a, b = (each.detach().cpu().double().numpy() for each in (factors.a, factors.b))
    left, right = (a.T, b.T) if factors.transposed else (b, a)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        rows, cols = left.shape[0], right.shape[1]
        k = min(rows, cols)
        bound = min(a.shape[0], k)
        return Spectrum(np.full(k, np.nan), rows, cols, bound, math.nan, math.nan)
    return spectra.spectrum(Factored(left, right, factors.scaling, dtype, factors.transposed))


def singular_values(matrix: torch.Tensor, before: torch.Tensor | None = None) -> np.ndarray:
    """All singular values of `matrix` - `before` in float64, (min(m, n),), descending.

    torch's own SVD on the device; LAPACK's on the CPU where that does not converge. A matrix 8
    times as tall as wide, or as wide as tall, goes by blocks of rows, as in
    `dynamics.singular_values`, so that an embedding is never whole in float64.
    """
    n, m = sorted(matrix.shape)
    triangle = matrix.new_zeros((0, n), dtype=torch.float64)
    for block in _blocks(matrix, before, max(8 * n, _BLOCK // n)):
        if m <= 8 * n:
            triangle = block  # the whole matrix
        else:
            triangle = torch.linalg.qr(torch.cat([triangle, block]), mode="r").R
    try:
        return torch.linalg.svdvals(triangle).cpu().numpy()
    except torch.linalg.LinAlgError:
        return spectra.singular_values(triangle.cpu().numpy())


def _of_dense(matrix: torch.Tensor, before: torch.Tensor | None) -> tuple[np.ndarray, float]:
    """(s, error) by the rules of `dynamics.spectra`."""
    n, m = sorted(matrix.shape)
    if m * n > spectra.SMALL:
        product = matrix.new_zeros((n, n), dtype=torch.float64)
        for block in _blocks(matrix, before, max(1, _BLOCK // n)):
            product += block.T @ block
        s, error = singular_values_from_gram(product, m, _eigvalsh)
        if error <= spectra.TOLERANCE * s[-1]:
            return s, error
    s = singular_values(matrix, before)
    return s, m * spectra.EPS * float(s[0])


def _eigvalsh(product: torch.Tensor) -> np.ndarray:
    return torch.linalg.eigvalsh(product).cpu().numpy()


def _blocks(
    matrix: torch.Tensor, before: torch.Tensor | None, height: int
) -> Iterator[torch.Tensor]:
    """`matrix` - `before`, or its transpose if that is taller, in float64 blocks of rows."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix, before = matrix.T, None if before is None else before.T
    for first in range(0, matrix.shape[0], height):
        block = matrix[first : first + height].double()
        yield block if before is None else block - before[first : first + height].double()


def _is_finite(matrix: torch.Tensor) -> bool:
    return bool(torch.isfinite(matrix.float() if matrix.itemsize == 1 else matrix).all())


def _product(factors: Factors) -> torch.Tensor:
    product = factors.scaling * (factors.b.double() @ factors.a.double())
    return product.T if factors.transposed else product


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _variance_sums(
    matrix: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The row and column sums of `dynamics.noise.rounding_variance`, on the matrix's device.

    Of rounding to `dtype`; to the matrix's own by default.
    """
    finfo = torch.finfo(dtype or matrix.dtype)
    significand, smallest = -int(math.log2(finfo.eps)), int(math.log2(finfo.smallest_normal))
    m, n = matrix.shape
    rows, cols = (matrix.new_zeros(size, dtype=torch.float64) for size in (m, n))
    height = max(1, _BLOCK // n)
    for first in range(0, m, height):
        values = matrix[first : first + height]
        values = values if values.dtype == torch.float64 else values.float()  # exact
        mantissa, exponent = torch.frexp(values)
        exponent = torch.where(values == 0, smallest, (exponent - 1).clamp(min=smallest))
        ones = torch.ones_like(values, dtype=torch.float64)
        variance = torch.ldexp(ones, exponent - significand).square_()
        halved = (mantissa.abs() == 0.5) & (exponent > smallest)
        variance /= torch.where(halved, 16.0, 12.0).double()
        variance[~values.any(dim=1)] = 0
        variance[:, ~matrix.any(dim=0)] = 0
        rows[first : first + height] = variance.sum(dim=1)
        cols += variance.sum(dim=0)
    return rows.cpu().numpy(), cols.cpu().numpy()
