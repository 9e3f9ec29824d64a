"""`--follow` keeps up with a run that something else writes, until a signal says to stop."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from dynamics.analysis.following import follow
from dynamics.cli import app
from dynamics.formats.storage import tensors
from dynamics.recordings import WEIGHT, Recording, RecordingWriter, matrix_path
from tests.dynamics.analysis.test_cache import settle


def until(condition, seconds=60):
    """Wait until `condition()`; fail after that many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.05)


def steps_of(path):
    """The steps of a saved result, none while there is none."""
    try:
        return dy.load(path)["step"].values.tolist()
    except dy.DynamicsError:
        return []


@pytest.fixture
def start(tmp_path):
    """start(*arguments): `dynamics analyze ... --follow` as a process; its output goes to a log."""
    started = []

    def call(*arguments):
        log = (tmp_path / "log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", "dynamics.cli", "analyze", *map(str, arguments), "--follow",
             "--interval", "0.2"],
            cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def log(tmp_path):
    """log(): the lines printed so far."""
    return lambda: (tmp_path / "log").read_text().splitlines()


def record(writer, step):
    rng = np.random.default_rng(step)
    writer.append(
        step,
        {matrix_path(WEIGHT, "a.weight"): rng.standard_normal((6, 4), np.float32)},
        attrs={matrix_path(WEIGHT, "a.weight"): {"source_dtype": "float32"}},
        scalars={"loss": 1.0 / (1 + step)},
    )


@pytest.mark.slow
def test_a_recording_in_progress_is_followed_from_before_it_exists(start, log, tmp_path):
    process = start("run.zarr")
    until(lambda: log() == ["waiting: run.zarr does not exist."])
    writer = RecordingWriter(tmp_path / "run.zarr", {})
    result = tmp_path / "run.analysis.zarr"
    for number, step in enumerate((0, 10, 20)):
        record(writer, step)
        until(lambda number=number: len(steps_of(result)) == number + 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    xr.testing.assert_identical(
        dy.load(result).drop_attrs(deep=False),
        dy.analyze(tmp_path / "run.zarr").drop_attrs(deep=False),
    )
    assert log() == [
        "waiting: run.zarr does not exist.",
        "step 0: 1 steps measured",
        "step 10: 2 steps measured",
        "step 20: 3 steps measured",
        "Saved to run.analysis.zarr",
    ]


@pytest.mark.slow
def test_checkpoints_are_followed_and_a_half_written_one_is_waited_for(
    start, log, tmp_path, llama_checkpoints
):
    run, result = tmp_path / "run", tmp_path / "out.zarr"
    run.mkdir()
    process = start(run, "-o", result)
    until(lambda: len(log()) == 1)
    assert log()[0].startswith(f"waiting: {run} is empty")
    shutil.copytree(llama_checkpoints / "checkpoint-2", run / "checkpoint-2")
    until(lambda: steps_of(result) == [2])
    whole = (llama_checkpoints / "checkpoint-4/model.safetensors").read_bytes()
    shutil.copytree(llama_checkpoints / "checkpoint-4", run / "checkpoint-4")
    (run / "checkpoint-4/model.safetensors").write_bytes(whole[:1000])
    until(lambda: any("not readable" in line for line in log()))
    (run / "checkpoint-4/model.safetensors").write_bytes(whole)
    until(lambda: log()[-1] == "step 4: 2 steps measured")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not any("warning" in line for line in log())
    saved = dy.load(result)
    assert " --follow" in saved.attrs.pop("command")
    assert saved.attrs.pop("made")
    xr.testing.assert_identical(saved, dy.analyze(run))


@pytest.mark.slow
def test_what_is_still_unreadable_in_the_end_is_a_warning(start, log, tmp_path, llama_checkpoints):
    run = shutil.copytree(llama_checkpoints, tmp_path / "run")
    file = run / "checkpoint-6/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    process = start(run)
    until(lambda: "step 6: 2 steps measured, 1 not readable yet" in log())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1
    assert sum("warning" in line for line in log()) == 1
    assert log()[-1].startswith(f"warning: {file} (1000 bytes)")


@pytest.mark.slow
def test_stopped_before_there_was_anything(start, log, tmp_path):
    process = start("nowhere")
    until(lambda: len(log()) == 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 1
    assert log() == ["waiting: nowhere does not exist.", "warning: nowhere does not exist."]
    assert [child.name for child in tmp_path.iterdir()] == ["log"]


# In this process ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_look_that_finds_nothing_new_reads_no_matrix(
    write_recording, llama_checkpoints, tmp_path, monkeypatch
):
    recording = settle(write_recording(tmp_path / "run.zarr"))
    checkpoints = settle(shutil.copytree(llama_checkpoints, tmp_path / "run"))
    for path in (recording, checkpoints):
        opened, reads = [], []

        def open_run(path=path, opened=opened):
            opened.append(None)
            return dy.open_run(path)

        def read_by(function, reads=reads):
            return lambda *args: reads.append(args) or function(*args)

        with monkeypatch.context() as patched:
            patched.setattr(Recording, "read", read_by(Recording.read))
            patched.setattr(tensors, "read_range", read_by(tensors.read_range))
            results = follow(open_run, stopped=lambda o=opened: len(o) > 4, interval=0.01)
            next(results)
            assert len(reads) > 0
            reads.clear()
            assert list(results) == []
        assert len(opened) == 5
        assert reads == []


@pytest.mark.slow
def test_a_rewritten_checkpoint_gives_another_result(llama_checkpoints, tiny_llama, tmp_path):
    run = settle(shutil.copytree(llama_checkpoints, tmp_path / "run"))
    results = follow(
        lambda: dy.open_run(run),
        stopped=lambda: False,
        interval=0.01,
        cache=tmp_path / "spectra.cache",
    )
    first = next(results)
    tiny_llama(9).save_pretrained(run / "checkpoint-4")
    second = next(results)
    assert not second.equals(first)
    xr.testing.assert_identical(second, dy.analyze(run))


@pytest.mark.slow
def test_a_checkpoint_completed_after_the_last_look_is_no_problem(llama_checkpoints, tmp_path):
    run = shutil.copytree(llama_checkpoints, tmp_path / "run")
    file, stop = run / "checkpoint-6/model.safetensors", []
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    results = follow(lambda: dy.open_run(run), stopped=lambda: bool(stop), interval=0.01)
    assert "1000 bytes" in next(results).attrs["problems"]
    file.write_bytes(whole)
    stop.append(True)
    (last,) = results
    xr.testing.assert_identical(last, dy.analyze(run))


@pytest.mark.slow
def test_a_rewound_recording_is_followed_back(write_recording, tmp_path):
    run = settle(write_recording(tmp_path / "run.zarr"))
    results = follow(lambda: dy.open_run(run), stopped=lambda: False, interval=0.01)
    assert next(results)["step"].values.tolist() == [0, 10, 20]
    RecordingWriter(run, {}, resume=True).rewind(10)
    again = next(results)
    assert again["step"].values.tolist() == [0, 10]
    xr.testing.assert_identical(again, dy.analyze(run))


def test_what_may_still_come_is_waited_for_and_a_mistake_is_not(write_recording, tmp_path):
    run = tmp_path / "run.zarr"
    reasons = []

    def waiting(reason):
        reasons.append(reason)
        if len(reasons) == 1:
            write_recording(run)

    options = {"stopped": lambda: False, "interval": 0.01, "waiting": waiting}
    results = follow(lambda: dy.open_run(run), kinds=["gradient"], **options)
    assert "gradient" in next(results)["kind"]
    assert reasons[0].endswith("does not exist.")
    assert reasons[1] is None
    for mistake in ({"metrics": ["er"]}, {"kinds": ["weights"]}, {"components": ["heads"]},
                    {"select": "nothing"}):  # fmt: skip
        with pytest.raises(dy.DynamicsError, match="No "):
            next(follow(lambda: dy.open_run(run), **mistake, **options))


@pytest.mark.slow
def test_it_stops_between_two_matrices_and_goes_on_from_there(write_recording, tmp_path):
    run, cache, looks = write_recording(tmp_path / "run.zarr"), tmp_path / "spectra.cache", []

    def stopped():
        looks.append(None)
        return len(looks) > 12

    assert list(follow(lambda: dy.open_run(run), stopped=stopped, cache=cache)) == []
    assert 12 < len(looks) < 16
    whole = next(follow(lambda: dy.open_run(run), stopped=lambda: False, cache=cache))
    xr.testing.assert_identical(whole, dy.analyze(run))


# The command: again with the same output ----------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """command(*arguments): (exit code, stdout, stderr) of `dynamics analyze`, in this process."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dynamics", "analyze", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            app.main()
        except SystemExit as ended:
            code = 0 if ended.code is None else ended.code
        return (code, *capfd.readouterr())

    return call


@pytest.mark.slow
def test_an_analysis_is_brought_up_to_date(command, write_recording, tmp_path):
    run = tmp_path / "run.zarr"
    write_recording(run, steps=(0, 10))
    assert command(run, "--metrics", "stable_rank")[0] == 0
    shutil.rmtree(run)
    write_recording(run)
    assert command(os.path.relpath(run))[0] == 0  # the same place, and more metrics and steps
    loaded = dy.load("run.analysis.zarr")
    assert loaded.attrs.pop("command") == "dynamics analyze ../run.zarr"
    assert loaded.attrs.pop("made")
    xr.testing.assert_identical(loaded, dy.analyze(os.path.relpath(run)))
    assert os.path.exists("run.analysis.cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "this would lose step 10, 20"),
        pytest.param(
            ["--kinds", "weight"],
            "this would lose kind gradient, update, displacement",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--metrics", "stable_rank"],
            "this would lose metric condition_number",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--select", "*q_proj"],
            "this would lose matrix model.embed_tokens.weight",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_analysis_that_would_lose_something_is_refused(
    command, write_recording, tmp_path, options, message
):
    run = write_recording(tmp_path / "run.zarr")
    assert command(run)[0] == 0
    before = dy.load("run.analysis.zarr")
    for mode in ([], ["--no-cache"], ["--follow"]):
        code, out, err = command(run, *options, *mode)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert message in err
        assert "--overwrite" in err
    xr.testing.assert_identical(dy.load("run.analysis.zarr"), before)
    assert command(run, *options, "--overwrite")[0] == 0


@pytest.mark.slow
def test_an_analysis_of_something_else_is_refused(command, write_recording, tmp_path):
    one, other = (write_recording(tmp_path / name / "run.zarr", seed=seed) for name, seed in
                  (("a", 0), ("b", 1)))  # fmt: skip
    assert command(one)[0] == 0
    code, _, err = command(other)
    assert code == 2
    assert f"is an analysis of {one}, not of {other}" in err
    dy.save(dy.compare({"a": dy.analyze(one), "b": dy.analyze(other)}), "both.zarr")
    code, _, err = command(one, "-o", "both.zarr")
    assert code == 2
    assert "is not an analysis of a single run" in err


@pytest.mark.slow
def test_what_was_measured_and_is_damaged_now_is_kept(command, llama_checkpoints, tmp_path):
    run = shutil.copytree(llama_checkpoints, tmp_path / "run")
    assert command(run)[0] == 0
    before = dy.load("run.analysis.zarr")
    file = run / "checkpoint-4/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    code, _, err = command(run)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "unreadable now, at step 4, 6" in err
    xr.testing.assert_identical(dy.load("run.analysis.zarr"), before)
    assert command(run, "--overwrite")[0] == 1


def test_strict_saves_nothing(command, llama_checkpoints, tmp_path):
    run = shutil.copytree(llama_checkpoints, tmp_path / "run")
    file = run / "checkpoint-4/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    code, out, err = command(run, "--strict")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"error: {file} (1000 bytes)")
    assert not os.path.exists("run.analysis.zarr")


@pytest.mark.slow
def test_a_followed_checkpoint_that_is_deleted_stops_the_command_and_keeps_the_result(
    start, log, llama_checkpoints, tmp_path
):
    run = shutil.copytree(llama_checkpoints, tmp_path / "run")
    process = start(run)
    until(lambda: log() == ["step 6: 3 steps measured"])
    shutil.rmtree(run / "checkpoint-2")
    assert process.wait(20) == 2
    assert "this would lose step 2" in log()[-1]
    assert steps_of(tmp_path / "run.analysis.zarr") == [2, 4, 6]
