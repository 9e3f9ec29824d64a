"""Weights of every kind are read from sharded models with the bits of the whole model."""

import json

import pytest

from tests.probes.model import sharded_reading
from tests.probes.torchrun import run_two_ranks


@pytest.fixture(scope="module")
def deviations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run_two_ranks(sharded_reading, folder)
    return json.loads((folder / "deviations.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("case", sharded_reading.CASES)
def test_a_sharded_weight_has_the_bits_of_the_whole_one(deviations, case):
    assert set(deviations[case].values()) == {0.0}, deviations[case]
