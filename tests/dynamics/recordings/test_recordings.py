import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import LocalStore, MemoryStore, WrapperStore

from dynamics.errors import DynamicsError, FormatError, OutputExistsError
from dynamics.recordings import Recording, RecordingWriter, factor_path, matrix_path, paths
from dynamics.runs.run import Event

W, G = matrix_path("weight", "a.weight"), matrix_path("gradient", "a.weight")
LATE = matrix_path("weight", "late.weight")
A, B = factor_path("a.weight", "A"), factor_path("a.weight", "B")


def matrix(seed, shape=(4, 3)):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def same(found, expected):
    return found is not None and found.dtype == expected.dtype and np.array_equal(found, expected)


class Dead(Exception):
    """The writer's process died here."""


class Mortal(WrapperStore):
    """A store whose n-th write fails, and every one after it: the process is gone."""

    def __init__(self, store, writes=None):
        super().__init__(store)
        self.left = writes
        self.done = 0

    def _with_store(self, store):
        return self  # zarr asks for a copy with another mode; the count must be shared

    def _count(self):
        if self.left is not None and self.done >= self.left:
            raise Dead
        self.done += 1

    async def set(self, key, value):
        self._count()
        await super().set(key, value)

    async def set_if_not_exists(self, key, value):
        self._count()
        await super().set_if_not_exists(key, value)

    async def delete(self, key):
        self._count()
        await super().delete(key)

    async def delete_dir(self, prefix):
        # One key after another, as a killed rmtree or an object store would leave it.
        prefix = f"{prefix}/" if prefix and not prefix.endswith("/") else prefix
        for key in sorted([key async for key in self.list_prefix(prefix)]):
            await self.delete(key)


# What is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "memory"])
def test_what_is_appended_is_read_back_bit_identical(tmp_path, kind):
    store = tmp_path / "run.zarr" if kind == "path" else MemoryStore()
    writer = RecordingWriter(store, {"config": {"layers": 2}})
    writer.append(0, {W: matrix(0)}, attrs={W: {"source_dtype": "bfloat16"}}, tokens=0)
    writer.append(5, {W: matrix(1), G: matrix(2)}, scalars={"loss": 1.5}, tokens=640)
    writer.event(Event(5, "merge", {"index": 1}))

    recording = Recording(store)
    assert recording.steps.tolist() == [0, 5]
    assert same(recording.read(W, 0), matrix(0))
    assert same(recording.read(W, 1), matrix(1))
    assert same(recording.read(G, 1), matrix(2))
    assert recording.array(W).attrs["source_dtype"] == "bfloat16"
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
    RecordingWriter(store, {}).append(0, {W: values})
    read = Recording(store).read(W, 0)
    assert read is not None
    assert read.dtype == dtype
    assert read.tobytes() == values.tobytes()


@pytest.mark.parametrize("kind", ["path", "memory"])
def test_plain_xarray_shows_the_records_with_named_dimensions(tmp_path, kind):
    store = str(tmp_path / "run.zarr") if kind == "path" else MemoryStore()
    writer = RecordingWriter(store, {"note": "hello"})
    for step in (0, 5):
        writer.append(
            step, {W: matrix(step), A: matrix(1, (2, 3)), B: matrix(2, (4, 2))}, scalars={"lr": 1.0}
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
    RecordingWriter(tmp_path / "run.zarr", {}).append(3, {W: matrix(0)})
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
    writer.append(0, {W: matrix(0)})
    writer.append(1, {W: matrix(1), G: nan})
    writer.append(2, {W: matrix(2)})
    recording = Recording(store)
    assert recording.read(G, 0) is None
    assert same(np.isnan(recording.read(G, 1)), np.ones((4, 3), bool))
    assert recording.read(G, 2) is None


def test_a_matrix_of_zeros_is_recorded_as_zeros():
    store = MemoryStore()
    RecordingWriter(store, {}).append(0, {W: np.zeros((4, 3), np.float32)})
    assert same(Recording(store).read(W, 0), np.zeros((4, 3), np.float32))


def test_an_array_that_was_never_recorded_reads_as_none():
    store = MemoryStore()
    RecordingWriter(store, {}).append(0, {W: matrix(0)})
    assert Recording(store).read(G, 0) is None


def test_matrices_and_scalars_may_appear_later():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    writer.append(0, {W: matrix(0)})
    writer.append(1, {W: matrix(1)}, scalars={"loss": 2.0})
    writer.append(2, {W: matrix(2), LATE: matrix(9)}, scalars={"eval/loss": 3.0}, tokens=7)
    recording = Recording(store)
    assert [recording.read(LATE, index) is None for index in range(3)] == [True, True, False]
    np.testing.assert_array_equal(recording.scalars["loss"], [np.nan, 2.0, np.nan])
    np.testing.assert_array_equal(recording.scalars["eval/loss"], [np.nan, np.nan, 3.0])
    np.testing.assert_array_equal(recording.scalars["tokens"], [np.nan, np.nan, 7])


def test_series_longer_than_a_chunk_are_kept(monkeypatch):
    monkeypatch.setattr(paths, "SERIES_CHUNK", 4)
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    for index in range(11):
        writer.append(index, {W: matrix(index)}, scalars={"loss": index})
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


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [10, 9])
def test_a_step_that_does_not_follow_the_last_is_refused(step):
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    writer.append(10, {W: matrix(0)})
    with pytest.raises(DynamicsError, match=f"step {step} cannot follow the last one, at step 10"):
        writer.append(step, {W: matrix(1)})
    writer.append(11, {W: matrix(2)})
    assert Recording(store).steps.tolist() == [10, 11]
    assert same(Recording(store).read(W, 0), matrix(0))


def test_a_change_of_shape_is_refused_and_leaves_no_trace():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    writer.append(0, {W: matrix(0)})
    with pytest.raises(DynamicsError, match=r"a\.weight had shape \(4, 3\) but has \(5, 3\)"):
        writer.append(1, {LATE: matrix(1), W: matrix(1, (5, 3))}, scalars={"loss": 1.0})
    writer.append(2, {W: matrix(2)})
    recording = Recording(store)
    assert recording.steps.tolist() == [0, 2]
    assert same(recording.read(W, 1), matrix(2))
    assert LATE not in recording.paths
    assert "loss" not in recording.scalars


def test_an_existing_recording_is_refused_without_resume_and_left_alone(tmp_path):
    path = tmp_path / "run.zarr"
    RecordingWriter(path, {}).append(0, {W: matrix(0)})
    with pytest.raises(OutputExistsError, match=r"already holds a recording of 1 records.*resume"):
        RecordingWriter(path, {})
    assert same(Recording(path).read(W, 0), matrix(0))


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


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"zarr_format": 3}'])
def test_a_damaged_root_is_named_and_left_alone(tmp_path, content):
    path = tmp_path / "run.zarr"
    RecordingWriter(path, {}).append(0, {W: matrix(0)})
    (path / "zarr.json").write_text(content)
    for attempt in (Recording, lambda path: RecordingWriter(path, {}, resume=True)):
        with pytest.raises(FormatError, match=r"run\.zarr"):
            attempt(path)
    assert (path / "weight/a.weight/c/0/0/0").is_file()


def test_records_survive_the_loss_of_the_consolidated_metadata(tmp_path):
    path = tmp_path / "run.zarr"
    RecordingWriter(path, {}).append(0, {W: matrix(0)})
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
    RecordingWriter(path, {}).append(0, {W: matrix(0, (40, 30))})
    chunk = path / "weight/a.weight/c/0/0/0"
    content = {"cut": chunk.read_bytes()[:-40], "garbage": b"\0\1garbage", "empty": b""}[damage]
    chunk.write_bytes(content)
    with pytest.raises(FormatError, match=r"weight/a\.weight"):
        Recording(path).read(W, 0)


# Going on -------------------------------------------------------------------------------------


def test_resuming_goes_on_after_the_last_record(tmp_path):
    path = tmp_path / "run.zarr"
    writer = RecordingWriter(path, {"config": 1})
    writer.append(0, {W: matrix(0), G: matrix(5)}, scalars={"loss": 1.0})
    writer.event(Event(0, "merge", {}))
    writer.close()
    writer = RecordingWriter(path, {"config": 2}, resume=True)
    assert writer.steps == (0,)
    writer.append(1, {W: matrix(1)})
    writer.event(Event(1, "merge", {}))
    recording = Recording(path)
    assert recording.steps.tolist() == [0, 1]
    assert same(recording.read(W, 0), matrix(0))
    assert same(recording.read(W, 1), matrix(1))
    assert same(recording.read(G, 0), matrix(5))
    assert recording.read(G, 1) is None
    assert [event.step for event in recording.events] == [0, 1]
    assert recording.attrs["config"] == 1


def test_resuming_where_there_is_nothing_starts_a_recording(tmp_path):
    RecordingWriter(tmp_path / "run.zarr", {}, resume=True).append(0, {W: matrix(0)})
    assert Recording(tmp_path / "run.zarr").steps.tolist() == [0]


def test_rewinding_drops_later_records_and_events_from_the_step_on():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    for step in (0, 10, 20, 30):
        writer.append(
            step, {W: matrix(step), G: matrix(step + 1)}, scalars={"loss": step}, tokens=1
        )
        writer.event(Event(step, "merge", {"step": step}))
    assert writer.rewind(10) == 2
    recording = Recording(store)
    assert recording.steps.tolist() == [0, 10]
    assert [event.step for event in recording.events] == [0]
    writer.append(25, {W: matrix(99)})
    recording = Recording(store)
    assert recording.steps.tolist() == [0, 10, 25]
    assert same(recording.read(W, 1), matrix(10))
    assert same(recording.read(W, 2), matrix(99))
    assert recording.read(G, 2) is None
    np.testing.assert_array_equal(recording.scalars["loss"], [0, 10, np.nan])
    np.testing.assert_array_equal(recording.scalars["tokens"], [1, 1, np.nan])
    assert [event.step for event in recording.events] == [0]


def test_rewinding_to_between_two_records_keeps_the_earlier_one():
    writer = RecordingWriter(MemoryStore(), {})
    for step in (0, 10, 20):
        writer.append(step, {W: matrix(step)})
    assert writer.rewind(15) == 1
    assert writer.steps == (0, 10)
    assert writer.rewind(-1) == 2
    assert writer.steps == ()


def test_rewinding_to_the_last_step_changes_no_record():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    writer.append(0, {W: matrix(0)})
    assert writer.rewind(0) == 0
    assert same(Recording(store).read(W, 0), matrix(0))


# Dying ----------------------------------------------------------------------------------------


def history(writer):
    """Every kind of write, one committed change after another."""
    yield writer.append(0, {W: matrix(0)}, tokens=0)
    yield writer.append(1, {W: matrix(1), G: matrix(11)}, scalars={"loss": 1.0}, tokens=5)
    yield writer.event(Event(1, "merge", {"n": 1}))
    yield writer.append(2, {W: matrix(2), G: matrix(12), LATE: matrix(22)}, scalars={"loss": 2.0})
    yield writer.event(Event(2, "merge", {"n": 2}))
    yield writer.rewind(1)
    yield writer.append(3, {W: matrix(3)}, scalars={"grad_norm": 3.0})


def contents(store):
    """All that a recording shows, in terms that == compares."""
    recording = Recording(store)
    matrices = {
        (path, int(step)): None if values is None else values.tobytes()
        for path in recording.paths
        if path.startswith(("weight/", "gradient/"))
        for index, step in enumerate(recording.steps)
        for values in [recording.read(path, index)]
    }
    scalars = {name: values.tobytes() for name, values in recording.scalars.items()}
    return recording.steps.tolist(), matrices, scalars, recording.events


def in_plain_xarray(store):
    """The same, as open_datatree shows it."""
    with xr.open_datatree(store, engine="zarr") as tree:
        steps = tree["step"].values.tolist()
        found = {
            f"{group}/{name}": values.values
            for group in ("weight", "gradient")
            if group in tree
            for name, values in tree[group].data_vars.items()
        }
    return steps, found


def snapshots():
    """contents() after each change of an undisturbed history, and how many writes lead there."""
    store = Mortal(MemoryStore())
    writer = RecordingWriter(store, {})
    states, writes = [contents(store)], [store.done]
    for _ in history(writer):
        states.append(contents(store))
        writes.append(store.done)
    return states, writes


CHANGES = ["create", "first", "gradient", "event", "late", "second event", "rewind", "again"]


@pytest.fixture(scope="module")
def undisturbed():
    return snapshots()


@pytest.mark.parametrize("change", range(len(CHANGES)), ids=CHANGES)
def test_a_writer_that_dies_at_any_write_leaves_whole_records(undisturbed, change):
    states, boundaries = undisturbed
    assert len(states) == len(CHANGES)
    first = boundaries[change - 1] if change else 0
    assert boundaries[change] - first >= 4  # the change takes several writes to tear apart
    for writes in range(first, boundaries[change]):
        die_and_go_on(states, boundaries, writes)


def live(store, survived):
    """Write the history; a change that was committed is noted in `survived`."""
    for _ in history(RecordingWriter(store, {})):
        survived.append(True)


def die_and_go_on(states, boundaries, writes):
    memory = MemoryStore()
    survived = []
    with pytest.raises(Dead):
        live(Mortal(memory, writes), survived)
    done = len(survived)
    created = writes >= boundaries[0]
    if created:
        # What the dying change did is visible as a whole or not at all.
        found = contents(memory)
        assert found in (states[done], states[done + 1])
        steps, shown = in_plain_xarray(memory)
        assert steps == found[0]
        for path, values in shown.items():
            assert len(values) == len(steps)
            for step, value in zip(steps, values, strict=True):
                kept = found[1][path, step]
                assert np.isnan(value).all() if kept is None else value.tobytes() == kept
    else:
        found = ([], {}, {}, ())

    # Another process goes on, at the index of the torn record, without a gradient and a loss.
    writer = RecordingWriter(memory, {}, resume=True, take_over=True)
    assert list(writer.steps) == found[0]
    writer.append(50, {W: matrix(50)})
    writer.append(51, {W: matrix(51), G: matrix(61), LATE: matrix(71)})
    writer.event(Event(51, "merge", {"n": 51}))
    steps, matrices, scalars, events = contents(memory)
    assert steps == [*found[0], 50, 51]
    assert matrices == found[1] | {
        **{(path, 50): None for path in (G, LATE)},
        **{(LATE, step): found[1].get((LATE, step)) for step in found[0]},
        **{(G, step): found[1].get((G, step)) for step in found[0]},
        **{(W, 50): matrix(50).tobytes(), (W, 51): matrix(51).tobytes()},
        **{(G, 51): matrix(61).tobytes(), (LATE, 51): matrix(71).tobytes()},
    }
    for name, values in scalars.items():
        kept = np.frombuffer(found[2].get(name, np.full(len(found[0]), np.nan).tobytes()))
        np.testing.assert_array_equal(np.frombuffer(values), [*kept, np.nan, np.nan])
    assert events == (*found[3], Event(51, "merge", {"n": 51}))
    assert in_plain_xarray(memory)[0] == steps


def test_a_reader_that_opened_earlier_keeps_its_view_while_records_are_added():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    writer.append(0, {W: matrix(0)})
    early = Recording(store)
    writer.append(1, {W: matrix(1)})
    assert early.steps.tolist() == [0]
    assert same(early.read(W, 0), matrix(0))
    assert Recording(store).steps.tolist() == [0, 1]


def test_a_writer_whose_append_failed_may_try_again_without_leftovers():
    memory = MemoryStore()
    store = Mortal(memory)
    writer = RecordingWriter(store, {})
    writer.append(0, {W: matrix(0), G: matrix(10)})
    store.left = store.done + 6
    with pytest.raises(Dead):
        writer.append(1, {W: matrix(1), G: matrix(11)}, scalars={"loss": 1.0})
    store.left = None
    writer.append(1, {W: matrix(1)})
    recording = Recording(memory)
    assert same(recording.read(W, 1), matrix(1))
    assert recording.read(G, 1) is None


@pytest.mark.slow
def test_a_writer_that_is_killed_for_real_leaves_whole_records(tmp_path):
    import signal
    import subprocess
    import sys

    script = (
        "import sys, numpy as np\n"
        "from dynamics.recordings import RecordingWriter\n"
        "writer = RecordingWriter(sys.argv[1], {})\n"
        "for step in range(100000):\n"
        "    writer.append(step, {'weight/a': np.full((64, 64), step, np.float32)},\n"
        "                  scalars={'loss': step})\n"
        "    print(step, flush=True)\n"
    )
    path = tmp_path / "run.zarr"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 7:
            process.send_signal(signal.SIGKILL)
            break
    printed = [int(line) for line in process.stdout]
    process.wait()
    process.stdout.close()
    recording = Recording(path)
    last = max([7, *printed])
    assert recording.steps.tolist()[: last + 1] == list(range(last + 1))
    for index, step in enumerate(recording.steps):
        assert same(recording.read("weight/a", index), np.full((64, 64), step, np.float32))
    np.testing.assert_array_equal(recording.scalars["loss"], recording.steps)
    with xr.open_datatree(str(path), engine="zarr") as tree:
        assert tree["step"].values.tolist() == recording.steps.tolist()
    writer = RecordingWriter(path, {}, resume=True)
    writer.append(10**6, {"weight/a": np.zeros((64, 64), np.float32)})
    assert Recording(path).steps[-1] == 10**6


def test_the_store_may_be_given_as_a_path_or_as_text(tmp_path: Path):
    RecordingWriter(str(tmp_path / "run.zarr"), {}).append(0, {W: matrix(0)})
    assert same(Recording(tmp_path / "run.zarr").read(W, 0), matrix(0))
