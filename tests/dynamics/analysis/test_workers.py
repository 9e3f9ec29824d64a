"""Workers give the serial result to the last bit, also where some of them die."""

import multiprocessing
import os
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
import xarray as xr
from safetensors.numpy import load_file, save_file
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.analysis.analyze import StoppedError, measure
from dynamics.analysis.execution import Execution
from dynamics.analysis.selection import selection_of
from dynamics.analysis.workers import _in_order_of_completion
from dynamics.formats.recording import RecordingRun

# Large enough for the Gram matrix, and for tasks to be under way when a worker dies.
SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (384, 192) for i in range(12)}


@pytest.fixture(scope="module")
def recording(write_recording, tmp_path_factory):
    steps = tuple(range(0, 80, 10))
    return write_recording(tmp_path_factory.mktemp("run") / "run.zarr", shapes=SHAPES, steps=steps)


@pytest.fixture(scope="module")
def serial(recording):
    return dy.analyze(recording)


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as running:
        yield running


def once(action):
    """A `progress` that acts when it is called for the first time, while tasks are under way."""
    done = []

    def progress(*_):
        if not done:
            done.append(action())

    progress.done = done
    return progress


# Processes ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_the_serial_result(recording, serial, tmp_path):
    xr.testing.assert_identical(dy.analyze(recording, workers=2), serial)
    cache = tmp_path / "spectra.cache"
    xr.testing.assert_identical(dy.analyze(recording, workers=2, cache=cache), serial)


@pytest.mark.slow
@pytest.mark.parametrize("components", [["parameters"], ["ov_circuit", "qk_circuit"]])
def test_they_do_for_checkpoints_and_circuits(llama_checkpoints, components):
    one, two = (
        dy.analyze(llama_checkpoints, components=components, workers=workers) for workers in (1, 2)
    )
    xr.testing.assert_identical(one, two)


@pytest.mark.slow
def test_they_do_for_fused_matrices(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4, n_inner=24
    )
    for step in (2, 4):
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / f"checkpoint-{step}")
    one, two = (dy.analyze(tmp_path, workers=workers) for workers in (1, 2))
    assert "q_proj" in one["module"].values
    xr.testing.assert_identical(one, two)


@pytest.mark.slow
def test_what_is_wrong_is_listed_in_the_same_order_and_strictness_raises(
    llama_checkpoints, tmp_path
):
    run = shutil.copytree(llama_checkpoints, tmp_path / "run")
    file = run / "checkpoint-4/model.safetensors"
    stored = load_file(file)
    for name in list(stored)[::3]:
        stored[name][0, ...] = np.nan
    save_file(stored, file)
    (run / "checkpoint-6/model.safetensors").write_bytes(b"")
    with pytest.warns(dy.UnmeasuredWarning):
        one, two = (dy.analyze(run, workers=workers) for workers in (1, 2))
    xr.testing.assert_identical(one, two)
    assert len(one.attrs["problems"]) > 200
    with pytest.raises(dy.DynamicsError, match=r"NaN or Inf|0 bytes") as caught:
        dy.analyze(run, workers=2, strict=True)
    assert caught.tb, "or the frames of the analysis are gone"
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_what_serial_analyses_measured_workers_do_not_and_the_other_way_round(
    recording, serial, tmp_path, monkeypatch
):
    first = tmp_path / "first.cache"
    dy.analyze(recording, cache=first, workers=2)
    monkeypatch.setattr(
        "dynamics.analysis.tasks.spectrum", lambda *_, **__: pytest.fail("measured")
    )
    xr.testing.assert_identical(dy.analyze(recording, cache=first), serial)
    monkeypatch.undo()
    second = tmp_path / "second.cache"
    dy.analyze(recording, cache=second)
    monkeypatch.setattr(
        "dynamics.analysis.analyze.SpectrumCache.put", lambda *_: pytest.fail("measured")
    )
    xr.testing.assert_identical(dy.analyze(recording, cache=second, workers=2), serial)


@pytest.mark.slow
def test_processes_that_are_killed_cost_their_tasks_and_nothing_else(recording, serial):
    killed = []

    def kill(*_):
        if len(killed) < 3:  # so that no task can lose four
            victim = multiprocessing.active_children()[0]
            victim.kill()
            killed.append(victim.pid)

    xr.testing.assert_identical(dy.analyze(recording, workers=2, progress=kill), serial)
    assert len(set(killed)) > 1
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_ctrl_c_reaches_the_workers_and_none_of_them_ends_by_it(recording, serial):
    """A terminal sends it to the whole group. It is the parent's to end them, all at once."""
    workers, interrupted = set(), []

    def interrupt(done, total, _name):
        workers.update(each.pid for each in multiprocessing.active_children())
        if not interrupted and done > total // 3:  # both have begun to work
            interrupted.extend(workers)
            for pid in interrupted:
                os.kill(pid, signal.SIGINT)

    xr.testing.assert_identical(dy.analyze(recording, workers=2, progress=interrupt), serial)
    assert len(interrupted) == 2
    assert workers == set(interrupted), "others were started in their place"


@pytest.mark.slow
def test_killed_processes_leave_no_locks_of_their_libraries_behind(write_recording, tmp_path):
    """Blosc makes one where it first decompresses; Python warns of locks that nobody unlinked."""
    code = "import sys, dynamics as dy; dy.analyze(sys.argv[1], workers=2)"
    command = [sys.executable, "-c", code, str(write_recording(tmp_path / "run.zarr"))]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def die_in_the_middle_of_an_answer():
    for number in range(3, 256):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                os.write(number, struct.pack("!i", 1000) + b"the beginning of it")
    os._exit(1)


class Poisonous(RecordingRun):
    def __reduce__(self):
        return die_in_the_middle_of_an_answer, ()


@pytest.mark.slow
def test_processes_that_die_again_and_again_are_an_error(recording):
    with pytest.raises(dy.DynamicsError, match=r"died 4 times while .*up_proj.*fewer workers"):
        dy.analyze(Poisonous(recording), workers=2)


@pytest.mark.slow
def test_an_analysis_with_workers_can_be_stopped_and_goes_on(recording, serial, tmp_path):
    cache, end = tmp_path / "spectra.cache", []
    with pytest.raises(StoppedError):
        measure(
            selection_of(dy.open_run(recording)),
            Execution(cache=cache, workers=2),
            progress=lambda *_: end.append(1),
            stopped=lambda: bool(end),
        )
    counted = []
    result = dy.analyze(
        recording, cache=cache, progress=lambda done, total, name: counted.append((done, total))
    )
    xr.testing.assert_identical(result, serial)
    assert counted[-1] == (serial["status"].size, serial["status"].size)


def test_what_cannot_be_sent_to_workers_is_refused(write_recording):
    run = dy.open_run(write_recording(MemoryStore()))
    run.unpicklable = lambda: None
    with pytest.raises(dy.DynamicsError, match="cannot be sent to workers"):
        dy.analyze(run, workers=2)
    with pytest.raises(dy.DynamicsError, match="workers is 0"):
        dy.analyze(run, workers=0)


# A Dask cluster -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cluster_gives_the_serial_result(recording, serial, cluster, tmp_path):
    found = dy.analyze(recording, scheduler=cluster.scheduler_address, cache=tmp_path / "c.cache")
    xr.testing.assert_identical(found, serial)


@pytest.mark.slow
def test_a_worker_of_a_cluster_that_is_killed_in_the_middle_is_replaced(recording, serial, cluster):
    from distributed import Client

    with Client(cluster, set_as_default=False) as client:
        before = client.run(os.getpid)

        def kill():
            pid = sorted(before.values())[0]
            os.kill(pid, signal.SIGKILL)
            return pid

        progress = once(kill)
        found = dy.analyze(recording, scheduler=cluster.scheduler_address, progress=progress)
        xr.testing.assert_identical(found, serial)
        end, after = time.monotonic() + 60, {}
        while len(after) < 2 and time.monotonic() < end:
            client.wait_for_workers(2, timeout=60)
            after = client.run(os.getpid, on_error="ignore")
        assert progress.done[0] not in after.values()
        assert len(after) == 2


@pytest.mark.slow
def test_the_job_of_the_docs_gives_the_serial_result(recording, serial, tmp_path):
    pytest.importorskip("distributed")
    docs = Path(__file__).parents[3] / "docs/guides/clusters.md"
    (script,) = re.findall(r"```sh\n( *#!/bin/bash.*?)```", docs.read_text("utf-8"), re.DOTALL)
    for written, here in {
        "--nworkers 64": "--nworkers 1",
        "dask scheduler": "dask scheduler --port 0 --no-dashboard",
        "dask worker": "dask worker --no-dashboard",
        "checkpoints/": str(recording),
    }.items():
        assert written in script
        script = script.replace(written, here)
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            ["bash", "-c", f'srun() {{ sleep 3; "$@"; }}\n{script}'],
            cwd=tmp_path, env=os.environ | path, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            assert job.wait(timeout=200) == 0, (tmp_path / "log").read_text()
        finally:
            os.killpg(job.pid, signal.SIGKILL)  # a job's end ends what it has started
    result = dy.load(tmp_path / "run.analysis.zarr")
    assert result.attrs.pop("command").startswith("dynamics analyze ")
    assert result.attrs.pop("made")
    xr.testing.assert_identical(result, serial)


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "", "{}", "[]"])
def test_a_scheduler_file_that_says_nothing_is_named(recording, tmp_path, monkeypatch, content):
    pytest.importorskip("distributed")
    monkeypatch.setattr("dynamics.analysis.workers._SECONDS_TO_CONNECT", 1)
    file = tmp_path / "scheduler.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(dy.DynamicsError, match=r"No Dask scheduler answers at .*scheduler\.json"):
        dy.analyze(recording, scheduler=str(file))


@pytest.mark.slow
def test_workers_that_join_later_get_tasks():
    workers, flying, most = [2], set(), {2: 0, 20: 0}

    def submit(task):
        future = Future()
        flying.add(future)
        most[workers[0]] = max(most[workers[0]], len(flying))
        Timer(0.2, lambda: (flying.discard(future), future.set_result([]))).start()
        return future

    found = []
    for task, _ in _in_order_of_completion(
        submit, iter(range(200)), lambda: workers[0], lambda: False
    ):
        found.append(task)
        if len(found) == 20:
            workers[0] = 20
    assert sorted(found) == list(range(200))
    assert most == {2: 6, 20: 60}


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_named(recording, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("dynamics.analysis.workers._SECONDS_TO_CONNECT", 1)
    with pytest.raises(dy.DynamicsError, match=r"No Dask scheduler answers at tcp://127.0.0.1:1"):
        dy.analyze(recording, scheduler="tcp://127.0.0.1:1")


def test_the_extra_that_a_scheduler_needs_is_named(recording, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(dy.DynamicsError, match=r"pip install 'learning-dynamics\[distributed\]'"):
        dy.analyze(recording, scheduler="tcp://127.0.0.1:1")
