"""Gradients of a recording are compared with the factors that they were taken at."""

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from dynamics.directions.adapter_subspace import expressibility
from dynamics.directions.expressibility import FactorsOf
from dynamics.errors import MissingError
from dynamics.recordings import RecordingWriter, factor_path, matrix_path
from dynamics.runs.run import Event

NAME = "model.layers.0.mlp.up_proj.weight"


def _random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _recording(path, steps, *, transposed=False, merge=None, gradients=True):
    """A recording of random matrices; returns the gradients and (B, A) by step."""
    writer = RecordingWriter(path, {})
    truth = {}
    for step in steps:
        gradient = _random(6, 5, seed=3 * step)
        b, a = _random(6, 2, seed=3 * step + 1), _random(2, 5, seed=3 * step + 2)
        truth[step] = gradient, b, a
        stored_a, stored_b = (b.T, a.T) if transposed else (a, b)
        matrices = {
            matrix_path("weight", NAME): gradient,
            factor_path(NAME, "A"): stored_a,
            factor_path(NAME, "B"): stored_b,
        }
        if step > 0 and gradients:
            matrices[matrix_path("gradient", NAME)] = gradient
        extra = {"source_dtype": "float64", "scaling": 2.0, "transposed": transposed}
        writer.append(step, matrices, attrs=dict.fromkeys(matrices, extra))
        if step == merge:
            writer.event(Event(step, "merge", {}))
    return truth


@pytest.mark.parametrize("transposed", [False, True])
def test_a_gradient_is_compared_with_the_factors_that_it_was_taken_at(tmp_path, transposed):
    steps = [0, 1, 2, 5, 6]
    truth = _recording(tmp_path / "run.zarr", steps, transposed=transposed, merge=1)
    ds = dy.gradient_expressibility(tmp_path / "run.zarr")
    assert ds["step"].values.tolist() == [1, 2, 5, 6]
    expected = {
        1: (FactorsOf.BEFORE, *truth[0][1:]),
        2: (FactorsOf.RESET, *truth[2][1:]),
        5: (FactorsOf.AFTER, *truth[5][1:]),
        6: (FactorsOf.BEFORE, *truth[5][1:]),
    }
    for step, (which, left, right) in expected.items():
        at = ds.sel(step=step, matrix=NAME)
        assert int(at["factors"]) == which
        if which == FactorsOf.RESET:  # LoRA's B, which is the right factor where transposed
            left, right = (left, 0 * right) if transposed else (0 * left, right)
        shares = expressibility(truth[step][0], left, right)
        assert float(at["share"]) == pytest.approx(shares.share, rel=1e-12)
        assert float(at["left_rank"]) == shares.left_rank
    assert ds["factors"].attrs["flag_meanings"] == "none before reset after"
    assert ds["layer"].values.tolist() == [0]


def test_a_path_is_taken_as_its_run_is(tmp_path):
    _recording(path := tmp_path / "run.zarr", [0, 1])
    expected = dy.gradient_expressibility(dy.open_run(path))
    for given in (path, str(path)):
        xr.testing.assert_identical(dy.gradient_expressibility(given), expected)


def test_runs_without_gradients_are_refused(tmp_path):
    _recording(tmp_path / "run.zarr", [0, 1], gradients=False)
    with pytest.raises(MissingError, match=r"no gradient matrices; .* record 'probed_gradient'"):
        dy.gradient_expressibility(tmp_path / "run.zarr")
    _recording(tmp_path / "other.zarr", [0, 1])
    with pytest.raises(MissingError, match=r"No adapted matrix of .* matches 'q_proj'"):
        dy.gradient_expressibility(tmp_path / "other.zarr", select="q_proj")
    one = dy.gradient_expressibility(tmp_path / "other.zarr", steps=[0])
    assert (one["factors"] == FactorsOf.NONE).all()
    assert np.isnan(one["share"]).all()
