"""Directions of the updates of one run, and of two runs, against dense float64 computations.

How cycles are compared stands in `test_update_kinds.py`, whose run has adapters and merges.
"""

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from dynamics.errors import FormatError, MissingError

NAME = "model.layers.1.mlp.up_proj.weight"
DIRECTIONS = 3


@pytest.fixture(scope="module")
def paths(write_recording, tmp_path_factory):
    folder = tmp_path_factory.mktemp("twins")
    return [write_recording(folder / f"{seed}.zarr", seed=seed) for seed in (0, 1)]


def _weights(path):
    run = dy.open_run(path)
    return [run.read(NAME, step, "weight").values.astype(np.float64) for step in run.steps]


def _overlap(one, other):
    """Of the DIRECTIONS leading left and right directions."""
    (u1, _, v1), (u2, _, v2) = (np.linalg.svd(each, full_matrices=False) for each in (one, other))
    left, right = u1[:, :DIRECTIONS].T @ u2[:, :DIRECTIONS], v1[:DIRECTIONS] @ v2[:DIRECTIONS].T
    return [np.sum(each**2) / DIRECTIONS for each in (left, right)]


def test_updates_overlap_with_the_weight_from_which_they_started(paths):
    weights = _weights(paths[0])
    overlaps = dy.subspace_overlaps(paths[0], k=DIRECTIONS).sel(matrix=NAME)
    assert overlaps["kind"].values.tolist() == ["update", "displacement"]
    for kind, start in (("update", 1), ("displacement", 0)):
        update, at = weights[2] - weights[start], overlaps.sel(kind=kind, step=20)
        expected = _overlap(update, weights[start])
        sides = [float(at[f"{side}_overlap_with_weight"]) for side in ("left", "right")]
        np.testing.assert_allclose(sides, expected, rtol=1e-9)
        u, _, vt = np.linalg.svd(weights[start], full_matrices=False)
        inside = (
            np.linalg.norm(u[:, :DIRECTIONS].T @ update @ vt[:DIRECTIONS].T) ** 2
            / np.linalg.norm(update) ** 2
        )
        assert float(at["energy_in_weight"]) == pytest.approx(inside, rel=1e-9)
    assert "left_overlap_with_last_cycle" not in overlaps
    assert overlaps["energy_in_weight"].sel(step=0).isnull().all()


def test_two_runs_are_aligned_by_the_cosine_of_their_matrices(paths):
    one, other = (weights[2] - weights[0] for weights in map(_weights, paths))
    at = dy.run_alignment(*paths, k=DIRECTIONS).sel(kind="displacement", step=20, matrix=NAME)
    cosine = np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other)
    assert float(at["alignment"]) == pytest.approx(cosine, rel=1e-9)
    sides = [float(at[f"{side}_overlap"]) for side in ("left", "right")]
    np.testing.assert_allclose(sides, _overlap(one, other), rtol=1e-9)
    assert int(at["subspace_dimension"]) == DIRECTIONS


@pytest.mark.slow
def test_paths_are_taken_as_their_runs_are(paths):
    runs = [dy.open_run(path) for path in paths]
    aligned, overlaps = dy.run_alignment(*runs), dy.subspace_overlaps(runs[0])
    for given in (paths, [str(path) for path in paths], [paths[0], runs[1]]):
        xr.testing.assert_identical(dy.run_alignment(*given), aligned)
        xr.testing.assert_identical(dy.subspace_overlaps(given[0]), overlaps)
    for measure in (dy.subspace_overlaps, lambda path: dy.run_alignment(paths[0], path)):
        with pytest.raises(FormatError, match=r"none\.zarr"):
            measure(paths[0].with_name("none.zarr"))


def test_what_the_runs_do_not_have_is_refused(paths):
    with pytest.raises(MissingError, match="has no adapter; it has weight"):
        dy.run_alignment(*paths, kind="adapter")
    with pytest.raises(MissingError, match=r"No matrix of .* matches 'none'"):
        dy.run_alignment(*paths, select="none")
    with pytest.raises(MissingError, match=r"No update of kind 'gradient' in .*; it has update"):
        dy.subspace_overlaps(paths[0], kinds=["gradient"])
