"""The rounding model: what is known of the error of each number that is stored in a dtype.

A number is known only to half a unit in the last place (ulp). The error of each entry is taken as
uniform, within half an ulp either way.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
from numpy.typing import ArrayLike

from dynamics.errors import DynamicsError
from dynamics.runs.code_errors import CodeErrors

Scale = ArrayLike | CodeErrors
# (values (m, n), dtype), and the scale of integers that were multiplied by one, or what is known of
# the errors of quantised numbers
Stored = tuple[np.ndarray, str] | tuple[np.ndarray, str, Scale]

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

_BLOCK = 2**17  # entries worked on at a time: they and the intermediates fit into caches


def precision(dtype: str) -> tuple[int, int]:
    """(bits of the stored significand, exponent of the smallest normal number) of a float dtype.

    Raises:
        DynamicsError: `dtype` has no rounding model here.

    Example:
        >>> precision("bfloat16")
        (7, -126)
    """
    if dtype not in _PRECISION:
        raise DynamicsError(
            f"No rounding model for matrices stored as {dtype!r}; "
            f"known: {', '.join([*_PRECISION, _SCALED])}."
        )
    return _PRECISION[dtype]


def ulp(values: np.ndarray, dtype: str) -> np.ndarray:
    """The distance from each |value| to the next larger number of `dtype`.

    It is 2^(e - p) for 2^e <= |x| < 2^(e+1) and p significand bits, where e is at least that of the
    smallest normal number. For zero it is the smallest positive number.

    Args:
        values: numbers of `dtype`, in any float dtype that holds them exactly.
        dtype: a float dtype.

    Returns:
        float64, the shape of `values`.

    Raises:
        DynamicsError: `dtype` has no rounding model here.

    Example:
        >>> ulp(np.array([1.0, 3.0, 4.0]), "float8_e4m3fn")  # 3 significand bits
        array([0.125, 0.25 , 0.5  ])
    """
    significand, smallest = precision(dtype)
    binade = np.maximum(_binade(values, dtype), 2.0**smallest)
    return np.multiply(binade, 2.0**-significand, dtype=np.float64)


def _binade(values: ArrayLike, dtype: str) -> np.ndarray:
    """2^e of each 2^e <= |x| < 2^(e+1); 0 for zeros and numbers below the smallest normal one.

    These are the bits of the exponent alone, in the width of the values: frexp takes ten times
    longer.
    """
    given = np.asarray(values)
    narrow = given.dtype.itemsize <= 4 and given.dtype.kind == "f" and dtype != "float64"
    given = given.astype(np.float32 if narrow else np.float64, copy=False)  # in native order
    bits, exponent = (np.uint32, 0x7F800000) if narrow else (np.uint64, 0x7FF0000000000000)
    masked: np.ndarray = np.bitwise_and(given.view(bits), bits(exponent))
    return masked.view(given.dtype)


def rounding_variance(values: np.ndarray, dtype: str, scale: Scale | None = None) -> np.ndarray:
    """The mean square of each entry's rounding error.

    It is ulp²/12, of errors that are uniform within half an ulp either way. For powers of two it is
    ulp²/16, because the spacing halves below them: ∫x² over [-ulp/4, ulp/2]. A zero may be an
    underflow and has the error of the smallest numbers; but in a row or column of zeros (padding, B
    of a fresh adapter) it is exact. For int8 it is scale²/12. For other quantised numbers it is
    what `CodeErrors` says, whatever the dtype.

    Args:
        values: (m, n), the numbers themselves; for quantised ones, the dequantised ones.
        dtype: a float dtype, or "int8".
        scale: for int8, the value of one step of the integers: a number, (m, 1) or (1, n). For
            other quantised numbers, their `CodeErrors`.

    Returns:
        (m, n) float64.

    Raises:
        DynamicsError: `dtype` has no rounding model, int8 comes without a scale, or another dtype
            comes with one.

    Example:
        >>> variance = rounding_variance(np.array([[1.5, 1.0]]), "float16")  # an ulp of 2⁻¹⁰
        >>> (variance * 2**20).round(4)  # 1/12 and, for a power of two, 1/16
        array([[0.0833, 0.0625]])
    """
    return _rounding_variance(values, dtype, scale, partial(_nonzero_columns, values))


def _rounding_variance(
    values: np.ndarray, dtype: str, scale: Scale | None, columns: Callable[[], np.ndarray]
) -> np.ndarray:
    # `columns()` says which columns of the whole matrix hold anything but zeros, (n,).
    if isinstance(scale, CodeErrors):
        variance = np.broadcast_to(scale.variance(), values.shape).copy()
        _clear_exact_zeros(variance, values, columns)
        return variance
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


def variance_sums(term: Stored) -> tuple[np.ndarray, np.ndarray]:
    """The row sums and column sums of `rounding_variance`: all that `noise_floor` needs.

    They are added up from blocks of rows, so the variances of an embedding are never held whole.

    Args:
        term: (values, dtype), (values, "int8", scale) or (values, dtype, errors), values (m, n).

    Returns:
        (m,) and (n,) float64.

    Example:
        >>> rows, cols = variance_sums((np.full((2, 3), 1.5), "float16"))
        >>> (rows * 12 * 2**20).round(9), (cols * 12 * 2**20).round(9)  # ulp² = 2⁻²⁰
        (array([3., 3.]), array([2., 2., 2.]))
    """
    values, dtype, *given = term
    m, n = values.shape
    columns = cache(partial(_nonzero_columns, values))
    rows, cols = np.zeros(m), np.zeros(n)
    height = max(1, _BLOCK // max(n, 1))
    for first in range(0, m, height):
        block = slice(first, first + height)
        scale: Scale | None = None
        if given:
            of_all = given[0]
            of_all = of_all if isinstance(of_all, CodeErrors) else np.broadcast_to(of_all, (m, n))
            scale = of_all[block]
        variance = _rounding_variance(values[block], dtype, scale, columns)
        rows[block] = variance.sum(axis=1)
        cols += variance.sum(axis=0)
    return rows, cols


def spacing(values: np.ndarray, dtype: str, scale: Scale | None = None) -> np.ndarray:
    """The widths of the intervals whose numbers are all stored as one number, (m, n) float64.

    It is `ulp`, 0 in rows and columns of zeros, and the scale for int8. No rounding error exceeds
    half of it. The arguments and errors are those of `rounding_variance`.

    Example:
        >>> spacing(np.array([[1.5, 0.0], [0.0, 0.0]]), "float16") * 2**10
        array([[1., 0.],
               [0., 0.]])
    """
    return _spacing(values, dtype, scale, partial(_nonzero_columns, values))


def _spacing(
    values: np.ndarray, dtype: str, scale: Scale | None, columns: Callable[[], np.ndarray]
) -> np.ndarray:
    if isinstance(scale, CodeErrors):
        spacing = np.broadcast_to(scale.spacing(), values.shape).copy()
        _clear_exact_zeros(spacing, values, columns)
        return spacing
    if (dtype == _SCALED) != (scale is not None):
        raise DynamicsError(
            f"A matrix stored as {dtype!r} came {'with' if scale is not None else 'without'} a "
            f"scale; {_SCALED} needs one (a number, (rows, 1) or (1, cols)), others take none."
        )
    if scale is not None:
        return np.broadcast_to(np.abs(scale, dtype=np.float64), values.shape).copy()
    spacing = ulp(values, dtype)
    _clear_exact_zeros(spacing, values, columns)
    return spacing


def _nonzero_columns(values: np.ndarray) -> np.ndarray:
    return np.any(values, axis=0)


def _clear_exact_zeros(
    errors: np.ndarray, values: np.ndarray, columns: Callable[[], np.ndarray]
) -> None:
    """Set the errors in rows and columns of zeros to 0; `columns()` (n,) says which are not."""
    if not np.all(values):
        errors[~np.any(values, axis=1)] = 0
        errors[:, ~columns()] = 0
