"""Intruder dimensions, against PEFT's rule written down once more, and against closed forms."""

import numpy as np
import pytest

import dynamics as dy
from dynamics.directions.intruders import _random_changes
from dynamics.errors import MissingError
from dynamics.recordings import WEIGHT, RecordingWriter, matrix_path

SHAPE = (24, 16)


def recorded(folder, weights):
    writer = RecordingWriter(folder / "run.zarr", {})
    path = matrix_path(WEIGHT, "w.weight")
    for step, each in enumerate(weights):
        writer.append(10 * step, {path: each}, attrs={path: {"source_dtype": "float64"}})
    return folder / "run.zarr"


def weight(seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, 16)))[0] for n in SHAPE)
    return u, np.linspace(4, 1, 16), v


@pytest.mark.parametrize("epsilon", [0.3, 0.5, 0.9])
def test_they_are_counted_by_the_rule(tmp_path, epsilon):
    rng = np.random.default_rng(1)
    u, s, v = weight()
    before = u * s @ v.T
    now = before + rng.standard_normal((24, 3)) @ rng.standard_normal((3, 16)) / 3
    path = recorded(tmp_path, [before, now])
    found = dy.intruders(path, since=0, k=6, epsilon=epsilon).isel(kind=0, matrix=0)
    vectors = [np.linalg.svd(each, full_matrices=False)[0] for each in (before, now)]
    cosines = [[abs(y @ x) for x in vectors[0].T] for y in vectors[1].T[:6]]
    expected = sum(max(each) < epsilon for each in cosines)
    assert float(found["intruders"].sel(step=10)) == expected
    assert float(found["closest"].sel(step=10)) == pytest.approx(np.mean([max(c) for c in cosines]))
    assert np.isnan(found["intruders"].sel(step=0))


def test_a_new_direction_is_one_and_stretching_the_old_ones_makes_none(tmp_path):
    u, s, v = weight()
    new = np.linalg.qr(np.hstack([u, np.ones((24, 1))]))[0][:, -1:]  # orthogonal to all of u
    weights = [u * s @ v.T, u * s[::-1] @ v.T, u * s @ v.T + 50 * new @ v[:, :1].T]
    found = dy.intruders(recorded(tmp_path, weights), since=0, k=4).isel(kind=0, matrix=0)
    assert found["intruders"].sel(step=10) == 0
    assert found["closest"].sel(step=10) == pytest.approx(1)
    assert found["intruders"].sel(step=20) == 1
    assert found["intruders_of_noise"].sel(step=20) > 2  # as large a change that goes everywhere


def test_a_small_change_of_any_kind_makes_none(tmp_path):
    u, s, v = weight()
    before = u * s @ v.T
    change = np.random.default_rng(0).standard_normal(SHAPE)
    found = dy.intruders(recorded(tmp_path, [before, before + 1e-6 * change]), since=0, k=5)
    assert (found["intruders"].sel(step=10) == 0).all()
    assert (found["intruders_of_noise"].sel(step=10) == 0).all()


def test_a_first_record_as_reference_is_warned_of_and_an_unknown_step_refused(tmp_path):
    u, s, v = weight()
    path = recorded(tmp_path, [u * s @ v.T] * 2)
    with pytest.warns(dy.RandomReferenceWarning, match=r"step 0, the first of .*choose since=STEP"):
        dy.intruders(path)
    with pytest.raises(MissingError, match=r"No step 5 in .*available: 0, 10"):
        dy.intruders(path, since=5)


@pytest.mark.parametrize("rank", [None, 2])
def test_random_changes_have_the_norm_and_rank_of_the_true_one(rank):
    change = np.random.default_rng(0).standard_normal(SHAPE)
    for each in _random_changes(change, rank):
        assert np.linalg.norm(each) == pytest.approx(np.linalg.norm(change))
        assert np.linalg.matrix_rank(each) == (rank or min(SHAPE))
