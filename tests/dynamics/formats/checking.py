"""What the tests of several layouts check in the same way."""

import os

import numpy as np
import pytest
import torch

import dynamics as dy
from dynamics.errors import FormatError


class Touch:
    """An object whose pickle, run, makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def assert_bits(run, step, expected):
    """The matrices at a step are the expected ones and no others, in dtype and every bit."""
    found = {name: run.read(name, step, "weight") for name in run.matrices}
    assert {name for name, matrix in found.items() if matrix is not None} == set(expected)
    for name, tensor in expected.items():
        matrix = found[name]
        assert matrix.dtype == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(
            matrix.values.astype(np.float64), tensor.to(torch.float64).numpy(), strict=True
        )


def assert_refused(path, match, **options):
    """Opening fails with one line."""
    with pytest.raises(FormatError, match=match) as caught:
        dy.open_run(path, **options)
    assert "\n" not in str(caught.value)


def assert_problem(run, step, match):
    """A step cannot be read, and says why in one line."""
    assert list(run.problems) == [step]
    assert "\n" not in run.problems[step]
    with pytest.raises(FormatError, match=match):
        run.read(next(iter(run.matrices)), step, "weight")
