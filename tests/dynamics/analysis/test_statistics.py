"""Means with confidence intervals: Student's t, computed another way."""

import numpy as np
import pytest
import scipy.stats
import xarray as xr

import dynamics as dy
from dynamics.errors import DynamicsError

VALUES = xr.DataArray(
    np.random.default_rng(0).normal(3, 2, (5, 4, 2)), dims=("seed", "layer", "step")
)


def test_the_interval_is_that_of_students_t() -> None:
    found = dy.mean_interval(VALUES, "seed", level=0.9)
    for layer in range(4):
        for step in range(2):
            sample = VALUES.values[:, layer, step]
            lower, upper = scipy.stats.t.interval(
                0.9, len(sample) - 1, loc=sample.mean(), scale=scipy.stats.sem(sample)
            )
            at = found.isel(layer=layer, step=step)
            assert float(at["mean"]) == pytest.approx(sample.mean(), rel=1e-12)
            assert (float(at["lower"]), float(at["upper"])) == pytest.approx((lower, upper))
    assert (found["count"] == 5).all()


def test_several_dimensions_are_one_sample() -> None:
    found = dy.mean_interval(VALUES, ("seed", "layer")).isel(step=0)
    sample = VALUES.values[:, :, 0].ravel()
    half = scipy.stats.t.ppf(0.975, 19) * sample.std(ddof=1) / np.sqrt(20)
    assert float(found["upper"] - found["mean"]) == pytest.approx(half)


def test_what_was_not_measured_does_not_count() -> None:
    values = xr.DataArray(
        [[1.0, np.nan, 3.0], [2.0, np.nan, np.nan], [np.nan] * 3], dims=("a", "b")
    )
    found = dy.mean_interval(values, "b")
    assert found["count"].values.tolist() == [2, 1, 0]
    np.testing.assert_array_equal(found["mean"], [2.0, 2.0, np.nan])
    assert np.isnan(found["lower"].values).tolist() == [False, True, True]


def test_the_interval_holds_the_expectation_as_often_as_it_says() -> None:
    samples = xr.DataArray(np.random.default_rng(1).normal(size=(4000, 3)), dims=("trial", "seed"))
    found = dy.mean_interval(samples, "seed", level=0.95)
    held = ((found["lower"] <= 0) & (found["upper"] >= 0)).mean()
    assert float(held) == pytest.approx(0.95, abs=0.015)  # 4 standard errors of 4000 trials


def test_a_dimension_that_is_not_there_is_named() -> None:
    with pytest.raises(DynamicsError, match=r"these dimensions; the values have \['seed', 'l"):
        dy.mean_interval(VALUES, "run")
    with pytest.raises(DynamicsError, match=r"level is 95; it must be between 0 and 1"):
        dy.mean_interval(VALUES, "seed", level=95)
