"""Noise floors: how large a singular value rounding alone can produce.

A number stored in a dtype is known to half a unit in the last place (ulp) only. The rounding
errors of a matrix are themselves a matrix E, and by Weyl's inequality |s_i(W + E) - s_i(W)| <= ‖E‖
its spectral norm is the level below which a singular value says nothing about the model.

The errors are taken as independent, uniform within half an ulp either way. Three numbers follow:

    noise_norm         E‖E‖, the expectation
    noise_norm_bound   exceeded by one matrix in a thousand: `noise_floor` is this one
    noise_limit        what no rounding whatever can exceed; 2 to 50 times larger

Independence fails where stored values repeat a pattern: a rank-one product in an 8-bit float has
up to twice the noise of the bound, and numbers that fill no more than one ulp are not spread
evenly within it. Nothing short of `noise_limit` covers constant matrices.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import numpy as np
from numpy.typing import ArrayLike

from dynamics.errors import DynamicsError
from dynamics.spectra.random_matrices import TRACY_WIDOM_999, TRACY_WIDOM_MEAN
from dynamics.spectra.variance_profiles import edge_of_profile

# (values (m, n), dtype), and the scale where integers were multiplied by one
Stored = tuple[np.ndarray, str] | tuple[np.ndarray, str, ArrayLike]

# dtype -> (bits of the stored significand, exponent of the smallest normal number)
_PRECISION: dict[str, tuple[int, int]] = {
    "float64": (52, -1022),
    "float32": (23, -126),
    "float16": (10, -14),
    "bfloat16": (7, -126),
    "float8_e4m3fn": (3, -6),
    "float8_e5m2": (2, -14),
}
_SCALED = "int8"

_DRAWS = 4
_BLOCK = 2**17  # numbers worked on at a time: they and their intermediates fit into caches


def precision(dtype: str) -> tuple[int, int]:
    """(bits of the stored significand, exponent of the smallest normal number).

    Raises:
        DynamicsError: `dtype` is no floating-point dtype known here.
    """
    if dtype not in _PRECISION:
        raise DynamicsError(
            f"No rounding model for matrices stored as {dtype!r}; "
            f"known: {', '.join([*_PRECISION, _SCALED])}."
        )
    return _PRECISION[dtype]


def ulp(values: np.ndarray, dtype: str) -> np.ndarray:
    """The spacing of `dtype`'s numbers above each |value|, float64, the shape of `values`.

    2^(e - p) for 2^e <= |x| < 2^(e+1) and p significand bits, e no smaller than that of the
    smallest normal number; for zero the smallest number above it.

    Raises:
        DynamicsError: `dtype` is no floating-point dtype known here.
    """
    significand, smallest = precision(dtype)
    binade = np.maximum(_binade(values, dtype), 2.0**smallest)
    return np.multiply(binade, 2.0**-significand, dtype=np.float64)


def _binade(values: ArrayLike, dtype: str) -> np.ndarray:
    """2^e of each 2^e <= |x| < 2^(e+1), 0 for zeros and numbers below the smallest normal one.

    The bits of the exponent alone, in the width that the values have: frexp takes ten times longer.
    """
    given = np.asarray(values)
    narrow = given.dtype.itemsize <= 4 and given.dtype.kind == "f" and dtype != "float64"
    given = given.astype(np.float32 if narrow else np.float64, copy=False)  # in native order
    bits, exponent = (np.uint32, 0x7F800000) if narrow else (np.uint64, 0x7FF0000000000000)
    masked: np.ndarray = np.bitwise_and(given.view(bits), bits(exponent))
    return masked.view(given.dtype)


def rounding_variance(values: np.ndarray, dtype: str, scale: ArrayLike | None = None) -> np.ndarray:
    """Mean square of each entry's rounding error, float64, (m, n) like `values`.

    ulp²/12, uniform within half an ulp either way; ulp²/16 for powers of two, below which the
    spacing halves: ∫x² over [-ulp/4, ulp/2]. A zero may be an underflow and has the error of the
    smallest numbers, but in a row or column of zeros (padding, B of a fresh adapter) it is exact.
    int8: scale²/12.

    Args:
        values: (m, n), the numbers themselves, for int8 dequantised.
        dtype: a floating-point dtype, or "int8".
        scale: of int8, what one step of the integers is worth: a number, (m, 1) or (1, n).

    Raises:
        DynamicsError: an unknown dtype, int8 without its scale, or a scale with another dtype.
    """
    return _rounding_variance(values, dtype, scale, partial(_nonzero_columns, values))


def _rounding_variance(
    values: np.ndarray, dtype: str, scale: ArrayLike | None, columns: Callable[[], np.ndarray]
) -> np.ndarray:
    # `columns` says which ones of the whole matrix hold anything but zeros, (n,).
    if dtype == _SCALED or scale is not None:
        return np.square(_spacing(values, dtype, scale, columns)) / 12
    significand, smallest = precision(dtype)
    binade = _binade(values, dtype)
    variance = np.square(np.maximum(binade, 2.0**smallest), dtype=np.float64)
    variance *= 4.0**-significand / 12
    halved = binade == np.abs(values)  # powers of two, and zeros
    if halved.any():
        variance[halved & (binade > 2.0**smallest)] *= 0.75  # ulp²/16
        _clear_exact_zeros(variance, values, columns)
    return variance


def noise_variance(*stored: Stored) -> np.ndarray:
    """Summed `rounding_variance` of the terms of a sum or difference, (m, n).

    Their errors are independent. A matrix that was rounded K times, once at each merge, is K
    terms; equal terms (the same tuple) cost the work of one.
    """
    counts = Counter(map(id, stored))
    total: np.ndarray | None = None
    for term in {id(each): each for each in stored}.values():
        variance = rounding_variance(*term)
        variance *= counts[id(term)]
        total = variance if total is None else np.add(total, variance, out=total)
    assert total is not None, "a sum has terms"
    return total


def noise_norm(variance: np.ndarray) -> float:
    """Expected spectral norm of independent, centred noise with these entry variances (m, n).

    √(λ₊ - 1.2065γ): the edge λ₊ of the limiting spectrum of EEᵀ and the mean of the Tracy-Widom
    law on its scale γ, both of the variances r_i c_j / Σv that have the row sums r and column sums
    c of `variance` (`edge_of_profile`). For equal variances λ₊ = σ²(√m + √n)². At least 0.87 times
    the norm of the largest row or column, which alone has up to that.

    Against simulated rounding of Gaussian matrices, 32 x 32 to 2048 x 2048, it is 0.99 to 1.07
    times the mean; of graded ones (rows and columns over 2 or 3 decades) 0.99 to 1.15; of one row
    100 times larger than the rest up to 1.27.
    """
    rows, cols = variance.sum(axis=1), variance.sum(axis=0)
    if not rows.any():
        return 0.0
    edge, scale = edge_of_profile(rows, cols)
    single = 0.75 * max(rows.max(), cols.max())  # the mean of |x| for uniform x is σ√3/2
    return float(np.sqrt(max(edge + TRACY_WIDOM_MEAN * scale, single)))


def noise_norm_bound(variance: np.ndarray) -> float:
    """What the spectral norm of such noise exceeds with a probability of about 1/1000.

    The larger of √(λ₊ + 3.27γ), the 99.9 % point of the Tracy-Widom law, and

        √(max_i Σ_j v_ij) + √(max_j Σ_i v_ij),

    the leading term of Bandeira & van Handel 2016 (Ann. Probab. 44(4), theorem 3.1), which also
    holds where variances are no products of a row's and a column's. A high-probability statement,
    not a certain one: `noise_limit` is that. 1.01 to 1.5 times the norm for Gaussian matrices, up
    to 3.3 times for graded ones.
    """
    return bound_of_sums(variance.sum(axis=1), variance.sum(axis=0))


def bound_of_sums(rows: np.ndarray, cols: np.ndarray) -> float:
    """`noise_norm_bound` of variances with these row sums (m,) and column sums (n,)."""
    if not rows.any():
        return 0.0
    edge, scale = edge_of_profile(rows, cols)
    flat = np.sqrt(edge + TRACY_WIDOM_999 * scale)
    return float(max(flat, np.sqrt(rows.max()) + np.sqrt(cols.max())))


def noise_limit(*stored: Stored) -> float:
    """What the spectral norm of the rounding of a sum or difference can never exceed.

    √(max_i Σ_j h_ij · max_j Σ_i h_ij) with h the sum of the terms' largest errors, ulp/2 or
    scale/2: ‖E‖₂² <= ‖E‖₁‖E‖_∞ for any signs. About √n times the bound: it is for proofs.
    """
    half = np.zeros(stored[0][0].shape)
    for term in stored:
        values, dtype, *given = term
        columns = partial(_nonzero_columns, values)
        half += _spacing(values, dtype, given[0] if given else None, columns) / 2
    return float(np.sqrt(half.sum(axis=1).max() * half.sum(axis=0).max()))


def noise_floor(
    *stored: Stored, sums: Callable[[Stored], tuple[np.ndarray, np.ndarray]] | None = None
) -> float:
    """What a singular value of a sum or difference of stored matrices must exceed.

    `noise_norm_bound` of `noise_variance`. Not the expectation: every second matrix that is nothing
    but rounding would exceed it.

    Args:
        stored: (values, dtype) or (values, "int8", scale) of each term, values (m, n) alike. One
            term for a matrix as it is, two for the difference of two checkpoints.
        sums: `variance_sums`, or what remembers them: a checkpoint is part of many differences.
    """
    sums = sums or variance_sums
    counts = Counter(map(id, stored))
    rows: np.ndarray | float = 0.0
    cols: np.ndarray | float = 0.0
    for term in {id(each): each for each in stored}.values():
        of_rows, of_cols = sums(term)
        rows, cols = rows + counts[id(term)] * of_rows, cols + counts[id(term)] * of_cols
    return bound_of_sums(np.asarray(rows), np.asarray(cols))


def variance_sums(term: Stored) -> tuple[np.ndarray, np.ndarray]:
    """The row sums (m,) and column sums (n,) of `rounding_variance`, all that `noise_floor` needs.

    By blocks of rows: of an embedding, neither the variances nor their intermediates are ever held
    whole.
    """
    values, dtype, *given = term
    m, n = values.shape
    columns = cache(partial(_nonzero_columns, values))
    rows, cols = np.zeros(m), np.zeros(n)
    height = max(1, _BLOCK // max(n, 1))
    for first in range(0, m, height):
        block = slice(first, first + height)
        scale = np.broadcast_to(given[0], (m, n))[block] if given else None
        variance = _rounding_variance(values[block], dtype, scale, columns)
        rows[block] = variance.sum(axis=1)
        cols += variance.sum(axis=0)
    return rows, cols


def product_noise_norm(left: Stored, right: Stored) -> float:
    """Expected ‖(L + δL)(R + δR) - LR‖ = ‖δL·R + L·δR + δL·δR‖, for L (m, r) and R (r, n).

    The two first-order terms meet in r of the m and r of the n directions only: no profile of
    variances describes that, so it is the mean of 4 simulated roundings (seeded, each within a few
    per cent of the mean), measured as [δL, L + δL] @ [R; δR] without forming an (m, n) matrix.
    """
    rng = np.random.default_rng(0)
    widths = [np.sqrt(3 * rounding_variance(*factor)) for factor in (left, right)]
    norms = []
    for _ in range(_DRAWS):
        d_left, d_right = (width * rng.uniform(-1, 1, width.shape) for width in widths)
        _, r1 = np.linalg.qr(np.hstack([d_left, left[0] + d_left]))
        _, r2 = np.linalg.qr(np.vstack([right[0], d_right]).T)
        norms.append(np.linalg.norm(r1 @ r2.T, 2))
    return float(np.mean(norms))


def product_noise_bound(
    left: Stored, right: Stored, norms: tuple[float, float] | None = None
) -> float:
    """‖δL‖‖R‖ + ‖L‖‖δR‖ + ‖δL‖‖δR‖ with `noise_floor` for ‖δL‖ and ‖δR‖.

    It holds whenever those two hold. About twice the expectation where r is small, because the
    first two terms then lie in different directions.

    Args:
        left: (m, r) and its dtype.
        right: (r, n), likewise.
        norms: ‖L‖ and ‖R‖, if they are known.
    """
    norm_left, norm_right = norms or (_norm(left[0]), _norm(right[0]))
    d_left, d_right = noise_floor(left), noise_floor(right)
    return float(d_left * norm_right + norm_left * d_right + d_left * d_right)


def _norm(factor: np.ndarray) -> float:
    tall = factor if factor.shape[0] > factor.shape[1] else factor.T
    return float(np.linalg.norm(np.linalg.qr(tall.astype(np.float64), mode="r"), 2))


def _spacing(
    values: np.ndarray, dtype: str, scale: ArrayLike | None, columns: Callable[[], np.ndarray]
) -> np.ndarray:
    # The widths of the intervals whose numbers are stored alike, (m, n).
    if (dtype == _SCALED) != (scale is not None):
        raise DynamicsError(
            f"A matrix stored as {dtype!r} came {'with' if scale is not None else 'without'} a "
            f"scale; {_SCALED} has one (a number, (rows, 1) or (1, cols)), other dtypes have none."
        )
    if scale is not None:
        return np.broadcast_to(np.abs(scale, dtype=np.float64), values.shape).copy()
    spacing = ulp(values, dtype)
    _clear_exact_zeros(spacing, values, columns)
    return spacing


def _nonzero_columns(values: np.ndarray) -> np.ndarray:
    return np.any(values, axis=0)


def _clear_exact_zeros(
    found: np.ndarray, values: np.ndarray, columns: Callable[[], np.ndarray]
) -> None:
    """Set to 0 what belongs to rows and columns of zeros; `columns()` (n,) says which are not."""
    if not np.all(values):
        found[~np.any(values, axis=1)] = 0
        found[:, ~columns()] = 0
