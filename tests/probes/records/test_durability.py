"""A killed writer loses no committed record, and readers see whole records only."""

import random
import signal
import threading

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from tests.probes import training

pytestmark = pytest.mark.slow

LAST = 120


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Every record of the run that nobody interrupts, as plain arrays."""
    store = tmp_path_factory.mktemp("truth") / "run.zarr"
    process, _ = training.start(store, LAST)  # as the others: with the same number of threads
    process.join()
    assert process.exitcode == 0
    return xr.open_datatree(store, engine="zarr").load()


def _check(store, uninterrupted):
    """Each record that plain xarray shows equals the uninterrupted run; returns how many."""
    tree = xr.open_datatree(store, engine="zarr")
    steps = tree["step"].values
    assert steps.tolist() == list(range(len(steps)))
    for group in ("weight", "gradient"):
        for name in tree[group].data_vars if group in tree else ():
            found = tree[group][name].values
            np.testing.assert_array_equal(found, uninterrupted[group][name].values[: len(steps)])
            assert not np.isnan(found[1:]).any()
    return len(steps)


def test_kill_9_loses_no_committed_record_and_the_run_resumes(tmp_path, uninterrupted):
    store, moment = tmp_path / "run.zarr", random.Random(0)
    resume_at, committed = None, 0
    for _ in range(6):
        process, steps = training.start(store, LAST, resume_at)
        until = min(next(steps) + moment.randint(3, 16), LAST - 1)
        assert until in steps
        threading.Event().wait(moment.random() * 0.01)  # somewhere within a record
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        count = _check(store, uninterrupted)
        assert count >= committed
        # The training thread may be ahead of the writer by its queue, a pending record and one
        # being written; everything before that was committed.
        assert count >= until - 4
        resume_at, committed = count - 1, count
        if resume_at >= 10:
            resume_at -= moment.randint(0, 5)  # the checkpoint is older than the last record
            committed = resume_at + 1
    process, _ = training.start(store, resume_at + 20, resume_at)
    process.join()
    assert process.exitcode == 0
    assert _check(store, uninterrupted) == resume_at + 21
    events = [(event.kind, event.step) for event in dy.open_run(store).events]
    merges = [step for kind, step in events if kind == "merge"]
    assert merges == list(range(0, resume_at + 20, 10))  # each once, the undone ones not twice
    assert ("resume", resume_at) in events


def test_a_reader_beside_the_writer_sees_whole_records_only(tmp_path, uninterrupted):
    store = tmp_path / "run.zarr"
    process, steps = training.start(store, LAST)
    next(steps)
    counts = []
    while process.is_alive():
        counts.append(_check(store, uninterrupted))
        if counts[-1] == 0:
            continue
        ds = dy.analyze(store, metrics=["effective_rank"], kinds=["weight"], steps=[0])
        assert (ds["status"] == dy.Status.MEASURED).all()
    assert process.exitcode == 0
    assert _check(store, uninterrupted) == LAST + 1
    assert len(set(counts)) >= 3  # it did look while the recording grew
    assert counts == sorted(counts)
