"""A recording written to an object store, read there while it grows."""

import numpy as np
import pytest
import xarray as xr
from zarr.storage import FsspecStore

import dynamics as dy
from dynamics.errors import FormatError, OutputExistsError, RecordingHeldError
from dynamics.recordings import Recording, RecordingWriter, verify

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")


def record(step):
    return {"weight/a.weight": np.full((4, 3), step, np.float32)}


@pytest.fixture(params=["url", "store"])
def place(request, s3):
    """(what a writer is given, its URL)."""
    # Brackets, as parametrised names have them, are patterns to fsspec's deletion.
    url = f"s3://bucket/{request.node.originalname}-{request.param}/run.zarr"
    return (url if request.param == "url" else FsspecStore.from_url(url)), url


def test_a_recording_on_s3_is_read_while_it_grows(place):
    store, url = place
    attrs = {"weight/a.weight": {"source_dtype": "float32"}}
    with RecordingWriter(store, {"note": 1}) as writer:
        for step in range(5):
            writer.append(step, record(step), attrs=attrs, scalars={"loss": step})
            run = dy.open_run(url)
            assert run.steps.tolist() == list(range(step + 1))
            np.testing.assert_array_equal(
                run.read("a.weight", step, "weight").values, record(step)["weight/a.weight"]
            )
        assert writer.rewind(2) == 2
        assert dy.open_run(url).steps.tolist() == [0, 1, 2]
    with xr.open_datatree(url, engine="zarr") as tree:
        assert tree["weight/a.weight"].values[:, 0, 0].tolist() == [0, 1, 2]
    found = verify(Recording(store))
    assert (found.damaged, found.sound, found.leftovers) == ((), 3, ())


def test_a_second_writer_on_s3_is_refused_and_a_dead_one_is_succeeded(place, s3):
    store, url = place
    writer = RecordingWriter(store, {})
    writer.append(0, record(0))
    with pytest.raises(RecordingHeldError, match="is being written by this process"):
        RecordingWriter(url, {}, resume=True)
    with pytest.raises(OutputExistsError, match="recording of 1 records"):
        RecordingWriter(url, {})
    # It died in the middle of a record.
    s3.pipe(f"{url}/weight/a.weight/c/1/0/0", b"half of it")
    again = RecordingWriter(url, {}, resume=True, take_over=True)
    assert not s3.exists(f"{url}/weight/a.weight/c/1/0/0")
    again.append(1, {}, scalars={"loss": 1.0})
    with pytest.raises(RecordingHeldError, match="was taken over"):
        writer.append(1, record(1))
    recording = Recording(url)
    assert recording.steps.tolist() == [0, 1]


def test_what_is_no_recording_on_s3_is_left_alone(s3):
    s3.pipe("bucket/thesis/text.txt", b"years of work")
    with pytest.raises(FormatError, match="is not a recording; choose another path"):
        RecordingWriter("s3://bucket/thesis", {})
    assert s3.find("bucket/thesis") == ["bucket/thesis/text.txt"]


def test_the_recorder_streams_to_s3(s3):
    from probes import Recorder
    from tests.probes.training import build, train

    model, optimizer = build()
    url = "s3://bucket/streamed/run.zarr"
    with Recorder(model, optimizer, url, every=2):
        train(model, optimizer, 4)
    run = dy.open_run(url)
    assert run.steps.tolist() == [0, 2, 4]
    found = run.read("up_proj.weight", 4, "weight").values
    np.testing.assert_array_equal(found, model.up_proj.weight.detach().numpy())
    assert (dy.analyze(url, kinds=["weight"])["status"] == dy.Status.MEASURED).all()
