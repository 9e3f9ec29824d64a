"""A backend computes what matrices share once per array, and keeps arrays apart."""

import gc

import numpy as np
import pytest

from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense
from dynamics.spectra import rounding
from dynamics.spectra.backend import NumpyBackend
from dynamics.spectra.rounding import variance_sums
from dynamics.spectra.spectrum import spectrum


def test_what_weights_share_is_found_once_and_is_the_same(monkeypatch):
    rng, calls = np.random.default_rng(0), []
    now, before = (Dense(rng.standard_normal((40, 300), np.float32), "float32") for _ in range(2))
    matrices = [now, before, Difference(now, before), Difference(now, before, merges=2)]
    expected = [spectrum(each) for each in matrices]

    def counted(term):
        calls.append(term)
        return variance_sums(term)

    monkeypatch.setattr(rounding, "variance_sums", counted)
    backend = NumpyBackend()
    assert [spectrum(each, backend=backend).noise_floor for each in matrices] == [
        each.noise_floor for each in expected
    ]
    assert len(calls) == 2


def test_one_array_in_two_dtypes_has_two_noises():
    values, backend = np.full((3, 3), 1.5, np.float32), NumpyBackend()
    fine, coarse = (backend.variance_sums((values, name))[0] for name in ("float32", "bfloat16"))
    assert (coarse > fine).all()


@pytest.mark.slow
def test_an_array_that_takes_anothers_place_in_memory_has_results_of_its_own():
    backend, seen = NumpyBackend(), set()
    for value in range(50):
        array = np.full(1000, float(value))
        seen.add(backend.digest(array))
        assert backend.is_finite(array)
        del array
    gc.collect()
    assert len(seen) == 50
    assert not backend._kept


def test_order_dtype_and_shape_are_part_of_the_hash():
    values, backend = np.arange(12.0).reshape(3, 4), NumpyBackend()
    others = [values, values.T, np.asfortranarray(values), values.reshape(4, 3), values.view("i8")]
    assert len({backend.digest(each) for each in others}) == len(others)
    assert backend.digest(values.copy()) == backend.digest(values)
