"""The edge of the spectrum of a variance profile; its values are tested by those of the noise."""

import numpy as np
import pytest

from dynamics.spectra import variance_profiles
from dynamics.spectra.variance_profiles import edge_of_profile


def profiles(shapes, spreads):
    """Lognormal row and column sums."""
    rng = np.random.default_rng(2)
    for spread in spreads:
        for m, n in shapes:
            rows, cols = (np.exp(spread * rng.standard_normal(size)) for size in (m, n))
            yield rows, cols * rows.sum() / cols.sum()


def test_it_is_the_same_as_from_every_point_of_the_grid(monkeypatch):
    shapes = ((1, 1), (1, 40), (96, 96), (384, 30), (20, 900))
    cases = list(profiles(shapes, (0.0, 0.01, 0.3, 1.0, 4.0)))
    computed = [edge_of_profile(*each) for each in cases]
    monkeypatch.setattr(variance_profiles, "_STRIDE", 1)
    np.testing.assert_allclose(computed, [edge_of_profile(*each) for each in cases], rtol=1e-12)


@pytest.mark.parametrize("shape", [(50304, 96), (384, 30000), (3000, 3000)])
def test_of_a_long_side_rows_that_are_nearly_alike_count_as_one(shape, monkeypatch):
    cases = list(profiles([shape], (0.0, 0.01, 0.3, 2.0)))
    computed = [edge_of_profile(*each) for each in cases]
    monkeypatch.setattr(variance_profiles, "_MANY", 10**6)
    np.testing.assert_allclose(computed, [edge_of_profile(*each) for each in cases], rtol=1e-6)
