"""Facts are found once per array, and are those of the array."""

import gc

import numpy as np

from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense
from dynamics.spectra import backend
from dynamics.spectra.backend import ArrayFacts
from dynamics.spectra.noise import variance_sums
from dynamics.spectra.spectrum import spectrum


def test_what_weights_share_is_found_once_and_is_the_same(monkeypatch):
    rng, calls = np.random.default_rng(0), []
    now, before = (Dense(rng.standard_normal((40, 300), np.float32), "float32") for _ in range(2))
    matrices = [now, before, Difference(now, before), Difference(now, before, merges=2)]
    expected = [spectrum(each) for each in matrices]

    def counted(term):
        calls.append(term)
        return variance_sums(term)

    monkeypatch.setattr(backend, "variance_sums", counted)
    facts = ArrayFacts()
    assert [spectrum(each, facts=facts).noise_floor for each in matrices] == [
        each.noise_floor for each in expected
    ]
    assert len(calls) == 2


def test_one_array_in_two_dtypes_has_two_noises():
    values, facts = np.full((3, 3), 1.5, np.float32), ArrayFacts()
    fine, coarse = (facts.variance_sums((values, name))[0] for name in ("float32", "bfloat16"))
    assert (coarse > fine).all()


def test_an_array_that_takes_anothers_place_in_memory_has_its_own_facts():
    facts, seen = ArrayFacts(), set()
    for value in range(50):
        array = np.full(1000, float(value))
        seen.add(facts.digest(array))
        assert facts.is_finite(array)
        del array
    gc.collect()
    assert len(seen) == 50
    assert not facts._known


def test_order_dtype_and_shape_are_part_of_the_hash():
    values, facts = np.arange(12.0).reshape(3, 4), ArrayFacts()
    others = [values, values.T, np.asfortranarray(values), values.reshape(4, 3), values.view("i8")]
    assert len({facts.digest(each) for each in others}) == len(others)
    assert facts.digest(values.copy()) == facts.digest(values)
