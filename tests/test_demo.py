"""The path from training to figures, on a shortened run."""

import json

import numpy as np
import pytest

import dynamics as dy
from dynamics.errors import OutputExistsError
from probes.relora import micro
from probes.relora.demo import run_demo
from tests.short_run import MERGES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recordings(short_demo):
    return dy.load(short_demo / "recordings.zarr")


@pytest.fixture(scope="module")
def checkpoints(short_demo):
    return dy.load(short_demo / "checkpoints.zarr")


def _adapted(dataset):
    return dataset.sel(run="relora").where(dataset["layer"] >= 0, drop=True)


def test_both_twins_are_measured_whole(recordings):
    assert recordings["step"].values.tolist() == list(range(0, 25, 3))
    weights = recordings["status"].sel(kind="weight")
    assert (weights == dy.Status.MEASURED).all()
    assert json.loads(recordings.attrs["problems"]) == {"full_rank": [], "relora": []}


def test_the_merges_are_in_the_recording(recordings):
    events = json.loads(recordings.attrs["events"])
    assert [each["step"] for each in events["relora"] if each["kind"] == "merge"] == MERGES
    assert events["full_rank"] == []


@pytest.mark.parametrize("method", ["full_rank", "relora"])
@pytest.mark.parametrize("source", ["run.zarr", "checkpoints"])
def test_the_audit_finds_nothing_wrong(short_demo, method, source):
    report = dy.audit(short_demo / method / source)
    assert report.line.startswith("pass: ")
    assert report.severity == "pass"


def test_the_twins_start_from_the_same_effective_weights(short_demo):
    full, relora = (dy.open_run(short_demo / m / "run.zarr") for m in ("full_rank", "relora"))
    assert list(full.matrices) == list(relora.matrices)
    for name in full.matrices:
        one, other = (run.read(name, 0, "weight").values for run in (full, relora))
        np.testing.assert_array_equal(one, other)


def test_an_adapters_effective_rank_stays_within_r(recordings):
    adapters = _adapted(recordings).sel(kind="adapter")
    assert (adapters["rank_bound"] == 2).all()
    assert (adapters["effective_rank"] <= 2 * (1 + 1e-12)).all()
    assert (adapters["effective_rank"].sel(step=24) > 1).all()


@pytest.mark.parametrize("source", ["recordings", "checkpoints"])
def test_the_displacement_gains_r_directions_with_each_cycle(source, request):
    dataset = request.getfixturevalue(source)
    ranks = _adapted(dataset)["numerical_rank"].sel(kind="displacement").dropna("step", how="all")
    first = int(dataset["step"].min())  # 0, or the first merge: both end a cycle
    assert first in (0, MERGES[0])
    assert ranks.sizes["step"] == dataset.sizes["step"] - 1
    for step in ranks["step"].values:
        cycles = 1 + sum(first < merge < step for merge in MERGES)
        assert (ranks.sel(step=step) == 2 * cycles).all()


def test_recordings_and_checkpoints_of_a_step_measure_alike(recordings, checkpoints):
    common = checkpoints["step"].values
    for metric in ("effective_rank", "spectral_norm", "stable_rank"):
        one = recordings[metric].sel(kind="weight", step=common)
        np.testing.assert_allclose(one, checkpoints[metric].sel(kind="weight"), rtol=1e-6)
        adapters = recordings[metric].sel(kind="adapter", step=common)
        np.testing.assert_allclose(adapters, checkpoints[metric].sel(kind="adapter"), rtol=1e-12)


def test_the_figures_are_drawn(short_demo):
    figures = sorted(path.name for path in (short_demo / "figures").glob("*.png"))
    assert "displacement.png" in figures
    assert len(figures) == 9
    assert all(path.stat().st_size > 10_000 for path in (short_demo / "figures").iterdir())


def test_a_folder_in_use_is_refused_before_anything_is_trained(short_demo):
    with pytest.raises(OutputExistsError, match="is not empty; give a new folder"):
        run_demo(short_demo, micro())
