"""Two routines of SciPy's LAPACK, called without Python's lock.

SciPy's own wrappers keep the lock while they compute: 0.3 s for a 1024 x 1024 matrix, 20 s for a
4096 x 4096 one. A training in another thread would stand still for as long. `ctypes` gives the lock
away. The functions are the same, of the same library, so their results are the same bits.
"""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from scipy.linalg import cython_lapack


def tridiagonal(symmetric: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """LAPACK's sytrd: the tridiagonal matrix with the same eigenvalues.

    Args:
        symmetric: (n, n) float64; it is not changed.
        width: columns of a panel, which decides the size of the workspace.

    Returns:
        The diagonal, (n,), and what is beside it, (n - 1,).
    """
    n = len(symmetric)
    copy = np.array(symmetric.T, order="F")
    diagonal, beside, tau, work = (np.empty(size) for size in (n, n - 1, n - 1, n * width))
    info = ctypes.c_int()
    _routine("dsytrd")(
        ctypes.c_char_p(b"L"), _int(n), _of(copy), _int(n), _of(diagonal), _of(beside), _of(tau),
        _of(work), _int(work.size), ctypes.byref(info),
    )  # fmt: skip
    return diagonal, beside


def eigenvalues_of_tridiagonal(diagonal: np.ndarray, beside: np.ndarray) -> np.ndarray:
    """LAPACK's sterf: (n,) float64, ascending. Both arguments are overwritten.

    Raises:
        LinAlgError: the eigenvalues did not converge.
    """
    info = ctypes.c_int()
    _routine("dsterf")(_int(len(diagonal)), _of(diagonal), _of(beside), ctypes.byref(info))
    if info.value != 0:
        raise np.linalg.LinAlgError("Eigenvalues did not converge")
    return diagonal


@cache
def _routine(name: str) -> Any:
    capsule = cython_lapack.__pyx_capi__[name]
    name_of, pointer_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    address = pointer_of(capsule, name_of(capsule))
    return ctypes.CFUNCTYPE(None)(address)


def _int(value: int) -> Any:
    return ctypes.byref(ctypes.c_int(value))


def _of(array: np.ndarray) -> Any:
    return ctypes.c_void_p(array.ctypes.data)
