"""A writer that dies at any moment leaves whole records, and another can go on."""

import numpy as np
import pytest
import xarray as xr
from zarr.storage import MemoryStore, WrapperStore

from dynamics.recordings import Recording, RecordingWriter
from dynamics.runs.run import Event
from tests.dynamics.recordings.small_matrices import (
    GRADIENT,
    LATE_WEIGHT,
    WEIGHT,
    is_same,
    matrix,
)


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


def history(writer):
    """Every kind of write, one committed change after another."""
    yield writer.append(0, {WEIGHT: matrix(0)}, tokens=0)
    yield writer.append(
        1, {WEIGHT: matrix(1), GRADIENT: matrix(11)}, scalars={"loss": 1.0}, tokens=5
    )
    yield writer.event(Event(1, "merge", {"n": 1}))
    yield writer.append(
        2, {WEIGHT: matrix(2), GRADIENT: matrix(12), LATE_WEIGHT: matrix(22)}, scalars={"loss": 2.0}
    )
    yield writer.event(Event(2, "merge", {"n": 2}))
    yield writer.rewind(1)
    yield writer.append(3, {WEIGHT: matrix(3)}, scalars={"grad_norm": 3.0})


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
FAST = ("first", "second event")  # the other changes take many writes


@pytest.fixture(scope="module")
def undisturbed():
    return snapshots()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(number, id=name, marks=() if name in FAST else pytest.mark.slow)
        for number, name in enumerate(CHANGES)
    ],
)
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
    writer.append(50, {WEIGHT: matrix(50)})
    writer.append(51, {WEIGHT: matrix(51), GRADIENT: matrix(61), LATE_WEIGHT: matrix(71)})
    writer.event(Event(51, "merge", {"n": 51}))
    steps, matrices, scalars, events = contents(memory)
    assert steps == [*found[0], 50, 51]
    assert matrices == found[1] | {
        **{(path, 50): None for path in (GRADIENT, LATE_WEIGHT)},
        **{(LATE_WEIGHT, step): found[1].get((LATE_WEIGHT, step)) for step in found[0]},
        **{(GRADIENT, step): found[1].get((GRADIENT, step)) for step in found[0]},
        **{(WEIGHT, 50): matrix(50).tobytes(), (WEIGHT, 51): matrix(51).tobytes()},
        **{(GRADIENT, 51): matrix(61).tobytes(), (LATE_WEIGHT, 51): matrix(71).tobytes()},
    }
    for name, values in scalars.items():
        kept = np.frombuffer(found[2].get(name, np.full(len(found[0]), np.nan).tobytes()))
        np.testing.assert_array_equal(np.frombuffer(values), [*kept, np.nan, np.nan])
    assert events == (*found[3], Event(51, "merge", {"n": 51}))
    assert in_plain_xarray(memory)[0] == steps


def test_a_reader_that_opened_earlier_keeps_its_view_while_records_are_added():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    writer.append(0, {WEIGHT: matrix(0)})
    early = Recording(store)
    writer.append(1, {WEIGHT: matrix(1)})
    assert early.steps.tolist() == [0]
    assert is_same(early.read(WEIGHT, 0), matrix(0))
    assert Recording(store).steps.tolist() == [0, 1]


def test_a_writer_whose_append_failed_may_try_again_without_leftovers():
    memory = MemoryStore()
    store = Mortal(memory)
    writer = RecordingWriter(store, {})
    writer.append(0, {WEIGHT: matrix(0), GRADIENT: matrix(10)})
    store.left = store.done + 6
    with pytest.raises(Dead):
        writer.append(1, {WEIGHT: matrix(1), GRADIENT: matrix(11)}, scalars={"loss": 1.0})
    store.left = None
    writer.append(1, {WEIGHT: matrix(1)})
    recording = Recording(memory)
    assert is_same(recording.read(WEIGHT, 1), matrix(1))
    assert recording.read(GRADIENT, 1) is None


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
        assert is_same(recording.read("weight/a", index), np.full((64, 64), step, np.float32))
    np.testing.assert_array_equal(recording.scalars["loss"], recording.steps)
    with xr.open_datatree(str(path), engine="zarr") as tree:
        assert tree["step"].values.tolist() == recording.steps.tolist()
    writer = RecordingWriter(path, {}, resume=True)
    writer.append(10**6, {"weight/a": np.zeros((64, 64), np.float32)})
    assert Recording(path).steps[-1] == 10**6
