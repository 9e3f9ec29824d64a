"""Matrices as users have them: NumPy arrays and torch tensors of any real dtype."""

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from dynamics.errors import DynamicsError, one_line

if TYPE_CHECKING:
    import torch

    Array: TypeAlias = np.ndarray | torch.Tensor

_OF_NUMPY = ("float16", "float32", "float64")


def stored_numbers(array: Any) -> tuple[np.ndarray, str]:
    """The numbers of a matrix, in a dtype that NumPy can compute with, and their own dtype.

    Args:
        array: (m, n), a NumPy array (also of the package `ml_dtypes`), a torch tensor on any
            device, or another object with `__array__`, such as an xarray DataArray.

    Returns:
        values: (m, n). bfloat16 and 8-bit floats become float32, which holds them exactly.
            Integers, booleans and longdouble become float64.
        dtype: the dtype whose rounding the numbers have: that of `array`, or "float64" for numbers
            that were converted to it.

    Raises:
        DynamicsError: `array` is not an array, its numbers are not real, it does not have two
            dimensions, it has no entries, or it holds NaN or Inf.

    Example:
        >>> values, dtype = stored_numbers(torch.ones(2, 3, dtype=torch.bfloat16))
        >>> values.dtype.name, dtype
        ('float32', 'bfloat16')
    """
    values, dtype = _from_torch(array) if _is_tensor(array) else _from_numpy(array)
    if values.ndim != 2:
        raise DynamicsError(
            f"A spectrum is that of a matrix (two dimensions); this array has shape {values.shape}."
            " Reshape it, or pass its matrices one by one."
        )
    if values.size == 0:
        raise DynamicsError(f"A matrix of shape {values.shape} has no entries to measure.")
    if not np.isfinite(values).all():
        row, col = np.argwhere(~np.isfinite(values))[0].tolist()
        raise DynamicsError(
            f"The {values.shape[0]} x {values.shape[1]} matrix is not finite: its entry [{row}, "
            f"{col}] is {values[row, col]}. Only a finite matrix has singular values."
        )
    return values, dtype


def _is_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    return torch is not None and isinstance(array, torch.Tensor)


def _from_numpy(array: Any) -> tuple[np.ndarray, str]:
    if not hasattr(array, "__array__"):
        raise DynamicsError(
            "Expected a matrix as a NumPy array or a torch tensor, found "
            f"{_abridged(array)}. {_remedy(array)}"
        )
    values = np.asarray(array)
    dtype, kind = values.dtype.name, values.dtype.kind
    if dtype in _OF_NUMPY:
        return values, dtype
    if kind in "biuf":
        return values.astype(np.float64), "float64"
    if kind == "V" and "float" in dtype:  # of ml_dtypes; NumPy's own void has fields or bytes
        return values.astype(np.float32), dtype
    raise _not_real(dtype)


def _from_torch(tensor: Any) -> tuple[np.ndarray, str]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_complex():
        raise _not_real(dtype)
    known = dtype if tensor.is_floating_point() else "float64"
    try:
        dense = tensor.detach().to_dense()
        if dtype not in _OF_NUMPY:
            dense = dense.float() if dense.is_floating_point() else dense.double()
        return dense.cpu().numpy(), known
    except (RuntimeError, TypeError) as error:  # quantised, packed, without data, of other ranks
        raise DynamicsError(
            f"The numbers of this {dtype} tensor cannot be read ({one_line(error)}): make it an "
            "ordinary float tensor first."
        ) from error


def _not_real(dtype: str) -> DynamicsError:
    return DynamicsError(
        f"An array of dtype {dtype} holds no real numbers to measure: convert it to a float dtype "
        "(of complex numbers, take the real and the imaginary part)."
    )


def _abridged(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _remedy(value: Any) -> str:
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return "To measure a run or a checkpoint, use dynamics.analyze."
    return "Pass its numbers as an array: numpy.asarray(...)."
