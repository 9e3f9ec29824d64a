"""Reading ahead: the next step's matrices are read while those of this one are measured."""

import threading
from collections import Counter

import numpy as np
import pytest
import xarray as xr

import dynamics as dy
from dynamics.errors import FormatError
from dynamics.formats.recording import RecordingRun
from dynamics.runs.matrix_cache import CachedRun

SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (24, 16) for i in range(2)}
STEPS = tuple(range(0, 60, 10))


class Watched(RecordingRun):
    """Notes which thread reads what, and that no two do at once."""

    def __init__(self, path):
        super().__init__(path)
        self.reads = []
        self.busy = threading.Lock()

    def read(self, name, step, kind):
        assert self.busy.acquire(blocking=False)
        self.reads.append((name, step, kind, threading.current_thread().name))
        try:
            return super().read(name, step, kind)
        finally:
            self.busy.release()


@pytest.fixture
def run(write_recording, tmp_path):
    return Watched(write_recording(tmp_path / "run.zarr", shapes=SHAPES, steps=STEPS))


@pytest.mark.parametrize("cached", [True, False])
def test_an_analysis_reads_ahead_and_each_matrix_once(run, cached, tmp_path):
    found = dy.analyze(run, cache=tmp_path / "a.cache" if cached else None)
    xr.testing.assert_identical(found, dy.analyze(run.path))
    assert max(Counter(each[:3] for each in run.reads).values()) == 1
    ahead = {each[:3] for each in run.reads if each[3].startswith("read-ahead")}
    assert ahead == {
        (name, step, kind)
        for name in SHAPES
        for step in STEPS[1:]
        for kind in ("weight", "gradient")
    }


def test_what_cannot_be_read_ahead_is_said_of_its_own_step(run, monkeypatch):
    def read(self, name, step, kind):
        if step == 30:
            raise FormatError(f"step {step} is damaged")
        return RecordingRun.read(self, name, step, kind)

    monkeypatch.setattr(Watched, "read", read)
    with pytest.warns(dy.UnmeasuredWarning, match="step 30 is damaged"):
        status = dy.analyze(run, kinds=["weight"])["status"]
    unreadable = (status == dy.Status.UNREADABLE).sel(kind="weight")
    np.testing.assert_array_equal(unreadable.all("matrix"), np.array(STEPS) == 30)
    assert (status.sel(step=40) == dy.Status.MEASURED).all()


def test_what_was_read_ahead_for_nothing_is_forgotten(run):
    cached, (name, *_) = CachedRun(run), SHAPES
    cached.read(name, 0, "weight")
    cached.read_ahead(0, 10)
    cached.read(name, 20, "weight")
    cached.read_ahead(20, 30)
    assert {step for _, step, _ in cached._ahead} == {30}
    np.testing.assert_array_equal(
        cached.read(name, 30, "weight").values, run.read(name, 30, "weight").values
    )
