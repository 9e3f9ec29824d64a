"""Recordings in Icechunk repositories: each commit of a recording is one of the repository."""

import os
import random
import signal
import time

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

import dynamics as dy
from dynamics.cli.app import app
from dynamics.errors import DynamicsError, OutputExistsError, RecordingHeldError
from dynamics.recordings import RecordingWriter
from dynamics.runs.run import Event
from probes import Recorder
from tests.probes import training

icechunk = pytest.importorskip("icechunk", reason="needs the extra icechunk")


def local(path):
    return icechunk.local_filesystem_storage(str(path))


@pytest.fixture
def repository(tmp_path):
    return icechunk.Repository.create(local(tmp_path / "run"))


def trained(store, end, *, start=0, **options):
    """Record every step up to `end`, going on after `start`."""
    model, optimizer = training.build()
    training.train(model, optimizer, start)
    with Recorder(model, optimizer, store, every=1, **options) as recorder:
        training.train(model, optimizer, end, start=start, log=recorder.log)
        recorder.event("merge", layers=2)


@pytest.fixture(scope="module")
def in_directory(tmp_path_factory):
    """The same training recorded into a directory."""
    path = tmp_path_factory.mktemp("truth") / "run.zarr"
    trained(path, 12)
    return xr.open_datatree(path, engine="zarr").load()


def tree_of(store):
    return xr.open_datatree(store, engine="zarr").load()


def assert_begins_as(tree, in_directory):
    """Each record that is shown equals the one in a directory; returns how many."""
    steps = tree["step"].values.tolist()
    assert steps == in_directory["step"].values[: len(steps)].tolist()
    for group in ("weight", "gradient", "scalars"):
        for name, values in tree[group].data_vars.items() if group in tree else ():
            expected = in_directory[group][name].values[: len(steps)]
            assert values.values.tobytes() == expected.tobytes(), (group, name)
    return len(steps)


@pytest.mark.slow
def test_every_commit_shows_whole_records_and_the_last_one_all_of_a_directory(
    repository, in_directory
):
    trained(repository, 12)

    history = list(repository.ancestry(branch="main"))[::-1]
    counts = []
    for snapshot in history:
        store = repository.readonly_session(snapshot_id=snapshot.id).store
        if snapshot.message not in ("Repository initialized", "a writer begins"):
            counts.append(assert_begins_as(tree_of(store), in_directory))
    assert counts == sorted(counts)
    assert set(counts) == set(range(14))
    assert history[-2].message == "merge at step 12"
    tree = tree_of(repository.readonly_session("main").store)
    assert set(tree["events"].data_vars) == set(in_directory["events"].data_vars)
    assert tree["events"]["kind"].values.tolist() == ["merge"]
    assert tree.attrs["gradient"] == in_directory.attrs["gradient"]


@pytest.mark.slow
def test_a_run_in_a_repository_is_measured_as_one_in_a_directory(repository, tmp_path):
    trained(repository, 4)
    trained(tmp_path / "run.zarr", 4)

    expected = dy.analyze(tmp_path / "run.zarr").drop_attrs(deep=False)
    for path in (repository, tmp_path / "run"):  # the object, and its folder on this disk
        run = dy.open_run(path)
        assert run.format == "recording"
        xr.testing.assert_identical(dy.analyze(run).drop_attrs(deep=False), expected)
        assert run.verify().sound == 5
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "run"), "--verify"])
    assert (done.exit_code, "5 records" in done.output) == (0, True)


@pytest.mark.slow
def test_a_resumed_repository_holds_what_an_uninterrupted_one_does(repository, in_directory):
    trained(repository, 9)
    with pytest.raises(OutputExistsError, match="already holds a recording of 10 records"):
        trained(repository, 9)

    trained(repository, 12, start=5, resume_at=5)

    assert assert_begins_as(tree_of(repository.readonly_session("main").store), in_directory) == 13
    run = dy.open_run(repository)
    assert [(event.kind, event.step) for event in run.events] == [("resume", 5), ("merge", 12)]
    assert run.verify() == dy.open_run(repository).verify()
    assert not run.verify().damaged
    assert not run.verify().leftovers


def test_a_record_without_a_matrix_does_not_show_that_of_a_dropped_one(repository):
    path = "weight/a.weight"
    attrs = {path: {"source_dtype": "float32"}}
    with RecordingWriter(repository, {}) as writer:
        for step in range(3):
            writer.append(step, {path: np.full((2, 3), step, np.float32)}, attrs=attrs)
        writer.rewind(0)
        writer.append(1, {})
        writer.append(2, {path: np.full((2, 3), 7, np.float32)})
    run = dy.open_run(repository)
    assert run.read("a.weight", 1, "weight") is None
    assert (run.read("a.weight", 2, "weight").values == 7).all()


def test_a_second_writer_is_refused_and_one_taken_over_stops(repository):
    first = RecordingWriter(repository, {})
    first.append(0, {})
    with pytest.raises(RecordingHeldError, match="is being written by this process"):
        RecordingWriter(repository, {}, resume=True)
    second = RecordingWriter(repository, {}, resume=True, take_over=True)

    with pytest.raises(RecordingHeldError, match="changed by another writer since"):
        first.append(1, {})
    first.release()  # leaves the other's lock alone
    second.event(Event(0, "resume", {}))
    second.append(5, {})
    second.close()
    assert dy.open_run(repository).steps.tolist() == [0, 5]


def test_the_store_of_a_session_is_refused(repository, tmp_path):
    model, optimizer = training.build()
    with pytest.raises(DynamicsError, match="give the Repository instead"):
        Recorder(model, optimizer, repository.writable_session("main").store).attach()


def test_a_folder_that_is_no_repository_any_more_is_one_line(repository, tmp_path):
    trained(repository, 1)
    for file in (tmp_path / "run" / "snapshots").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(DynamicsError) as refused:
        dy.open_run(tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.slow
def test_kill_9_loses_no_committed_record_of_a_repository(tmp_path, in_directory):
    moment, resume_at, path = random.Random(3), None, tmp_path / "killed"
    icechunk.Repository.create(local(path))
    for _ in range(2):
        process, numbers = training.start(path, 400, resume_at)
        assert (resume_at or 0) + 6 in numbers
        time.sleep(moment.random() * 0.05)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        tree = tree_of(icechunk.Repository.open(local(path)).readonly_session("main").store)
        steps = tree["step"].values.tolist()
        assert steps == list(range(len(steps)))
        assert len(steps) >= (resume_at or 0) + 2
        for group in ("weight", "gradient"):
            for name, values in tree[group].data_vars.items():
                shown = min(len(steps), 13)
                expected = in_directory[group][name].values[:shown]
                np.testing.assert_array_equal(values.values[:shown], expected)
        assert not dy.open_run(path).verify().damaged
        resume_at = len(steps) - 2


@pytest.mark.slow
def test_a_repository_on_an_object_store(s3, in_directory):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    storage = icechunk.s3_storage(
        bucket="bucket", prefix="icechunk", endpoint_url=endpoint, allow_http=True,
        force_path_style=True, from_env=True, region="us-east-1",
    )  # fmt: skip
    repository = icechunk.Repository.create(storage)
    trained(repository, 6)
    trained(repository, 12, start=4, resume_at=4)

    again = icechunk.Repository.open(storage)
    assert assert_begins_as(tree_of(again.readonly_session("main").store), in_directory) == 13
    assert dy.open_run(again).verify().sound == 13
    assert s3.ls("bucket/icechunk")
