"""Singular values from the Gram matrix: the bound on their error holds, and what falls back."""

import tracemalloc
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

SHAPES = [(96, 96), (384, 96), (128, 384), (256, 256), (384, 384), (4000, 64)]


def _orthonormal(rng, m, n):
    return np.linalg.qr(rng.standard_normal((m, n)))[0]


def _geometric(rng, m, n, last):
    k = min(m, n)
    return _orthonormal(rng, m, k) * np.geomspace(1, last, k) @ _orthonormal(rng, n, k).T


def _trained(rng, m, n):
    """(weight, gradient, update) of a layer that has learned something, float32."""
    torch.manual_seed(int(rng.integers(1000)))
    layer = torch.nn.Linear(n, m, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    target, start = torch.randn(n, m) / n**0.5, layer.weight.detach().clone()
    for _ in range(10):
        x = torch.randn(32, n)
        optimizer.zero_grad()
        loss = (torch.tanh(layer(x)) - torch.tanh(x @ target)).square().mean()
        loss.backward()
        optimizer.step()
    found = layer.weight.detach(), layer.weight.grad, layer.weight.detach() - start
    return [each.double().numpy() for each in found]


HARD = {
    "gaussian": lambda rng, m, n: rng.standard_normal((m, n)),
    "geometric decay to 1e-4": lambda rng, m, n: _geometric(rng, m, n, 1e-4),
    "geometric decay to 1e-12": lambda rng, m, n: _geometric(rng, m, n, 1e-12),
    "near-orthogonal": lambda rng, m, n: (
        _geometric(rng, m, n, 1) + 1e-6 * rng.standard_normal((m, n))
    ),
    "graded rows": lambda rng, m, n: (
        rng.standard_normal((m, n)) * np.geomspace(1, 1e-8, m)[:, None]
    ),
    "graded columns": lambda rng, m, n: rng.standard_normal((m, n)) * np.geomspace(1, 1e-8, n),
    "rank 8": lambda rng, m, n: rng.standard_normal((m, 8)) @ rng.standard_normal((8, n)),
    "a row and a column twice": lambda rng, m, n: rng.standard_normal((m, n))[
        np.ix_(np.r_[0, : m - 1], np.r_[0, : n - 1])
    ],
    "positive": lambda rng, m, n: rng.random((m, n)),
    "all alike": lambda rng, m, n: 1 + 1e-3 * rng.random((m, n)),
    "signs": lambda rng, m, n: 0.1 * rng.choice([-1.0, 1.0], (m, n)),
    "trained weight": lambda rng, m, n: _trained(rng, m, n)[0],
    "gradient": lambda rng, m, n: _trained(rng, m, n)[1],
    "update": lambda rng, m, n: _trained(rng, m, n)[2],
    "a rank-8 update lost in bfloat16": lambda rng, m, n: (
        torch.from_numpy(
            1e-4 * rng.standard_normal((m, 8)) @ rng.standard_normal((8, n))
            + rng.standard_normal((m, n))
        )
        .bfloat16()
        .double()
        .numpy()
    ),
}


def _reference(matrix):
    """gesvd in float64: no Gram matrix, and another algorithm than `singular_values` has."""
    return scipy.linalg.svd(matrix, compute_uv=False, lapack_driver="gesvd")


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_error_bound_holds(name, shape, seed):
    matrix = HARD[name](np.random.default_rng(seed), *shape)
    exact = _reference(matrix)
    found, error = singular_values_from_gram(gram(matrix), max(shape))
    assert np.abs(found**2 - exact**2).max() <= gram_error(found[0] ** 2, max(shape))
    assert np.abs(found - exact).max() <= error
    # And it is near: hundreds of times the true error would cost needless fallbacks.
    measured = spectrum(Dense(matrix, "float64"))
    assert np.abs(measured.s - exact).max() <= measured.error
    assert measured.error <= max(TOLERANCE * measured.s[-1], max(shape) * EPS * measured.s[0])


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
    found, _ = singular_values_from_gram(gram(np.full(shape, value)), max(shape))
    exact = np.zeros(min(shape))
    exact[0] = value**2 * shape[0] * shape[1]
    assert np.abs(found**2 - exact).max() <= gram_error(exact[0], max(shape))


def test_the_error_bound_holds_against_fifty_digits():
    rng = np.random.default_rng(0)
    matrix = _geometric(rng, 40, 24, 1e-6)
    with mpmath.workdps(50):
        exact = mpmath.svd_r(mpmath.matrix(matrix.tolist()), compute_uv=False)
        exact = np.array([float(each) for each in exact])
    found, error = singular_values_from_gram(gram(matrix), 40)
    assert np.abs(found - exact).max() <= error
    assert np.abs(singular_values(matrix) - exact).max() <= 40 * EPS * exact[0]
    each = gram_error(exact[0] ** 2, 40) / exact
    assert (np.abs(found - exact) <= each).all()


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_metric_is_within_the_tolerance_of_its_value_from_a_dense_svd(name, dtype):
    matrix = HARD[name](np.random.default_rng(2), 384, 256)
    matrix = torch.from_numpy(matrix).to(getattr(torch, dtype)).double().numpy()
    found = spectrum(Dense(matrix, dtype))
    exact = _reference(matrix)
    np.testing.assert_allclose(effective_rank(found.s), effective_rank(exact), rtol=1e-6)
    for metric in ("stable_rank", "nuclear_norm", "frobenius_norm", "top_16_energy"):
        dense = replace(found, s=exact)
        measured, expected = (METRICS[metric].function(each) for each in (found, dense))
        np.testing.assert_allclose(measured, expected, rtol=1e-8)
    sure = np.abs(exact - found.floor) > found.error
    assert np.array_equal((found.s > found.floor)[sure], (exact > found.floor)[sure])
    raw = condition_number_raw(found.s, found.error)
    if np.isfinite(raw):
        expected = exact[0] / exact[-1]
        assert raw == pytest.approx(expected, rel=max(TOLERANCE, 2 * found.error / exact[-1]))
    else:
        assert exact[-1] <= 2 * 384 * EPS * exact[0]


@pytest.mark.parametrize("name", ["rank 8", "geometric decay to 1e-12", "a row and a column twice"])
def test_what_the_gram_matrix_cannot_tell_is_measured_by_a_dense_svd(name):
    matrix = HARD[name](np.random.default_rng(3), 384, 384)
    found = spectrum(Dense(matrix, "float64"))
    np.testing.assert_array_equal(found.s, singular_values(matrix))
    assert found.error == 384 * EPS * found.s[0]


def test_the_numerical_rank_of_a_rank_deficient_matrix_is_its_rank():
    for name, rank in (("rank 8", 8), ("a row and a column twice", 382)):
        found = spectrum(Dense(HARD[name](np.random.default_rng(4), 384, 383), "float64"))
        assert numerical_rank(found.s, found.error) == rank
        assert np.isinf(condition_number_raw(found.s, found.error))


def test_an_ordinary_weight_is_measured_from_its_gram_matrix():
    matrix = np.random.default_rng(0).standard_normal((1536, 384))
    found = spectrum(Dense(matrix, "float64"))
    assert found.error == pytest.approx(gram_error(found.s[0] ** 2, 1536) / found.s[-1])
    np.testing.assert_allclose(found.s, _reference(matrix), rtol=1e-12)


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
    found, exact = spectrum(Dense(scale * matrix, "float64")), spectrum(Dense(matrix, "float64"))
    np.testing.assert_allclose(found.s, scale * exact.s, rtol=1e-9)


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
