"""Paths and matrices that the tests of recordings share."""

import numpy as np

from dynamics.recordings import factor_path, matrix_path

WEIGHT, GRADIENT = matrix_path("weight", "a.weight"), matrix_path("gradient", "a.weight")
LATE_WEIGHT = matrix_path("weight", "late.weight")
FACTOR_A, FACTOR_B = factor_path("a.weight", "A"), factor_path("a.weight", "B")


def matrix(seed, shape=(4, 3)):
    """A float32 matrix of normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def is_same(values, expected):
    """Whether a matrix that was read has the dtype and numbers of the one that was written."""
    return (
        values is not None and values.dtype == expected.dtype and np.array_equal(values, expected)
    )
