"""One writer per recording: who comes second is told, who died is succeeded."""

import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import MemoryStore

from dynamics.errors import OutputExistsError, RecordingHeldError
from dynamics.recordings import Recording, RecordingWriter
from dynamics.recordings import writer as writer_module
from dynamics.runs.run import Event

LOCK = "writer/zarr.json"
HOLDER = (
    "import sys, time, numpy as np\n"
    "from dynamics.recordings import RecordingWriter\n"
    "writer = RecordingWriter(sys.argv[1], {}, resume=True)\n"
    "writer.append(len(writer.steps), {'weight/a': np.ones((2, 2), np.float32)})\n"
    "print('held', flush=True)\n"
    "time.sleep(600)\n"
)


def record(step):
    return {"weight/a": np.full((2, 2), step, np.float32)}


@pytest.fixture
def held_elsewhere(tmp_path):
    """(a recording that another process is writing, that process)."""
    path = tmp_path / "run.zarr"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield path, process
    process.kill()
    process.wait()
    process.stdout.close()


def pretend(path, **changes):
    """Change who the lock says holds the recording."""
    document = json.loads((path / LOCK).read_text())
    document["attributes"] |= changes
    (path / LOCK).write_text(json.dumps(document))


@pytest.mark.slow
def test_a_second_writer_is_told_in_one_line_who_holds_the_recording(held_elsewhere):
    path, process = held_elsewhere
    before = sorted(path.rglob("*"))
    with pytest.raises(RecordingHeldError) as caught:
        RecordingWriter(path, {}, resume=True)
    told = str(caught.value)
    assert "\n" not in told
    assert str(path) in told
    assert f"process {process.pid} on {platform.node()} since 20" in told
    assert "take_over=True" in told
    assert sorted(path.rglob("*")) == before
    assert Recording(path).steps.tolist() == [0]


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_taken_over(held_elsewhere):
    path, process = held_elsewhere
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (path / LOCK).is_file()
    with RecordingWriter(path, {}, resume=True) as writer:
        writer.append(1, record(1))
    assert Recording(path).steps.tolist() == [0, 1]


@pytest.mark.slow
def test_a_killed_process_that_nobody_waited_for_is_dead_too(held_elsewhere):
    path, process = held_elsewhere
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    RecordingWriter(path, {}, resume=True).close()


def test_a_writer_that_was_taken_over_commits_no_more():
    store = MemoryStore()
    first = RecordingWriter(store, {})
    first.append(0, record(0))
    second = RecordingWriter(store, {}, resume=True, take_over=True)
    second.append(1, record(1))
    with pytest.raises(RecordingHeldError, match="was taken over by this process since 20"):
        first.append(1, record(7))
    with pytest.raises(RecordingHeldError, match="was taken over"):
        first.event(Event(0, "merge", {}))
    first.close()  # must not take the lock away from the second
    second.append(2, record(2))
    assert Recording(store).steps.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "another-machine"},
        {"pid_namespace": "pid:[1]"},  # a container beside this one
    ],
)
def test_a_lock_from_elsewhere_stays_until_it_is_overridden(tmp_path, changes):
    path = tmp_path / "run.zarr"
    writer = RecordingWriter(path, {})
    writer.append(0, record(0))
    pretend(path, pid=2**22 + 5, **changes)
    with pytest.raises(RecordingHeldError, match="pass take_over=True"):
        RecordingWriter(path, {}, resume=True)
    with RecordingWriter(path, {}, resume=True, take_over=True) as writer:
        writer.append(1, record(1))
    assert Recording(path).steps.tolist() == [0, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 + 5},  # beyond the largest number of a Linux process
        {"pid": os.getppid(), "started": "1"},  # the number is another process's now
        {"boot": "before the machine was started anew"},
    ],
)
def test_a_lock_of_a_process_that_is_gone_is_stale(tmp_path, changes):
    path = tmp_path / "run.zarr"
    writer = RecordingWriter(path, {})
    pretend(path, **changes)
    again = RecordingWriter(path, {}, resume=True)
    again.append(0, record(0))
    with pytest.raises(RecordingHeldError, match="was taken over"):
        writer.append(0, record(0))


def test_a_writer_forgotten_without_closing_holds_nothing():
    store = MemoryStore()
    writer = RecordingWriter(store, {})
    with pytest.raises(RecordingHeldError, match="written by this process"):
        RecordingWriter(store, {}, resume=True)
    del writer
    RecordingWriter(store, {}, resume=True).append(0, record(0))


@pytest.mark.slow
def test_closing_leaves_no_lock_and_every_tool_sees_every_record(tmp_path):
    path = tmp_path / "run.zarr"
    with RecordingWriter(path, {}) as writer:
        for step in range(7):
            writer.append(step, record(step), scalars={"loss": step})
            # A reader without the consolidated metadata sees a beginning of the recording.
            lengths = {array.shape[0] for array in arrays(path)}
            assert len(lengths) == 1
            assert lengths.pop() <= step + 1
    assert not (path / LOCK).exists()
    assert {array.shape[0] for array in arrays(path)} == {7}
    with xr.open_zarr(str(path / "weight"), consolidated=False) as found:
        assert found["a"].values[:, 0, 0].tolist() == list(range(7))


def arrays(path):
    root = zarr.open_group(str(path), mode="r", use_consolidated=False)
    return [root[name] for name in ("step", "tokens", "checksum", "weight/a", "scalars/loss")]


def test_a_rewind_is_told_to_readers_without_consolidated_metadata_too(tmp_path):
    path = tmp_path / "run.zarr"
    writer = RecordingWriter(path, {})
    for step in range(7):
        writer.append(step, record(step), scalars={"loss": step})
    writer.rewind(2)
    assert {array.shape[0] for array in arrays(path)} == {3}


def open_at_once(path, start, results):
    start.wait()
    try:
        writer = RecordingWriter(path, {}, resume=True)
        writer.append(0, record(0))
        results.put("wrote")
        start.wait()  # both have tried
    except RecordingHeldError:
        results.put("refused")
        start.wait()


@pytest.mark.slow
def test_of_two_writers_that_begin_in_the_same_moment_one_is_refused(tmp_path):
    context = multiprocessing.get_context("fork" if threading.active_count() == 1 else "spawn")
    start, results = context.Barrier(2), context.Queue()
    path = tmp_path / "run.zarr"
    both = [context.Process(target=open_at_once, args=(path, start, results)) for _ in range(2)]
    for process in both:
        process.start()
    found = sorted(results.get(timeout=60) for _ in both)
    for process in both:
        process.join(60)
    assert found == ["refused", "wrote"]
    assert Recording(path).steps.tolist() == [0]


def test_a_recording_that_came_between_two_looks_is_not_wiped_out(tmp_path, monkeypatch):
    path, lock = tmp_path / "run.zarr", writer_module.WriterLock

    def late(store, **options):
        monkeypatch.setattr(writer_module, "WriterLock", lock)
        with RecordingWriter(path, {}) as other:
            other.append(0, record(0))
        return lock(store, **options)

    monkeypatch.setattr(writer_module, "WriterLock", late)
    with pytest.raises(OutputExistsError, match="already holds a recording of 1 records"):
        RecordingWriter(path, {})
    assert Recording(path).steps.tolist() == [0]
    RecordingWriter(path, {}, resume=True).close()  # the one refused holds no lock
