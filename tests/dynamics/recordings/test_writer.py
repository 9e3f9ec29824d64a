"""What a writer refuses, and how it goes on with a recording or rewinds it."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore

from dynamics.errors import DynamicsError, FormatError, OutputExistsError
from dynamics.recordings import Recording, RecordingWriter
from dynamics.runs.run import Event
from tests.dynamics.recordings.small_matrices import (
    GRADIENT,
    LATE_WEIGHT,
    WEIGHT,
    is_same,
    matrix,
)


@pytest.mark.parametrize("step", [10, 9])
def test_a_step_that_does_not_follow_the_last_is_refused(step):
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    writer.append(10, {WEIGHT: matrix(0)})
    with pytest.raises(DynamicsError, match=f"step {step} cannot follow the last one, at step 10"):
        writer.append(step, {WEIGHT: matrix(1)})
    writer.append(11, {WEIGHT: matrix(2)})
    assert Recording(store).steps.tolist() == [10, 11]
    assert is_same(Recording(store).read(WEIGHT, 0), matrix(0))


def test_a_change_of_shape_is_refused_and_leaves_no_trace():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    writer.append(0, {WEIGHT: matrix(0)})
    with pytest.raises(DynamicsError, match=r"a\.weight had shape \(4, 3\) but has \(5, 3\)"):
        writer.append(1, {LATE_WEIGHT: matrix(1), WEIGHT: matrix(1, (5, 3))}, scalars={"loss": 1.0})
    writer.append(2, {WEIGHT: matrix(2)})
    recording = Recording(store)
    assert recording.steps.tolist() == [0, 2]
    assert is_same(recording.read(WEIGHT, 1), matrix(2))
    assert LATE_WEIGHT not in recording.paths
    assert "loss" not in recording.scalars


def test_an_existing_recording_is_refused_without_resume_and_left_alone(tmp_path):
    path = tmp_path / "run.zarr"
    RecordingWriter(path, {}).append(0, {WEIGHT: matrix(0)})
    with pytest.raises(OutputExistsError, match=r"already holds a recording of 1 records.*resume"):
        RecordingWriter(path, {})
    assert is_same(Recording(path).read(WEIGHT, 0), matrix(0))


def test_a_directory_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for store in (tmp_path, LocalStore(tmp_path)):
        for resume in (False, True):
            with pytest.raises(FormatError, match="is not a recording; choose another path"):
                RecordingWriter(store, {}, resume=resume)
    assert [child.name for child in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("x")
    with pytest.raises(FormatError, match="is not a recording"):
        RecordingWriter(path, {})
    assert path.read_text() == "x"


def test_another_zarr_store_is_refused_and_left_alone(tmp_path):
    group, array = tmp_path / "group.zarr", tmp_path / "array.zarr"
    zarr.create_group(str(group), attributes={"mine": 1})
    zarr.create_array(str(array), shape=(2,), dtype="float32")
    for path in (group, array):
        before = sorted(path.rglob("*"))
        for resume in (False, True):
            with pytest.raises(FormatError, match=path.name):
                RecordingWriter(path, {}, resume=resume)
        assert sorted(path.rglob("*")) == before


def test_resuming_goes_on_after_the_last_record(tmp_path):
    path = tmp_path / "run.zarr"
    writer = RecordingWriter(path, {"config": 1})
    writer.append(0, {WEIGHT: matrix(0), GRADIENT: matrix(5)}, scalars={"loss": 1.0})
    writer.event(Event(0, "merge", {}))
    writer.close()
    writer = RecordingWriter(path, {"config": 2}, resume=True)
    assert writer.steps == (0,)
    writer.append(1, {WEIGHT: matrix(1)})
    writer.event(Event(1, "merge", {}))
    recording = Recording(path)
    assert recording.steps.tolist() == [0, 1]
    assert is_same(recording.read(WEIGHT, 0), matrix(0))
    assert is_same(recording.read(WEIGHT, 1), matrix(1))
    assert is_same(recording.read(GRADIENT, 0), matrix(5))
    assert recording.read(GRADIENT, 1) is None
    assert [event.step for event in recording.events] == [0, 1]
    assert recording.attrs["config"] == 1


def test_resuming_where_there_is_nothing_starts_a_recording(tmp_path):
    RecordingWriter(tmp_path / "run.zarr", {}, resume=True).append(0, {WEIGHT: matrix(0)})
    assert Recording(tmp_path / "run.zarr").steps.tolist() == [0]


def test_rewinding_drops_later_records_and_events_from_the_step_on():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    for step in (0, 10, 20, 30):
        writer.append(
            step,
            {WEIGHT: matrix(step), GRADIENT: matrix(step + 1)},
            scalars={"loss": step},
            tokens=1,
        )
        writer.event(Event(step, "merge", {"step": step}))
    assert writer.rewind(10) == 2
    recording = Recording(store)
    assert recording.steps.tolist() == [0, 10]
    assert [event.step for event in recording.events] == [0]
    writer.append(25, {WEIGHT: matrix(99)})
    recording = Recording(store)
    assert recording.steps.tolist() == [0, 10, 25]
    assert is_same(recording.read(WEIGHT, 1), matrix(10))
    assert is_same(recording.read(WEIGHT, 2), matrix(99))
    assert recording.read(GRADIENT, 2) is None
    np.testing.assert_array_equal(recording.scalars["loss"], [0, 10, np.nan])
    np.testing.assert_array_equal(recording.scalars["tokens"], [1, 1, np.nan])
    assert [event.step for event in recording.events] == [0]


def test_rewinding_to_between_two_records_keeps_the_earlier_one():
    writer = RecordingWriter(MemoryStore(), {})
    for step in (0, 10, 20):
        writer.append(step, {WEIGHT: matrix(step)})
    assert writer.rewind(15) == 1
    assert writer.steps == (0, 10)
    assert writer.rewind(-1) == 2
    assert writer.steps == ()


def test_rewinding_to_the_last_step_changes_no_record():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    writer.append(0, {WEIGHT: matrix(0)})
    assert writer.rewind(0) == 0
    assert is_same(Recording(store).read(WEIGHT, 0), matrix(0))


def test_the_store_may_be_given_as_a_path_or_as_text(tmp_path: Path):
    RecordingWriter(str(tmp_path / "run.zarr"), {}).append(0, {WEIGHT: matrix(0)})
    assert is_same(Recording(tmp_path / "run.zarr").read(WEIGHT, 0), matrix(0))
