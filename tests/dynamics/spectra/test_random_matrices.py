"""Random-matrix baselines against quadrature, closed forms and simulation."""

import numpy as np
import pytest
from scipy.integrate import quad

from dynamics.metrics import (
    effective_rank,
    outliers,
    per_over_random,
    proportional_effective_rank,
    stable_rank,
)
from dynamics.spectra.random_matrices import (
    TRACY_WIDOM_999,
    largest_singular_value,
    marchenko_pastur_density,
    marchenko_pastur_edges,
    marchenko_pastur_median,
    marchenko_pastur_quantiles,
    random_condition_number,
    random_effective_rank,
    random_per,
    random_spectrum,
    random_stable_rank,
)

SHAPES = [(32, 32), (32, 96), (96, 32), (96, 96), (96, 384), (128, 384)]


def _spectra(shape, count, seed=0):
    rng = np.random.default_rng(seed)
    matrices = (rng.standard_normal(shape) for _ in range(count))
    return np.array([np.linalg.svd(matrix, compute_uv=False) for matrix in matrices])


@pytest.mark.parametrize("shape", [(96, 96), (100, 96), (384, 96), (7, 1)])
def test_the_density_integrates_to_one_and_to_the_quantiles(shape):
    lower, upper = marchenko_pastur_edges(*shape)
    assert quad(marchenko_pastur_density, lower, upper, shape)[0] == pytest.approx(1, abs=1e-6)
    for probability in (0.01, 0.3, 0.5, 0.99):
        s = marchenko_pastur_quantiles(probability, *shape)
        below = quad(marchenko_pastur_density, lower, s, shape)[0]
        assert below == pytest.approx(probability, abs=1e-6)
    outside = [lower - 1e-3, upper + 1e-3, -1.0]
    assert not marchenko_pastur_density(outside, *shape).any()


def test_a_square_matrix_has_the_quarter_circle():
    n = 50
    assert marchenko_pastur_edges(n, n) == (0, 2 * np.sqrt(n))
    s = np.linspace(0.1, 14, 9)
    np.testing.assert_allclose(
        marchenko_pastur_density(s, n, n), np.sqrt(4 * n - s**2) / (np.pi * n), rtol=1e-12
    )
    x = marchenko_pastur_quantiles([0.1, 0.5, 0.9], n, n) / (2 * np.sqrt(n))
    np.testing.assert_allclose(2 / np.pi * (np.arcsin(x) + x * np.sqrt(1 - x**2)), [0.1, 0.5, 0.9])


def test_the_second_moment_is_that_of_the_entries():
    for shape in SHAPES:
        lower, upper = marchenko_pastur_edges(*shape)
        moment = quad(lambda s, *at: s**2 * marchenko_pastur_density(s, *at), lower, upper, shape)
        assert moment[0] == pytest.approx(max(shape), rel=1e-6)
        assert (random_spectrum(*shape) ** 2).sum() == pytest.approx(np.prod(shape), rel=5e-3)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 9), (5, 5), (4096, 11008)])
def test_the_expected_spectrum_descends_within_the_edges_and_transposes(shape):
    s = random_spectrum(*shape)
    lower, upper = marchenko_pastur_edges(*shape)
    assert s.shape == (min(shape),)
    assert (np.diff(s) < 0).all()
    assert lower <= s[-1] <= s[0] <= upper
    assert random_spectrum(*shape) is s
    np.testing.assert_array_equal(random_spectrum(*shape[::-1]), s)
    with pytest.raises(ValueError, match="read-only"):
        s[0] = 0


@pytest.mark.parametrize("shape", SHAPES)
def test_expected_values_are_the_means_of_simulations(shape):
    computed = _spectra(shape, 60)
    mean = computed.mean(axis=0)
    assert np.abs(mean - random_spectrum(*shape)).max() <= 0.02 * mean[0]
    assert effective_rank(computed).mean() == pytest.approx(random_effective_rank(*shape), rel=0.01)
    assert stable_rank(computed).mean() == pytest.approx(random_stable_rank(*shape), rel=0.02)
    assert mean[0] == pytest.approx(largest_singular_value(*shape), rel=0.01)


def test_the_entries_distribution_does_not_matter():
    rng = np.random.default_rng(1)
    uniform = np.sqrt(3) * rng.uniform(-1, 1, (20, 96, 384))
    computed = proportional_effective_rank(np.linalg.svd(uniform, compute_uv=False))
    assert computed.mean() == pytest.approx(random_per(96, 384), rel=1e-3)


def test_the_per_of_an_initialisation_is_a_matter_of_shape():
    assert random_per(384, 1536) == pytest.approx(0.966, abs=5e-4)  # the MLP of the paper's models
    assert random_per(96, 384) == pytest.approx(0.966, abs=5e-4)
    assert random_per(128, 384) == pytest.approx(0.954, abs=5e-4)
    assert random_per(384, 384) == pytest.approx(0.805, abs=5e-4)
    assert random_per(1, 9) == 1


@pytest.mark.parametrize("shape", [(32, 32), (96, 96)])
def test_the_condition_number_of_square_matrices_is_edelmans_median(shape):
    computed = _spectra(shape, 400)
    ratio = computed[:, 0] / computed[:, -1]
    share = (ratio < random_condition_number(*shape)).mean()
    assert share == pytest.approx(0.5, abs=0.09)  # 3 standard errors, and 1/n
    assert random_condition_number(*shape) == pytest.approx(3.671 * shape[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 40), (96, 104), (96, 130), (32, 96), (96, 384), (64, 1024)])
def test_the_condition_number_of_rectangular_matrices_is_the_ratio_of_the_edges(shape):
    computed = _spectra(shape, 200)
    median = np.median(computed[:, 0] / computed[:, -1])
    assert random_condition_number(*shape) == pytest.approx(median, rel=0.1)
    assert random_condition_number(*shape) == random_condition_number(*shape[::-1])


def test_almost_square_matrices_have_half_known_condition_numbers():
    for shape in ((33, 32), (98, 96)):
        computed = _spectra(shape, 200)
        median = np.median(computed[:, 0] / computed[:, -1])
        assert median <= random_condition_number(*shape) <= 1.5 * median
    assert random_condition_number(1, 9) == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_an_initialisation_is_one_time_random_without_outliers(shape):
    computed = 0.02 * _spectra(shape, 100)
    assert per_over_random(computed, *shape).mean() == pytest.approx(1, abs=0.01)
    assert outliers(computed, *shape, 0.0).mean() <= 0.03


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spikes", [1, 5])
def test_outliers_are_counted_and_do_not_move_the_edge(shape, spikes):
    rng = np.random.default_rng(4)
    size = sum(np.sqrt(shape))
    left, right = (np.linalg.qr(rng.standard_normal((d, spikes)))[0] for d in shape)
    for strength in (1.5, 100.0):
        spiked = rng.standard_normal(shape) + strength * size * left @ right.T
        s = np.linalg.svd(spiked, compute_uv=False)
        assert outliers(s, *shape, 0.0) == spikes


def test_without_a_bulk_all_values_above_the_floor_are_outliers():
    s = np.zeros(96)
    assert outliers(s, 96, 96, 0.0) == 0
    s[:16] = np.linspace(2, 1, 16)
    assert outliers(s, 96, 384, 0.0) == 16
    assert outliers(s, 96, 384, 1.5) == 8
    assert outliers(np.array([3.0]), 1, 9, 0.0) == 0


@pytest.mark.slow
def test_the_largest_value_of_one_in_a_thousand_is_larger_still():
    computed = _spectra((32, 96), 2000)[:, 0]
    assert (computed > largest_singular_value(32, 96, TRACY_WIDOM_999)).mean() <= 0.003
    assert marchenko_pastur_median(32, 96) == marchenko_pastur_quantiles(0.5, 32, 96)
