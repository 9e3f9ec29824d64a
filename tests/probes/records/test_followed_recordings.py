"""An analysis keeps up with a training that records, on every kind of store."""

import threading
import time

import pytest

import dynamics as dy
from dynamics.analysis.following import follow
from probes import Recorder
from tests.probes import training


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.slow), "icechunk"])
def stores(request, tmp_path):
    """(what a recorder writes to, a function that opens it as somebody else would)."""
    if request.param == "directory":
        return tmp_path / "run.zarr", lambda: dy.open_run(tmp_path / "run.zarr")
    if request.param == "s3":
        request.getfixturevalue("s3")
        url = f"s3://bucket/{tmp_path.name}/run.zarr"
        return url, lambda: dy.open_run(url)
    icechunk = pytest.importorskip("icechunk", reason="needs the extra icechunk")
    storage = icechunk.local_filesystem_storage(str(tmp_path / "run"))
    made = icechunk.Repository.create(storage)
    return made, lambda: dy.open_run(icechunk.Repository.open(storage))


@pytest.mark.slow
def test_each_record_of_a_training_is_measured_while_it_goes_on(stores):
    store, opened = stores
    found, done = [], threading.Event()

    def look():
        for result in follow(opened, stopped=done.is_set, interval=0.05, kinds=["weight"]):
            assert (result["status"] == dy.Status.MEASURED).all()
            found.append(result["step"].values.tolist())

    reader = threading.Thread(target=look)
    reader.start()
    model, optimizer = training.build()
    with Recorder(model, optimizer, store, every=1) as recorder:
        for step in range(1, 5):
            training.train(model, optimizer, step, start=step - 1)
            recorder.flush()
            until(lambda step=step: found and found[-1] == list(range(step + 1)))
    done.set()
    reader.join(60)
    assert not reader.is_alive()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)
