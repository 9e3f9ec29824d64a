"""A second analysis measures what is new and nothing else, and gives the same result."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import nullcontext

import numpy as np
import pytest
import xarray as xr
import zarr
from safetensors.numpy import load_file, save_file

import dynamics as dy
from dynamics.analysis import tasks
from dynamics.analysis.cache import SpectrumCache, content_key
from dynamics.formats.storage import tensors
from dynamics.recordings import WEIGHT, Recording, RecordingWriter, factor_path, matrix_path
from dynamics.runs import origins
from dynamics.runs.differences import Difference
from dynamics.runs.run import Dense, Event, Factored

QUERY_WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def settle(path):
    """Date all files back: as if some time had passed since they were written."""
    for file in path.rglob("*"):
        if file.is_file() and time.time() - file.stat().st_mtime < 5:
            os.utime(file, (time.time() - 10, time.time() - 10))
    return path


@pytest.fixture
def counts(monkeypatch):
    """{"measured": spectra computed, "read": reads of matrices from files}, to be reset."""
    found = {"measured": 0, "read": 0}

    def counted(key, function):
        def call(*args, **kwargs):
            found[key] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(tasks, "spectrum", counted("measured", tasks.spectrum))
    monkeypatch.setattr(Recording, "read", counted("read", Recording.read))
    monkeypatch.setattr(tensors, "read_range", counted("read", tensors.read_range))
    return found


@pytest.fixture
def work_done(tmp_path, counts):
    """work_done(run, **options): (spectra computed, matrices read) of an analysis with the cache.

    The result has been compared with that of an analysis without a cache.
    """

    def call(path, **options):
        counts.update(measured=0, read=0)
        result = dy.analyze(path, cache=tmp_path / "spectra.cache", **options)
        found = counts["measured"], counts["read"]
        xr.testing.assert_identical(result, dy.analyze(path, **options))
        return found

    return call


@pytest.fixture
def recording(write_recording, tmp_path):
    return settle(write_recording(tmp_path / "run.zarr", merges=(10,)))


@pytest.fixture
def checkpoints(llama_checkpoints, tmp_path):
    return settle(shutil.copytree(llama_checkpoints, tmp_path / "llama"))


def measured_cells(path, **options):
    status = dy.analyze(path, **options)["status"]
    return int((status == dy.Status.MEASURED).sum())


@pytest.mark.slow
def test_what_has_not_changed_is_neither_read_nor_measured(work_done, recording):
    first, reads = work_done(recording)
    # At the second record, update and displacement are one matrix.
    assert first == measured_cells(recording) - 5 > 0
    assert reads > 0
    computed, reads = work_done(
        recording, kinds=["weight", "update", "displacement"], steps=[10, 20]
    )
    assert (computed, reads) == (0, 0)
    computed, reads = work_done(recording)
    assert computed == 0
    # Cells that hold no number are looked at again: no update or gradient at the first step.
    assert reads <= first // 10 + 5


@pytest.mark.slow
def test_unchanged_checkpoints_are_neither_read_nor_measured(work_done, checkpoints):
    first, reads = work_done(checkpoints)
    matrices = len(dy.open_run(checkpoints).matrices)
    assert first == (3 + 2 + 2 - 1) * matrices  # update and displacement of step 4 are the same
    assert reads > 0
    assert work_done(checkpoints) == (0, 0)


@pytest.mark.slow
def test_a_metric_more_costs_no_measurement(work_done, checkpoints):
    work_done(checkpoints, metrics=["stable_rank"])
    assert work_done(checkpoints, metrics=["effective_rank", "outliers"]) == (0, 0)


@pytest.mark.slow
def test_a_touched_checkpoint_is_read_and_not_measured(work_done, checkpoints):
    work_done(checkpoints)
    os.utime(checkpoints / "checkpoint-4/model.safetensors", (1e9, 1e9))
    computed, reads = work_done(checkpoints)
    assert computed == 0
    assert reads > 0
    assert work_done(checkpoints) == (0, 0)


@pytest.mark.slow
def test_a_checkpoint_that_was_written_just_now_is_read_again(work_done, checkpoints):
    file = checkpoints / "checkpoint-6/model.safetensors"
    os.utime(file)
    work_done(checkpoints)
    os.utime(file)
    computed, reads = work_done(checkpoints)
    assert computed == 0
    assert reads > 0


@pytest.mark.slow
def test_a_rewritten_checkpoint_is_measured_again(work_done, checkpoints, tmp_path):
    work_done(checkpoints)
    before = dy.analyze(checkpoints, cache=tmp_path / "spectra.cache")
    file = checkpoints / "checkpoint-4/model.safetensors"
    date, content = file.stat().st_mtime_ns, file.read_bytes()
    weight = load_file(file)[QUERY_WEIGHT].tobytes()
    doubled = (np.frombuffer(weight, np.float32) * 2).tobytes()
    with file.open("r+b") as opened:  # in place: neither size nor inode change
        opened.seek(content.index(weight))
        opened.write(doubled)
    os.utime(file, ns=(date + 1, date + 1))
    # The weight, the update (which is the displacement) of this step, and the update of the next.
    assert work_done(checkpoints)[0] == 3
    after = dy.analyze(checkpoints, cache=tmp_path / "spectra.cache")
    old, new = (
        each.spectral_norm.sel(kind="weight", step=4, matrix=QUERY_WEIGHT).item()
        for each in (before, after)
    )
    assert new == 2 * old


@pytest.mark.slow
def test_only_the_cells_of_a_new_checkpoint_are_measured(work_done, checkpoints, tiny_llama):
    work_done(checkpoints)
    tiny_llama(7).save_pretrained(checkpoints / "checkpoint-8")
    settle(checkpoints)
    matrices = len(dy.open_run(checkpoints).matrices)
    assert work_done(checkpoints)[0] == 3 * matrices  # weight, update, displacement
    assert work_done(checkpoints) == (0, 0)


@pytest.mark.slow
def test_a_checkpoint_in_between_changes_the_next_ones_update(work_done, checkpoints, tiny_llama):
    work_done(checkpoints)
    tiny_llama(7).save_pretrained(checkpoints / "checkpoint-5")
    settle(checkpoints)
    matrices = len(dy.open_run(checkpoints).matrices)
    # Weight, update and displacement of step 5, and the update of step 6.
    assert work_done(checkpoints)[0] == 4 * matrices


@pytest.mark.slow
def test_a_removed_checkpoint_changes_the_next_ones_update(work_done, checkpoints):
    work_done(checkpoints)
    shutil.rmtree(checkpoints / "checkpoint-4")
    # Steps 2 and 6 are left: the update between them is the displacement measured before.
    assert work_done(checkpoints)[0] == 0
    assert len(dy.analyze(checkpoints)["step"]) == 2


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_hidden_by_the_cache(work_done, checkpoints, tmp_path):
    work_done(checkpoints)
    file = checkpoints / "checkpoint-4/model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    settle(checkpoints)
    with pytest.warns(dy.UnmeasuredWarning, match="1000 bytes"):
        result = dy.analyze(checkpoints, cache=tmp_path / "spectra.cache")
    status = result["status"].sel(kind="weight", step=4)
    assert (status == dy.Status.UNREADABLE).all()
    file.write_bytes(whole)
    assert work_done(checkpoints)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("component", ["ov_circuit", "qk_circuit", "pico_ov_circuit"])
def test_circuits_are_measured_once_and_again_when_a_factor_changes(
    work_done, checkpoints, component
):
    heads = 1 if component == "pico_ov_circuit" else 4
    first, _ = work_done(checkpoints, components=[component])
    same = 0 if component == "pico_ov_circuit" else 8  # update and displacement of step 4
    assert first == measured_cells(checkpoints, components=[component]) - same
    assert work_done(checkpoints, components=[component], kinds=["weight"]) == (0, 0)
    file = checkpoints / "checkpoint-6/model.safetensors"
    stored = load_file(file)
    module = "q_proj" if component == "qk_circuit" else "v_proj"
    stored[f"model.layers.1.self_attn.{module}.weight"] *= 3
    save_file(stored, file)
    settle(checkpoints)
    assert work_done(checkpoints, components=[component], kinds=["weight"])[0] == heads


def test_every_head_depends_on_what_another_head_has_read(work_done, checkpoints, counts, tmp_path):
    """Matrices that are still in memory from the head before are dependencies all the same."""
    options = {"components": ["ov_circuit"], "kinds": ["weight"], "select": "*layers.0*"}
    work_done(checkpoints, **options)
    rows = sqlite3.connect(tmp_path / "spectra.cache").execute("SELECT dependencies FROM cells")
    found = [row[0].decode() for row in rows]
    assert len(found) == 3 * 4
    assert all("v_proj" in each and "o_proj" in each for each in found)


@pytest.mark.slow
def test_adapters_are_measured_again_when_their_base_changes(work_done, tmp_path, tiny_llama):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    run = tmp_path / "adapters"
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_llama(3), config)
    for step in (1, 2, 3):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(run / f"checkpoint-{step}")
        tiny_llama(3).save_pretrained(run / f"checkpoint-{step}/base")
    settle(run)
    assert work_done(run)[0] > 0
    assert work_done(run)[0] == 0
    file = run / "checkpoint-2/base/model.safetensors"
    stored = load_file(file)
    stored[QUERY_WEIGHT] = stored[QUERY_WEIGHT] * np.float32(1.5)
    save_file(stored, file)
    settle(run)
    # At 2: weight, base, and the differences from 1, which are one matrix. At 3: the differences
    # from 2; and the displacement, whose two weights are what they were, but were merged twice.
    assert work_done(run)[0] == 5
    assert work_done(run)[0] == 0


def test_merges_are_counted_again_when_a_damaged_checkpoint_between_them_is_repaired(
    work_done, tmp_path, tiny_llama
):
    """Its base is whole all along: what the count was made from must not look the same."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    run = tmp_path / "adapters"
    base = tiny_llama(3)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_llama(3), config)
    for step in (1, 2, 3):
        model.save_pretrained(run / f"checkpoint-{step}")
        base.save_pretrained(run / f"checkpoint-{step}/base")
        with torch.no_grad():  # as a merge does
            base.get_parameter(QUERY_WEIGHT).mul_(1.5)
    file = run / "checkpoint-2/adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    settle(run)
    options = {"kinds": ["displacement"], "select": QUERY_WEIGHT}
    merges = []
    for content in (whole[:100], whole):
        file.write_bytes(content)
        settle(run)
        with nullcontext() if content == whole else pytest.warns(dy.UnmeasuredWarning):
            work_done(run, **options)
        merges.append(dy.open_run(run).merges_between(QUERY_WEIGHT, 1, 3))
    assert merges == [1, 2]


@pytest.mark.parametrize("damaged", ["model.safetensors", "adapter_model.safetensors"])
def test_nothing_in_a_checkpoint_that_cannot_be_read_has_an_origin(
    damaged, checkpoints, tmp_path, tiny_llama
):
    run, kinds = checkpoints, ["weight"]
    if damaged.startswith("adapter"):
        peft = pytest.importorskip("peft")
        run, kinds = tmp_path / "adapters", ["weight", "base", "adapter"]
        model = peft.get_peft_model(tiny_llama(3), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        for step in (2, 4):
            model.save_pretrained(run / f"checkpoint-{step}")
            tiny_llama(3).save_pretrained(run / f"checkpoint-{step}/base")
        settle(run)
    opened = dy.open_run(run)
    assert all(opened.origin(QUERY_WEIGHT, 4, kind) not in (None, origins.ABSENT) for kind in kinds)
    (run / "checkpoint-4" / damaged).write_bytes(b"")
    settle(run)
    opened = dy.open_run(run)
    assert set(opened.problems) == {4}
    assert [opened.origin(QUERY_WEIGHT, 4, kind) for kind in kinds] == [None] * len(kinds)
    assert opened.origin(QUERY_WEIGHT, 2, "weight") is not None


@pytest.mark.slow
def test_a_rewound_recording_is_measured_again_from_there(work_done, recording):
    work_done(recording)
    writer = RecordingWriter(recording, {}, resume=True)
    writer.rewind(10)
    run = dy.open_run(recording)
    assert work_done(recording)[0] == 0
    rng = np.random.default_rng(9)
    weights = {
        matrix_path(WEIGHT, name): rng.standard_normal((info.rows, info.cols), np.float32)
        for name, info in run.matrices.items()
    }
    writer.append(20, weights, tokens=1)
    settle(recording)
    assert work_done(recording)[0] == 3 * len(weights)  # weight, update, displacement
    assert work_done(recording, kinds=["weight"]) == (0, 0)


@pytest.mark.slow
def test_an_adapted_recording_whose_merge_is_noted_later_has_more_noise(work_done, tmp_path):
    run, name = tmp_path / "adapted.zarr", "model.layers.0.mlp.up_proj.weight"
    rng = np.random.default_rng(0)
    shapes = {matrix_path(WEIGHT, name): (16, 8), factor_path(name, "A"): (2, 8)}
    shapes[factor_path(name, "B")] = (16, 2)
    facts = {"source_dtype": "float32", "scaling": 2.0, "transposed": False}
    writer = RecordingWriter(run, {})
    for step in (0, 10, 20):
        matrices = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
        writer.append(step, matrices, attrs=dict.fromkeys(shapes, facts))
    settle(run)
    work_done(run)
    assert work_done(run, kinds=["base", "adapter", "displacement"], steps=[10, 20]) == (0, 0)
    writer.event(Event(10, "merge", {}))
    # Of the differences only the one from 10 to 20 and that from 0 to 20 span the merge; the
    # merged adapters' sum is measured for the first time at 20 (before, it is the adapter itself).
    assert work_done(run, kinds=["update", "displacement"])[0] == 2
    assert work_done(run, kinds=["accumulated_adapter"], steps=[20])[0] == 1
    work_done(run, kinds=["weight"])
    assert work_done(run, kinds=["weight"]) == (0, 0)
    writer.event(Event(20, "resume", {}))
    computed, reads = work_done(run, kinds=["weight"])
    assert computed == 0
    assert reads == 1  # what happened at step 20 might matter to its cell


def test_an_adapter_of_another_scaling_is_another_matrix():
    left, right = np.ones((3, 1), np.float32), np.ones((1, 4), np.float32)
    matrices = [
        Factored(left, right, 1.0, "float32"),
        Factored(left, right, 2.0, "float32"),
        Factored(left, right, 1.0, "bfloat16"),
        Factored(right.T, left.T, 1.0, "float32"),
        Dense(left, "float32"),
        Dense(left, "float16"),
        Dense(left.astype(np.float64), "float32"),
        Dense(left.T, "float32"),
        Difference(Dense(left, "float32"), Dense(left, "float32")),
        *(
            Difference(Dense(left, "float32"), Dense(left, "float32"), adapters=each)
            for each in (
                (Factored(left, right, 1.0, "float32"), None),
                (Factored(left, right, 2.0, "float32"), None),
                (None, Factored(left, right, 2.0, "float32")),
            )
        ),
    ]
    assert len({content_key(each) for each in matrices}) == len(matrices)
    assert content_key(Dense(left.copy(), "float32")) == content_key(Dense(left, "float32"))


@pytest.mark.slow
def test_a_store_in_memory_is_read_again_and_not_measured(work_done, write_recording):
    store = write_recording(zarr.storage.MemoryStore())
    assert work_done(dy.open_run(store))[0] > 0
    computed, reads = work_done(dy.open_run(store))
    assert computed == 0
    assert reads > 0


def test_a_file_has_an_origin_once_it_is_old_enough_to_tell_a_change(tmp_path):
    file = tmp_path / "file"
    assert origins.file_origin(file) == origins.ABSENT
    file.write_bytes(b"a")
    assert origins.file_origin(file) is None
    os.utime(file, (1e9, 1e9))
    first = origins.file_origin(file)
    assert first is not None
    assert origins.file_origin(file) == first
    file.write_bytes(b"b")
    os.utime(file, (1e9, 1e9))
    assert origins.file_origin(file) not in (None, first)
    os.utime(file, (time.time() + 100, time.time() + 100))
    assert origins.file_origin(file) is None


# An interrupted analysis --------------------------------------------------------------------------

SLOW = """
import sys, time
from dynamics.analysis import analyze, tasks
compute = tasks.spectrum
def slowly(*args, **kwargs):
    time.sleep(0.15)
    return compute(*args, **kwargs)
tasks.spectrum = slowly
analyze.analyze(sys.argv[1], cache=sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_analysis_continues_where_it_was(work_done, recording, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SLOW, recording, tmp_path / "spectra.cache"])
    done, end = 0, time.monotonic() + 60
    while done < 8 and time.monotonic() < end:
        time.sleep(0.1)
        if (tmp_path / "spectra.cache").exists():
            with sqlite3.connect(tmp_path / "spectra.cache", timeout=10) as cache:
                has = cache.execute("SELECT name FROM sqlite_master WHERE name = 'spectra'")
                if has.fetchone():
                    done = cache.execute("SELECT count(*) FROM spectra").fetchone()[0]
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    every = measured_cells(recording)
    computed, _ = work_done(recording)
    assert 0 < computed <= every - done
    assert work_done(recording)[0] == 0


@pytest.mark.slow
def test_an_analysis_that_fails_keeps_what_it_has_measured(work_done, recording, tmp_path):
    def stop(done, total, name):
        if done == total * 2 // 5:  # of 5 matrices
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dy.analyze(recording, cache=tmp_path / "spectra.cache", progress=stop)
    assert work_done(recording)[0] == (measured_cells(recording) - 5) // 5 * 3


# The file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 5000, b"{}"])
def test_a_file_that_is_no_cache_is_refused_and_left_alone(recording, tmp_path, content):
    cache = tmp_path / "spectra.cache"
    cache.write_bytes(content)
    with pytest.raises(dy.DynamicsError, match=r"spectra.cache.*(Delete|delete) it") as refused:
        dy.analyze(recording, cache=cache)
    assert "\n" not in str(refused.value)
    assert cache.read_bytes() == content


def test_a_database_of_something_else_or_of_another_version_is_refused(recording, tmp_path):
    cache = tmp_path / "spectra.cache"
    with sqlite3.connect(cache) as other:
        other.execute("CREATE TABLE photos (name TEXT)")
    with pytest.raises(dy.DynamicsError, match="something else"):
        dy.analyze(recording, cache=cache)
    cache.unlink()
    dy.analyze(recording, cache=cache, kinds=["weight"])
    with sqlite3.connect(cache) as newer:
        newer.execute("PRAGMA user_version = 3")
    with pytest.raises(dy.DynamicsError, match=r"version 3, this release has 2; delete it"):
        dy.analyze(recording, cache=cache)


@pytest.mark.slow
def test_a_damaged_cache_is_refused_or_gives_the_right_numbers(recording, tmp_path):
    cache, whole = tmp_path / "spectra.cache", tmp_path / "whole.cache"
    expected = dy.analyze(recording, cache=whole, kinds=["weight"])
    good, rng, refused = whole.read_bytes(), np.random.default_rng(0), 0
    for _ in range(40):
        damaged = bytearray(good)
        first = int(rng.integers(100, len(good)))
        damaged[first : first + 30] = rng.bytes(len(damaged[first : first + 30]))
        cache.write_bytes(damaged)
        message = None
        try:
            result = dy.analyze(recording, cache=cache, kinds=["weight"])
        except dy.DynamicsError as error:
            message = str(error)
        if message is None:
            xr.testing.assert_identical(result, expected)
        else:
            refused += 1
            assert "spectra.cache" in message
            assert "\n" not in message
    assert refused > 0


@pytest.mark.slow
def test_two_analyses_may_share_a_cache(recording, write_recording, tmp_path, counts):
    other = settle(write_recording(tmp_path / "other.zarr", seed=1))
    cache = tmp_path / "spectra.cache"
    with SpectrumCache(cache):
        first = dy.analyze(recording, cache=cache)
    second = dy.analyze(other, cache=cache)
    counts.update(measured=0)
    xr.testing.assert_identical(dy.analyze(recording, cache=cache), first)
    xr.testing.assert_identical(dy.analyze(other, cache=cache), second)
    assert counts["measured"] == 0


# --strict -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_strict_raises_at_what_cannot_be_measured(checkpoints, tmp_path):
    file = checkpoints / "checkpoint-4/model.safetensors"
    stored, whole = load_file(file), file.read_bytes()
    stored[QUERY_WEIGHT][0, 0] = np.nan
    save_file(stored, file)
    for kinds in (None, ["update"]):
        with pytest.raises(dy.DynamicsError, match=f"{QUERY_WEIGHT} .* at step 4 holds NaN or Inf"):
            dy.analyze(checkpoints, strict=True, kinds=kinds)
    file.write_bytes(whole[:1000])
    with pytest.raises(dy.DynamicsError, match="1000 bytes"):
        dy.analyze(checkpoints, strict=True, cache=tmp_path / "spectra.cache")
    dy.analyze(checkpoints, strict=True, steps=[2], kinds=["weight"])
    file.write_bytes(whole)
    xr.testing.assert_identical(dy.analyze(checkpoints, strict=True), dy.analyze(checkpoints))
