"""Singular values, their error bounds, and factored matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics.metrics import effective_rank, numerical_rank
from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense, Factored
from dynamics.spectra.numpy_spectrum import singular_values
from dynamics.spectra.spectrum import singular_values_of_product, spectrum

RNG = np.random.default_rng(7)


def _with_spectrum(s: np.ndarray, rows: int, cols: int) -> np.ndarray:
    left = np.linalg.qr(RNG.standard_normal((rows, s.size)))[0]
    right = np.linalg.qr(RNG.standard_normal((cols, s.size)))[0]
    return left * s @ right.T


@pytest.mark.parametrize("shape", [(64, 64), (200, 30), (30, 200), (1, 9)])
@pytest.mark.parametrize("decay", [0.0, 0.2, 1.0])
def test_computed_values_lie_within_their_error_bound_of_the_constructed_ones(shape, decay):
    exact = np.exp(-decay * np.arange(min(shape)))
    computed = spectrum(Dense(_with_spectrum(exact, *shape), "float64"))
    assert np.abs(computed.s - exact).max() <= computed.error + 1e-14  # construction rounds too
    assert computed.error <= 1e-12 * computed.s[0]


@pytest.mark.parametrize(
    ("m", "r", "n"), [(384, 16, 384), (384, 16, 1536), (1536, 8, 96), (5, 9, 7)]
)
def test_a_products_values_equal_those_of_the_dense_product(m, r, n):
    left, right = RNG.standard_normal((m, r)), RNG.standard_normal((r, n))
    dense = np.linalg.svd(left @ right, compute_uv=False)
    computed = singular_values_of_product(left, right)
    assert computed.size == min(m, r, n)
    assert np.abs(computed - dense[: computed.size]).max() <= 1e-10 * dense[0]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 24), st.integers(1, 40), st.integers(1, 40), st.floats(-3, 3), st.integers(0, 99)
)
def test_an_adapter_never_has_more_rank_than_r(r, m, n, scale, seed):
    rng = np.random.default_rng(seed)
    factored = Factored(rng.standard_normal((m, r)), rng.standard_normal((r, n)), scale, "float32")
    computed = spectrum(factored)
    bound = min(r, m, n)
    assert computed.s.size == min(m, n)
    assert computed.rank_bound == bound
    assert not computed.s[bound:].any()
    assert effective_rank(computed.s) <= bound * (1 + 1e-12)
    assert numerical_rank(computed.s, computed.floor) <= bound


def test_a_fresh_adapter_with_zero_b_is_the_zero_matrix():
    computed = spectrum(Factored(np.zeros((20, 4)), RNG.standard_normal((4, 30)), 2.0, "float32"))
    assert not computed.s.any()
    assert effective_rank(computed.s) == 0


def test_the_factored_spectrum_carries_the_scale():
    left, right = RNG.standard_normal((12, 3)), RNG.standard_normal((3, 9))
    one, two = (spectrum(Factored(left, right, scale, "float32")) for scale in (1.0, -2.0))
    np.testing.assert_allclose(two.s, 2 * one.s, rtol=1e-14)
    np.testing.assert_allclose(two.noise_floor, 2 * one.noise_floor, rtol=1e-14)


def test_a_difference_is_taken_in_float64():
    before = RNG.standard_normal((20, 10)).astype(np.float32)
    now = (before + np.float32(1e-3) * RNG.standard_normal((20, 10))).astype(np.float32)
    computed = spectrum(Difference(Dense(now, "float32"), Dense(before, "float32")))
    exact = singular_values(now.astype(np.float64) - before.astype(np.float64))
    np.testing.assert_array_equal(computed.s, exact)
