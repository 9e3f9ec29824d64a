"""Spectra of matrices of a live model, measured on the device that trains."""

import math

import numpy as np
import torch

from dynamics.runs.differences import product_roundings, rounded_products, training_roundings
from dynamics.runs.run import Factored, Spectrum
from dynamics.spectra import spectrum
from dynamics.spectra.noise import bound_of_sums
from dynamics.spectra.torch_spectrum import is_finite, of_dense, variance_sums
from probes.model.weights import Factors


@torch.no_grad()
def live_spectrum(
    matrix: torch.Tensor,
    *,
    before: torch.Tensor | None = None,
    merges: int = 0,
    rank_bound: int | None = None,
    adapters: tuple[Factors | None, Factors | None] = (None, None),
    trained_steps: int = 0,
) -> Spectrum:
    """What `dynamics.spectrum` gives for the stored matrix: the same singular values and floors.

    Args:
        matrix: (m, n), of any floating-point dtype; the noise is the rounding to this dtype.
        before: an earlier matrix to subtract; its rounding counts too.
        merges: how often an adapter was merged in between, see `differences.Difference`.
        rank_bound: the largest rank that the difference can have, where only adapters changed it.
        adapters: those that are part of `matrix` and of `before`, see `differences.Difference`.
        trained_steps: how many optimizer steps trained the matrix in place since `before`.

    Returns:
        float64 singular values with their bounds. If a number is NaN or Inf, everything except the
        sizes and the rank bound is NaN.
    """
    try:
        return _spectrum(matrix, before, merges, rank_bound, adapters, trained_steps)
    except torch.OutOfMemoryError:  # training uses the rest of the GPU, and must go on
        matrix, before = matrix.cpu(), None if before is None else before.cpu()
        return _spectrum(matrix, before, merges, rank_bound, adapters, trained_steps)


def _spectrum(
    matrix: torch.Tensor,
    before: torch.Tensor | None,
    merges: int,
    rank_bound: int | None,
    adapters: tuple[Factors | None, Factors | None],
    trained_steps: int,
) -> Spectrum:
    rows, cols = matrix.shape
    k = min(rows, cols)
    bound = k if rank_bound is None else min(rank_bound, k)
    terms = [(matrix, 1 + merges)] if before is None else [(matrix, 1 + merges), (before, 1)]
    if not all(is_finite(each) for each, _ in terms):
        return Spectrum(np.full(k, np.nan), rows, cols, bound, math.nan, math.nan)
    s, error = of_dense(matrix, before)
    row_sums, col_sums = np.zeros(rows), np.zeros(cols)
    for each, count in terms:
        of_rows, of_cols = variance_sums(each, _name(each.dtype))
        row_sums, col_sums = row_sums + count * of_rows, col_sums + count * of_cols
    adapter = adapters[0] or adapters[1]
    if adapter is not None and before is not None:
        products = [each and _product(each, matrix.device) for each in adapters]
        change = matrix.double() - before.double()
        rounded = rounded_products(change, *products, merges=merges)
        dtype = _name(matrix.dtype)
        count = product_roundings(adapter.a.shape[0], adapter.scaling, dtype)
        of_rows, of_cols = variance_sums(rounded, dtype)
        row_sums, col_sums = row_sums + count * of_rows, col_sums + count * of_cols
    noise, storage = bound_of_sums(row_sums, col_sums), None
    dtype, count = training_roundings(_name(matrix.dtype), trained_steps)
    if count > 0:
        of_rows, of_cols = variance_sums(matrix, dtype)
        storage = noise
        noise = bound_of_sums(row_sums + count * of_rows, col_sums + count * of_cols)
    return Spectrum(s, rows, cols, bound, error, noise, storage)


def adapter_spectrum(factors: Factors) -> Spectrum:
    """The spectrum of s·B·A from its factors, on the CPU, because they are small."""
    dtype = _name(factors.a.dtype)
    a, b = (each.detach().cpu().double().numpy() for each in (factors.a, factors.b))
    left, right = (a.T, b.T) if factors.transposed else (b, a)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        rows, cols = left.shape[0], right.shape[1]
        k = min(rows, cols)
        bound = min(a.shape[0], k)
        return Spectrum(np.full(k, np.nan), rows, cols, bound, math.nan, math.nan)
    return spectrum.spectrum(Factored(left, right, factors.scaling, dtype, factors.transposed))


def _product(factors: Factors, device: torch.device) -> torch.Tensor:
    a, b = (each.to(device).double() for each in (factors.a, factors.b))
    product = factors.scaling * (b @ a)
    return product.T if factors.transposed else product


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
