"""Noise floors against the dtypes' own arithmetic, closed forms and simulated rounding."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import svds

from dynamics.metrics import effective_rank, numerical_rank
from dynamics.runs.run import Dense
from dynamics.spectra.noise import (
    bound_of_sums,
    noise_floor,
    noise_limit,
    noise_norm,
    noise_norm_bound,
    noise_variance,
    product_noise_bound,
    product_noise_norm,
)
from dynamics.spectra.spectrum import spectrum
from tests.dynamics.spectra.stored_matrices import ROUNDED, rounded, stored_as

PAPER = [(32, 96), (96, 96), (96, 384), (128, 384), (384, 384), (384, 1536)]
PAPER_AND_TRANSPOSES = sorted({shape for m, n in PAPER for shape in ((m, n), (n, m))})


def _norm(matrix: np.ndarray) -> float:
    if min(matrix.shape) < 400:
        return float(np.linalg.norm(matrix, 2))
    start = np.ones(min(matrix.shape))
    return float(svds(matrix, k=1, tol=1e-4, v0=start, return_singular_vectors=False)[0])


def _ratios(make, dtype, shape, seeds):
    """Expectation over the mean norm of the rounding, and every bound over its norm."""
    norms, expected, bounds = [], [], []
    for seed in range(seeds):
        values = make(shape, np.random.default_rng(seed))
        stored = stored_as(values, dtype)
        norms.append(_norm(stored[0] - values))
        expected.append(noise_norm(noise_variance(stored)))
        bounds.append(noise_floor(stored))
        assert norms[-1] <= noise_limit(stored)
    return np.mean(expected) / np.mean(norms), np.array(bounds) / norms


def test_equal_variances_have_the_marchenko_pastur_edge_with_its_tracy_widom_shift():
    for m, n in [(100, 25), (400, 400), (32, 2048)]:
        variance, root = np.full((m, n), 4.0), np.sqrt(m) + np.sqrt(n)
        scale = root * (1 / np.sqrt(m) + 1 / np.sqrt(n)) ** (1 / 3)
        for function, x in ((noise_norm, -1.2065), (noise_norm_bound, 3.2724)):
            assert function(variance) == pytest.approx(2 * np.sqrt(root**2 + scale * x), rel=1e-3)


def test_noise_of_one_row_or_one_entry_has_its_root_mean_square():
    assert noise_norm(np.ones((1, 400))) == pytest.approx(20, rel=0.02)
    assert noise_norm(np.ones((1, 1))) == pytest.approx(np.sqrt(3) / 2, rel=0.15)
    assert noise_norm(np.diag([4.0, 0, 0, 0])) == pytest.approx(np.sqrt(3), rel=0.15)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99), st.floats(-60, 60))
def test_noise_is_ordered_transposes_and_follows_the_scale(m, n, seed, exponent):
    rng = np.random.default_rng(seed)
    variance = np.exp(rng.standard_normal((m, 1)) + rng.standard_normal((1, n)))
    expected, bound = noise_norm(variance), noise_norm_bound(variance)
    largest = max(variance.sum(axis=0).max(), variance.sum(axis=1).max())
    assert np.sqrt(0.75 * largest) <= expected * (1 + 1e-12)
    assert expected < bound
    for function, value in ((noise_norm, expected), (noise_norm_bound, bound)):
        assert function(variance.T) == pytest.approx(value, rel=0.01)
        assert function(4.0**exponent * variance) == pytest.approx(2.0**exponent * value)


@pytest.mark.parametrize("dtype", [*ROUNDED, "int8"])
@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.9, 3.0])
@pytest.mark.parametrize(
    ("shape", "seeds"), [((32, 32), 20), ((96, 32), 12), ((96, 384), 3), ((384, 384), 1)]
)
def test_expectation_and_bound_agree_with_simulated_rounding(dtype, scale, shape, seeds):
    expected, bounds = _ratios(
        lambda shape, rng: scale * rng.standard_normal(shape), dtype, shape, seeds
    )
    assert 0.95 <= expected <= 1.10
    assert bounds.min() >= 1
    assert bounds.max() <= 1.55


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(384, 1536), (2048, 32), (2048, 384), (2048, 2048)])
def test_they_agree_for_large_matrices(dtype, shape):
    expected, bounds = _ratios(lambda shape, rng: rng.standard_normal(shape), dtype, shape, 1)
    assert 0.97 <= expected <= 1.03
    assert 1 <= bounds.min() <= bounds.max() <= 1.25


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_they_agree_for_numbers_around_a_power_of_two(dtype):
    expected, bounds = _ratios(
        lambda shape, rng: 1 + 0.3 * rng.standard_normal(shape), dtype, (96, 96), 6
    )
    assert 0.95 <= expected <= 1.06
    assert 1 <= bounds.min() <= bounds.max() <= 1.5


def _blocks(shape, rng):
    values = rng.standard_normal(shape)
    values[: shape[0] // 2, : shape[1] // 2] *= 100
    values[shape[0] // 2 :, shape[1] // 2 :] *= 100
    return values


def _one_large_row(shape, rng):
    return rng.standard_normal(shape) * np.where(np.arange(shape[0]) == 0, 100, 1)[:, None]


GRADED = {  # matrix, and by how much the expectation may be off
    "rows over 3 decades": (
        lambda shape, rng: rng.standard_normal(shape) * np.logspace(0, -3, shape[0])[:, None],
        (0.93, 1.15),
    ),
    "rows and columns over 2 decades": (
        lambda shape, rng: (
            rng.standard_normal(shape)
            * np.logspace(0, -2, shape[0])[:, None]
            * np.logspace(0, -2, shape[1])
        ),
        (0.93, 1.3),
    ),
    "one large row": (_one_large_row, (0.93, 1.15)),
    "two blocks": (_blocks, (0.93, 1.1)),
    "identity and little else": (
        lambda shape, rng: np.eye(*shape) * rng.uniform(0.5, 2) + 0.01 * rng.standard_normal(shape),
        (0.7, 1.3),
    ),
    "rank 16": (
        lambda shape, rng: (
            rng.standard_normal((shape[0], 16)) @ rng.standard_normal((16, shape[1]))
        ),
        (0.93, 1.1),
    ),
    "a twentieth of the entries": (
        lambda shape, rng: rng.standard_normal(shape) * (rng.random(shape) < 0.05),
        (0.9, 1.3),
    ),
    "heavy tails": (lambda shape, rng: rng.standard_t(3, shape), (0.9, 1.4)),
}


@pytest.mark.parametrize("kind", GRADED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(96, 96), (32, 128), (256, 96)])
def test_the_bound_holds_for_graded_matrices_and_the_expectation_is_near(kind, dtype, shape):
    make, (low, high) = GRADED[kind]
    expected, bounds = _ratios(make, dtype, shape, 6)
    assert low <= expected <= high
    assert 1 <= bounds.min() <= bounds.max() <= 5


def test_a_rank_one_matrix_in_eight_bits_breaks_the_model_but_not_the_limit():
    # Its errors repeat along diagonals of log|u_i| + log|v_j|: they are not independent.
    rng = np.random.default_rng(0)
    values = np.outer(rng.standard_normal(1024), rng.standard_normal(1024))
    stored = stored_as(values, "float8_e4m3fn")
    assert noise_floor(stored) < _norm(stored[0] - values) < noise_limit(stored)


def test_nothing_but_the_limit_covers_a_constant_matrix():
    values = np.full((64, 64), 1.003)
    stored = stored_as(values, "bfloat16")
    assert noise_floor(stored) < _norm(stored[0] - values) < noise_limit(stored)


def test_the_variances_of_a_sum_add_and_equal_terms_count_each():
    rng = np.random.default_rng(3)
    one, two = ((rng.standard_normal((64, 32)), dtype) for dtype in ("bfloat16", "float16"))
    np.testing.assert_allclose(
        noise_variance(one, two, one), 2 * noise_variance(one) + noise_variance(two)
    )
    assert noise_floor(one, one) == pytest.approx(np.sqrt(2) * noise_floor(one))
    assert noise_limit(one, one) == pytest.approx(2 * noise_limit(one))


@pytest.mark.parametrize(("now", "before"), [("bfloat16", "bfloat16"), ("float16", "bfloat16")])
def test_the_noise_of_a_difference_agrees_with_simulation(now, before):
    ratios = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        first = 0.02 * rng.standard_normal((96, 128))
        second = first + 0.02 * rng.standard_normal((96, 128))
        terms = stored_as(second, now), stored_as(first, before)
        error = _norm(terms[0][0] - terms[1][0] - (second - first))
        assert error <= noise_floor(*terms)
        ratios.append(noise_norm(noise_variance(*terms)) / error)
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("m", "r", "n"), [(96, 16, 96), (384, 32, 384), (32, 4, 512), (96, 32, 96), (128, 1, 256)]
)
def test_the_noise_of_a_product_agrees_with_simulation(dtype, m, r, n):
    expected, norms = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        exact = 0.3 * rng.standard_normal((m, r)), 0.02 * rng.standard_normal((r, n))
        left, right = (stored_as(each, dtype) for each in exact)
        norms.append(_norm(left[0] @ right[0] - exact[0] @ exact[1]))
        expected.append(product_noise_norm(left, right))
        assert 1 <= product_noise_bound(left, right) / norms[-1] <= 3
    assert np.mean(expected) == pytest.approx(np.mean(norms), rel=0.07)


@pytest.mark.parametrize("graded", ["left rows", "right columns", "inner"])
def test_the_noise_of_a_graded_product_agrees_with_simulation(graded):
    weight = {"left rows": (96, 0), "right columns": (96, 1), "inner": (8, 2)}
    size, which = weight[graded]
    grade, expected, norms = np.logspace(0, -2, size), [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        left, right = rng.standard_normal((96, 8)), rng.standard_normal((8, 96))
        left = left * (grade[:, None] if which == 0 else grade if which == 2 else 1)
        right = right * (grade if which == 1 else 1)
        stored = stored_as(left, "bfloat16"), stored_as(right, "bfloat16")
        norms.append(_norm(stored[0][0] @ stored[1][0] - left @ right))
        expected.append(product_noise_norm(*stored))
        assert norms[-1] <= product_noise_bound(*stored)
    assert np.mean(expected) == pytest.approx(np.mean(norms), rel=0.1)


def test_a_product_of_exact_zeros_has_no_noise():
    fresh = (np.zeros((20, 4)), "float32"), (np.zeros((4, 30)), "float32")
    assert product_noise_norm(*fresh) == product_noise_bound(*fresh) == 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", PAPER_AND_TRANSPOSES)
def test_a_rank_16_product_in_bfloat16_has_rank_16_above_the_floor(shape):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        product = rng.standard_normal((shape[0], 16)) @ rng.standard_normal((16, shape[1]))
        computed = spectrum(Dense(rounded(product, "bfloat16"), "bfloat16"))
        assert numerical_rank(computed.s, computed.floor) == 16
        assert effective_rank(np.where(computed.s > computed.floor, computed.s, 0)) <= 16


@pytest.mark.slow
@pytest.mark.parametrize("shape", PAPER_AND_TRANSPOSES)
def test_rounding_an_initialisation_loses_what_is_below_its_floor_and_nothing_else(shape):
    """Rectangular: nothing. Square: the values within the floor of zero, 2√n·floor/πσ of them.

    A square Gaussian matrix has its smallest singular value near σ/√n; bfloat16 makes noise of
    0.004σ√n, which is more from n = 250 on.
    """
    below = []
    for seed in range(20):
        exact = 0.02 * np.random.default_rng(seed).standard_normal(shape)
        computed = spectrum(Dense(rounded(exact, "bfloat16"), "bfloat16"))
        original = spectrum(Dense(exact, "float64"))
        assert numerical_rank(original.s, original.floor) == min(shape)
        assert numerical_rank(computed.s, computed.floor) == numerical_rank(
            original.s, computed.floor
        )
        below.append(min(shape) - numerical_rank(computed.s, computed.floor))
    if shape[0] != shape[1]:
        assert not any(below)
    else:
        predicted = 2 / np.pi * np.sqrt(shape[0]) * computed.floor / 0.02
        assert np.mean(below) == pytest.approx(predicted, abs=3 * np.sqrt(predicted / 20))
        assert max(below) <= 2


@pytest.mark.parametrize("shape", [(96, 96), (384, 96)])
def test_pure_rounding_has_no_rank(shape):
    for seed in range(30):
        values = np.random.default_rng(seed).standard_normal(shape)
        stored = stored_as(values, "bfloat16")
        s = np.linalg.svd(stored[0] - values, compute_uv=False)
        assert numerical_rank(s, noise_floor(stored)) == 0


@pytest.mark.parametrize("scale", [2.0**400, 2.0**500, 2.0**600, 2.0**1000])
def test_numbers_whose_squares_overflow_have_the_same_floor_in_relation(scale):
    values = np.random.default_rng(0).standard_normal((30, 20))
    assert bound_of_sums(np.full(3, np.inf), np.full(3, np.inf)) == np.inf
    terms, large = (((each, "float64"), (-each, "float64")) for each in (values, scale * values))
    assert noise_floor(*large) == pytest.approx(scale * noise_floor(*terms), rel=1e-12)
    measured = spectrum(Dense(scale * values, "float64"))
    np.testing.assert_allclose(measured.s / scale, spectrum(Dense(values, "float64")).s, rtol=1e-12)


def test_a_floor_takes_no_more_than_a_few_copies_of_the_matrix():
    values = np.random.default_rng(0).standard_normal((1000, 2000))
    tracemalloc.start()
    noise_floor((values, "float32"), *((values, "bfloat16"),) * 50)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 6 * values.nbytes
