"""What was written is read back, by this package, xarray and zarr; damage is named."""

import json

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import MemoryStore

from dynamics.errors import FormatError
from dynamics.recordings import Recording, RecordingWriter, paths
from dynamics.runs.run import Event
from tests.dynamics.recordings.small_matrices import (
    FACTOR_A,
    FACTOR_B,
    GRADIENT,
    LATE_WEIGHT,
    WEIGHT,
    is_same,
    matrix,
)


@pytest.mark.parametrize("kind", ["path", "memory"])
def test_what_is_appended_is_read_back_bit_identical(tmp_path, kind):
    store = tmp_path / "run.zarr" if kind == "path" else MemoryStore()
    writer = RecordingWriter(store, {"config": {"layers": 2}})
    writer.append(0, {WEIGHT: matrix(0)}, attrs={WEIGHT: {"source_dtype": "bfloat16"}}, tokens=0)
    writer.append(5, {WEIGHT: matrix(1), GRADIENT: matrix(2)}, scalars={"loss": 1.5}, tokens=640)
    writer.event(Event(5, "merge", {"index": 1}))

    recording = Recording(store)
    assert recording.steps.tolist() == [0, 5]
    assert is_same(recording.read(WEIGHT, 0), matrix(0))
    assert is_same(recording.read(WEIGHT, 1), matrix(1))
    assert is_same(recording.read(GRADIENT, 1), matrix(2))
    assert recording.array(WEIGHT).attrs["source_dtype"] == "bfloat16"
    assert recording.attrs["config"] == {"layers": 2}
    assert recording.events == (Event(5, "merge", {"index": 1}),)
    np.testing.assert_array_equal(recording.scalars["loss"], [np.nan, 1.5])
    np.testing.assert_array_equal(recording.scalars["tokens"], [0, 640])
    assert recording.parameters("weight") == recording.parameters("gradient") == ["a.weight"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_float_dtype_of_zarr_keeps_its_bits(dtype):
    values = matrix(0).astype(dtype)
    values[0, 0], values[0, 1] = np.nan, -np.inf
    store = MemoryStore()
    RecordingWriter(store, {}).append(0, {WEIGHT: values})
    read = Recording(store).read(WEIGHT, 0)
    assert read is not None
    assert read.dtype == dtype
    assert read.tobytes() == values.tobytes()


@pytest.mark.parametrize("kind", ["path", "memory"])
def test_plain_xarray_shows_the_records_with_named_dimensions(tmp_path, kind):
    store = str(tmp_path / "run.zarr") if kind == "path" else MemoryStore()
    writer = RecordingWriter(store, {"note": "hello"})
    for step in (0, 5):
        writer.append(
            step,
            {WEIGHT: matrix(step), FACTOR_A: matrix(1, (2, 3)), FACTOR_B: matrix(2, (4, 2))},
            scalars={"lr": 1.0},
        )
    writer.event(Event(5, "merge", {}))
    with xr.open_datatree(store, engine="zarr") as tree:
        assert tree["step"].values.tolist() == [0, 5]
        assert tree["weight/a.weight"].dims == ("step", "out_4", "in_3")
        assert tree["adapter/a.weight/A"].dims == ("step", "rank_2", "in_3")
        assert tree["adapter/a.weight/B"].dims == ("step", "out_4", "rank_2")
        assert tree["scalars/lr"].dims == ("step",)
        assert tree["events/kind"].values.tolist() == ["merge"]
        assert tree.attrs["note"] == "hello"
        np.testing.assert_array_equal(tree["weight/a.weight"].sel(step=5).values, matrix(5))


def test_plain_zarr_shows_the_records(tmp_path):
    RecordingWriter(tmp_path / "run.zarr", {}).append(3, {WEIGHT: matrix(0)})
    root = zarr.open_group(str(tmp_path / "run.zarr"), mode="r")
    np.testing.assert_array_equal(root["weight/a.weight"][0], matrix(0))
    assert root["weight/a.weight"].metadata.dimension_names == ("step", "out_4", "in_3")
    assert root["step"][:].tolist() == [3]


def test_a_recording_without_records_opens(tmp_path):
    RecordingWriter(tmp_path / "run.zarr", {})
    assert Recording(tmp_path / "run.zarr").steps.tolist() == []
    with xr.open_datatree(str(tmp_path / "run.zarr"), engine="zarr") as tree:
        assert tree.sizes["step"] == 0


def test_a_missing_gradient_reads_as_none_and_one_recorded_as_nan_reads_as_nan():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    nan = np.full((4, 3), np.nan, np.float32)
    writer.append(0, {WEIGHT: matrix(0)})
    writer.append(1, {WEIGHT: matrix(1), GRADIENT: nan})
    writer.append(2, {WEIGHT: matrix(2)})
    recording = Recording(store)
    assert recording.read(GRADIENT, 0) is None
    assert is_same(np.isnan(recording.read(GRADIENT, 1)), np.ones((4, 3), bool))
    assert recording.read(GRADIENT, 2) is None


def test_a_matrix_of_zeros_is_recorded_as_zeros():
    store = MemoryStore()
    RecordingWriter(store, {}).append(0, {WEIGHT: np.zeros((4, 3), np.float32)})
    assert is_same(Recording(store).read(WEIGHT, 0), np.zeros((4, 3), np.float32))


def test_an_array_that_was_never_recorded_reads_as_none():
    store = MemoryStore()
    RecordingWriter(store, {}).append(0, {WEIGHT: matrix(0)})
    assert Recording(store).read(GRADIENT, 0) is None


def test_matrices_and_scalars_may_appear_later():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    writer.append(0, {WEIGHT: matrix(0)})
    writer.append(1, {WEIGHT: matrix(1)}, scalars={"loss": 2.0})
    writer.append(
        2, {WEIGHT: matrix(2), LATE_WEIGHT: matrix(9)}, scalars={"eval/loss": 3.0}, tokens=7
    )
    recording = Recording(store)
    assert [recording.read(LATE_WEIGHT, index) is None for index in range(3)] == [True, True, False]
    np.testing.assert_array_equal(recording.scalars["loss"], [np.nan, 2.0, np.nan])
    np.testing.assert_array_equal(recording.scalars["eval/loss"], [np.nan, np.nan, 3.0])
    np.testing.assert_array_equal(recording.scalars["tokens"], [np.nan, np.nan, 7])


def test_series_longer_than_a_chunk_are_kept(monkeypatch):
    monkeypatch.setattr(paths, "SERIES_CHUNK", 4)
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    for index in range(11):
        writer.append(index, {WEIGHT: matrix(index)}, scalars={"loss": index})
        writer.event(Event(index, "resume", {"n": index}))
    writer.rewind(8)
    recording = Recording(store)
    assert recording.steps.tolist() == recording.scalars["loss"].tolist() == list(range(9))
    assert [event.attrs["n"] for event in recording.events] == list(range(8))


def test_events_keep_their_attributes_and_order():
    store = MemoryStore()
    events = (Event(1, "merge", {"a": [1, "ü"]}), Event(1, "optimizer_reset", {}))
    writer = RecordingWriter(store, {})
    for event in events:
        writer.event(event)
    assert Recording(store).events == events


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"zarr_format": 3}'])
def test_a_damaged_root_is_named_and_left_alone(tmp_path, content):
    path = tmp_path / "run.zarr"
    RecordingWriter(path, {}).append(0, {WEIGHT: matrix(0)})
    (path / "zarr.json").write_text(content)
    for attempt in (Recording, lambda path: RecordingWriter(path, {}, resume=True)):
        with pytest.raises(FormatError, match=r"run\.zarr"):
            attempt(path)
    assert (path / "weight/a.weight/c/0/0/0").is_file()


def test_records_survive_the_loss_of_the_consolidated_metadata(tmp_path):
    path = tmp_path / "run.zarr"
    RecordingWriter(path, {}).append(0, {WEIGHT: matrix(0)})
    root = json.loads((path / "zarr.json").read_text())
    del root["consolidated_metadata"]
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(FormatError, match=r"run\.zarr"):
        RecordingWriter(path, {})
    assert (path / "weight/a.weight/c/0/0/0").is_file()


def test_an_unknown_version_is_refused(tmp_path):
    path = tmp_path / "run.zarr"
    RecordingWriter(path, {"format_version": 7})
    with pytest.raises(FormatError, match="version 7; this release reads 1 to 2"):
        Recording(path)


def test_a_path_that_does_not_exist_is_no_recording(tmp_path):
    with pytest.raises(FormatError, match="nowhere"):
        Recording(tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_chunk_is_an_error_that_names_it(tmp_path, damage):
    path = tmp_path / "run.zarr"
    RecordingWriter(path, {}).append(0, {WEIGHT: matrix(0, (40, 30))})
    chunk = path / "weight/a.weight/c/0/0/0"
    content = {"cut": chunk.read_bytes()[:-40], "garbage": b"\0\1garbage", "empty": b""}[damage]
    chunk.write_bytes(content)
    with pytest.raises(FormatError, match=r"weight/a\.weight"):
        Recording(path).read(WEIGHT, 0)
