"""Singular values from the Gram matrix: the bound on their error holds, and what falls back."""

import tracemalloc
import warnings
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch

from dynamics.metrics import METRICS, condition_number_raw, effective_rank, numerical_rank
from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense
from dynamics.spectra.gram import eigvalsh, gram, gram_error, singular_values_from_gram
from dynamics.spectra.numpy_spectrum import EPS, TOLERANCE, singular_values
from dynamics.spectra.spectrum import spectrum
from tests.dynamics.spectra.hard_matrices import HARD, geometric, reference

SHAPES = [(96, 96), (384, 96), (128, 384), (256, 256), (384, 384), (4000, 64)]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_error_bound_holds(name, shape, seed):
    matrix = HARD[name](np.random.default_rng(seed), *shape)
    exact = reference(matrix)
    computed, error = singular_values_from_gram(gram(matrix), max(shape))
    assert np.abs(computed**2 - exact**2).max() <= gram_error(computed[0] ** 2, max(shape))
    assert np.abs(computed - exact).max() <= error
    # And it is near: hundreds of times the true error would cost needless fallbacks.
    measured = spectrum(Dense(matrix, "float64"))
    assert np.abs(measured.s - exact).max() <= measured.error
    assert measured.error <= max(TOLERANCE * measured.s[-1], max(shape) * EPS * measured.s[0])


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 3, 40, 999, 1000])
@pytest.mark.parametrize("scale", [1e-99, 1.0, 1e99])
def test_eigenvalues_are_those_of_lapacks_driver(n, scale):
    matrix = scale * np.random.default_rng(n).standard_normal((n + 3, n))
    product = gram(matrix)
    before = product.copy()
    exact = scipy.linalg.eigh(product, eigvals_only=True, driver="evr")
    assert np.abs(eigvalsh(product) - exact).max() <= 1e-13 * exact[-1]
    np.testing.assert_array_equal(product, before)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1.1, np.pi, float(np.float32(0.1))])
@pytest.mark.parametrize("shape", [*SHAPES, (1536, 384), (50304, 32)])
def test_the_error_bound_holds_where_all_sums_round_alike(value, shape):
    computed, _ = singular_values_from_gram(gram(np.full(shape, value)), max(shape))
    exact = np.zeros(min(shape))
    exact[0] = value**2 * shape[0] * shape[1]
    assert np.abs(computed**2 - exact).max() <= gram_error(exact[0], max(shape))


@pytest.mark.slow
def test_the_error_bound_holds_against_fifty_digits():
    rng = np.random.default_rng(0)
    matrix = geometric(rng, 40, 24, 1e-6)
    with mpmath.workdps(50):
        exact = mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False)
        exact = np.array([float(each) for each in exact])
    computed, error = singular_values_from_gram(gram(matrix), 40)
    assert np.abs(computed - exact).max() <= error
    assert np.abs(singular_values(matrix) - exact).max() <= 40 * EPS * exact[0]
    each = gram_error(exact[0] ** 2, 40) / exact
    assert (np.abs(computed - exact) <= each).all()


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_metric_is_within_the_tolerance_of_its_value_from_a_dense_svd(name, dtype):
    matrix = HARD[name](np.random.default_rng(2), 384, 256)
    matrix = torch.from_numpy(matrix).to(getattr(torch, dtype)).double().numpy()
    computed = spectrum(Dense(matrix, dtype))
    exact = reference(matrix)
    np.testing.assert_allclose(effective_rank(computed.s), effective_rank(exact), rtol=1e-6)
    for metric in ("stable_rank", "nuclear_norm", "frobenius_norm", "top_16_energy"):
        dense = replace(computed, s=exact)
        measured, expected = (METRICS[metric].function(each) for each in (computed, dense))
        np.testing.assert_allclose(measured, expected, rtol=1e-8)
    sure = np.abs(exact - computed.floor) > computed.error
    assert np.array_equal((computed.s > computed.floor)[sure], (exact > computed.floor)[sure])
    raw = condition_number_raw(computed.s, computed.error)
    if np.isfinite(raw):
        expected = exact[0] / exact[-1]
        assert raw == pytest.approx(expected, rel=max(TOLERANCE, 2 * computed.error / exact[-1]))
    else:
        assert exact[-1] <= 2 * 384 * EPS * exact[0]


@pytest.mark.parametrize("name", ["rank 8", "geometric decay to 1e-12", "a row and a column twice"])
def test_what_the_gram_matrix_cannot_tell_is_measured_by_a_dense_svd(name):
    matrix = HARD[name](np.random.default_rng(3), 384, 384)
    computed = spectrum(Dense(matrix, "float64"))
    np.testing.assert_array_equal(computed.s, singular_values(matrix))
    assert computed.error == 384 * EPS * computed.s[0]


def test_squares_that_overflow_in_several_blocks_are_measured_without_a_warning():
    matrix = np.random.default_rng(0).standard_normal((6000, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = spectrum(Dense(1e200 * matrix, "float64"))
    np.testing.assert_allclose(measured.s, 1e200 * reference(matrix), rtol=1e-12)


def test_the_numerical_rank_of_a_rank_deficient_matrix_is_its_rank():
    for name, rank in (("rank 8", 8), ("a row and a column twice", 382)):
        computed = spectrum(Dense(HARD[name](np.random.default_rng(4), 384, 383), "float64"))
        assert numerical_rank(computed.s, computed.error) == rank
        assert np.isinf(condition_number_raw(computed.s, computed.error))


def test_an_ordinary_weight_is_measured_from_its_gram_matrix():
    matrix = np.random.default_rng(0).standard_normal((1536, 384))
    computed = spectrum(Dense(matrix, "float64"))
    assert computed.error == pytest.approx(gram_error(computed.s[0] ** 2, 1536) / computed.s[-1])
    np.testing.assert_allclose(computed.s, reference(matrix), rtol=1e-12)


@pytest.mark.parametrize("shape", [(5000, 200), (200, 5000)])
def test_blocks_add_up_and_orientation_does_not_matter(shape):
    rng = np.random.default_rng(0)
    now, before = (rng.standard_normal(shape, np.float32) for _ in range(2))
    difference = Difference(Dense(now, "float32"), Dense(before, "float32"))
    tall = difference.values if shape[0] > shape[1] else difference.values.T
    size = np.linalg.norm(tall) ** 2
    np.testing.assert_allclose(gram(difference), tall.T @ tall, rtol=0, atol=1e-14 * size)
    np.testing.assert_array_equal(gram(difference), gram(difference.values))
    np.testing.assert_allclose(gram(now), gram(now.T), rtol=0, atol=1e-14 * size)


@pytest.mark.parametrize("scale", [0.0, 1e-180, 1e-120, 1e60])
def test_scales_of_any_size_are_measured(scale):
    matrix = np.random.default_rng(0).standard_normal((256, 192))
    computed, exact = spectrum(Dense(scale * matrix, "float64")), spectrum(Dense(matrix, "float64"))
    np.testing.assert_allclose(computed.s, scale * exact.s, rtol=1e-9)


@pytest.mark.parametrize("value", [0.0, 1e-170, 1e170, np.nan])
def test_squares_that_leave_float64_are_seen(value):
    assert singular_values_from_gram(gram(np.full((50, 40), value)), 50)[1] == np.inf


def test_nan_is_refused():
    matrix = np.ones((300, 200))
    matrix[5, 7] = np.nan
    with pytest.raises(ValueError, match="finite"):
        spectrum(Dense(matrix, "float32"))


def test_an_embedding_is_never_held_in_float64():
    values = np.random.default_rng(0).standard_normal((50304, 96), np.float32)
    difference = Difference(Dense(values, "float32"), Dense(values[::-1], "float32"))
    for matrix in (values, difference):
        tracemalloc.start()
        gram(matrix)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= 2 * 2**22 + 2**19 < values.nbytes  # two blocks, and small things
