"""The rounding model against the dtypes' own arithmetic and simulated rounding."""

import numpy as np
import pytest
import torch

from dynamics.errors import DynamicsError
from dynamics.spectra.noise import noise_floor, noise_limit, noise_norm, noise_variance
from dynamics.spectra.rounding import rounding_variance, ulp, variance_sums
from tests.dynamics.spectra.stored_matrices import ROUNDED, rounded, stored_as


@pytest.mark.parametrize("dtype", ROUNDED)
def test_ulp_is_the_distance_to_the_next_number_of_the_dtype(dtype):
    info = torch.finfo(getattr(torch, dtype))
    smallest = info.tiny * info.eps
    np.testing.assert_array_equal(
        ulp(np.array([1.0, -1.5, 2.0, info.tiny, info.tiny / 2, 0.0]), dtype),
        [info.eps, info.eps, 2 * info.eps, smallest, smallest, smallest],
    )


def test_ulp_agrees_with_numpy_for_float64_and_float32():
    values = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-5, 5).repeat(100)
    values[:2] = 0, -1
    np.testing.assert_array_equal(ulp(values, "float64"), np.spacing(np.abs(values)))
    single = values.astype(np.float32)
    np.testing.assert_array_equal(ulp(single, "float32"), np.spacing(np.abs(single)))


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("held", [np.float32, np.float64, np.float16, ">f4"])
def test_the_spacing_is_the_one_that_frexp_gives(dtype, held):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((60, 50)) * rng.choice([1e-40, 1e-30, 1e-4, 1, 100], (60, 1))
    values[rng.random(values.shape) < 0.1] = 0
    values[7] = 2.0 ** rng.integers(-16, 10, 50)
    values = values.astype(held)
    info = torch.finfo(getattr(torch, dtype))
    _, exponent = np.frexp(values)
    smallest = np.log2(info.tiny)
    exponent = np.where(values == 0, smallest, np.maximum(exponent - 1.0, smallest))
    np.testing.assert_array_equal(ulp(values, dtype), info.eps * 2.0**exponent)


@pytest.mark.parametrize("dtype", [*ROUNDED, "int8"])
@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.9, 3.0])
def test_the_rounding_variance_is_that_of_simulated_rounding(dtype, scale):
    values = scale * np.random.default_rng(1).standard_normal((400, 400))
    stored = stored_as(values, dtype)
    error = stored[0] - values
    assert (error**2).mean() == pytest.approx(rounding_variance(*stored).mean(), rel=0.05)


def test_a_power_of_two_is_known_better_than_its_neighbours():
    # float8_e5m2 has 1, 1.25, 1.5, 1.75: numbers in [1 - 1/16, 1 + 1/8] become 1.
    computed = rounding_variance(np.array([[1.0, 1.25]]), "float8_e5m2")
    exact = ((1 / 8) ** 3 + (1 / 16) ** 3) / 3 / (1 / 8 + 1 / 16)
    np.testing.assert_allclose(computed, [[exact, 0.25**2 / 12]], rtol=1e-15)
    smallest = 2.0**-14  # below it the spacing stays
    computed = rounding_variance(np.array([[smallest]]), "float8_e5m2")
    np.testing.assert_allclose(computed, [[(smallest / 4) ** 2 / 12]], rtol=1e-15)


def test_a_zero_may_be_an_underflow_but_rows_and_columns_of_zeros_are_exact():
    values = np.array([[1.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]])
    variance = rounding_variance(values, "float8_e4m3fn")
    assert variance[0, 1] == variance[1, 0] == 2.0**-18 / 12
    assert not variance[2].any()
    assert not variance[:, 2].any()
    zeros = (np.zeros((3, 4)), "bfloat16")
    assert noise_floor(zeros) == noise_norm(noise_variance(zeros)) == noise_limit(zeros) == 0


@pytest.mark.parametrize("scale", [0.1, np.full((3, 1), 0.1), np.full((1, 5), 0.1)])
def test_integers_are_known_to_half_a_step_of_their_scale(scale):
    computed = rounding_variance(np.zeros((3, 5)), "int8", scale)
    np.testing.assert_allclose(computed, np.full((3, 5), 0.01 / 12), rtol=1e-15)
    assert noise_limit((np.zeros((3, 5)), "int8", scale)) == pytest.approx(0.05 * np.sqrt(15))


@pytest.mark.parametrize("shape", [(700, 300), (3, 900), (1, 1)])
def test_row_and_column_sums_are_those_of_the_variances(shape):
    rng = np.random.default_rng(1)
    values = rng.standard_normal(shape) * (rng.random(shape) < 0.9)
    values[:: shape[0]] = values[:, :: shape[1]] = 0
    term = (rounded(values, "bfloat16"), "bfloat16")
    variance = noise_variance(term)
    for computed, axis in zip(variance_sums(term), (1, 0), strict=True):
        np.testing.assert_allclose(computed, variance.sum(axis=axis), rtol=1e-13)


def test_an_unknown_dtype_and_a_missing_scale_are_named():
    with pytest.raises(DynamicsError, match=r"'int4'; known: float64, .*, int8"):
        ulp(np.ones(1), "int4")
    with pytest.raises(DynamicsError, match="'int8' came without a scale; int8 needs one"):
        noise_floor((np.ones((2, 2)), "int8"))
    with pytest.raises(DynamicsError, match="'float32' came with a scale"):
        noise_floor((np.ones((2, 2)), "float32", 0.1))
