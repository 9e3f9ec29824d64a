"""Storage that is slow, full or gone: what the recorder does, and what training loses (nothing)."""

import asyncio
import resource
import subprocess
import threading
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import dynamics as dy
from dynamics.errors import DynamicsError
from dynamics.recordings import Recording, verify
from probes import Recorder
from probes.records.background_writer import SkippedRecordWarning
from tests.probes.training import build, train


class Gated(WrapperStore):
    """A store that writes no weight while its gate is closed."""

    def __init__(self, store):
        super().__init__(store)
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.gate.set()

    def _with_store(self, store):
        return self

    async def set(self, key, value):
        if key.startswith("weight/") and "/c/" in key:
            self.waiting.set()
            while not self.gate.is_set():
                await asyncio.sleep(0.001)
        await super().set(key, value)


def test_a_full_queue_drops_records_and_says_so_where_that_is_asked_for():
    store = Gated(MemoryStore())
    model, optimizer = build()
    recorder = Recorder(model, optimizer, store, every=1, queue_size=1, when_full="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with recorder:
            store.gate.clear()
            train(model, optimizer, 6)
            assert store.waiting.wait(30)  # one is being written; there is room for one at most
            train(model, optimizer, 8, start=6)
            recorder.event("merge")
            store.gate.set()
    dropped = [str(each.message) for each in caught if each.category is SkippedRecordWarning]
    run = dy.open_run(store)
    skipped = [event.step for event in run.events if event.kind == "skipped"]
    assert len(dropped) == len(skipped)
    assert sorted([*run.steps.tolist(), *skipped]) == list(range(9))
    assert {7, 8} <= set(skipped)
    assert run.steps[0] == 0  # what was being written is not dropped
    events = [(event.step, event.kind) for event in run.events]
    assert events == [*((step, "skipped") for step in skipped), (8, "merge")]
    assert verify(Recording(store)).damaged == ()


def test_the_last_record_is_waited_for_on_closing():
    store = Gated(MemoryStore())
    model, optimizer = build()
    with Recorder(model, optimizer, store, every=3, queue_size=1, when_full="skip") as recorder:
        store.gate.clear()
        train(model, optimizer, 3)
        assert store.waiting.wait(30)  # 0 is being written
        train(model, optimizer, 6, start=3)  # 3 waits, 6 is pending
        assert recorder.step == 6
        threading.Timer(0.2, store.gate.set).start()
    assert dy.open_run(store).steps.tolist() == [0, 3, 6]


@pytest.mark.slow
def test_a_full_queue_makes_training_wait_by_default():
    store = Gated(MemoryStore())
    model, optimizer = build()
    done = threading.Event()

    def run():
        train(model, optimizer, 9)
        done.set()

    with Recorder(model, optimizer, store, every=1, queue_size=2):
        store.gate.clear()
        thread = threading.Thread(target=run)
        thread.start()
        assert store.waiting.wait(30)
        # One is written, two wait and one is pending: the fifth record cannot be handed over.
        assert not done.wait(0.5)
        store.gate.set()
        thread.join(60)
        assert done.is_set()
    assert dy.open_run(store).steps.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"when_full": "drop"}, "when_full takes 'block' or 'skip'"),
        ({"queue_size": 0}, "queue_size takes 1 or more"),
        ({"storage_dtype": "int8"}, "storage_dtype takes one of float64"),
        ({"compression": "gzip"}, "compression takes one of lz4, zstd, none"),
        ({"compression": "lz4", "level": 10}, "levels 0 to 9; found 10"),
    ],
)
def test_a_mistaken_choice_is_refused_before_anything_is_written(tmp_path, options, says):
    model, optimizer = build()
    with pytest.raises(DynamicsError, match=says):
        Recorder(model, optimizer, tmp_path / "run.zarr", **options)
    assert not (tmp_path / "run.zarr").exists()


@contextmanager
def full_disk(path):
    """A file system of 1 MiB at `path`."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("only root may mount a file system to fill")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextmanager
def no_large_files(path):
    """Files may have 16 KiB: what any user can have instead of a full disk."""
    path.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wide(seed=0):
    """A model of one matrix with 256 kB, and of one with 4 kB that comes first."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 256), torch.nn.Linear(256, 256))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def steps(model, optimizer, first, last):
    for step in range(first, last + 1):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limited", "reason"),
    [(full_disk, "No space left on device"), (no_large_files, "File too large")],
)
def test_a_full_disk_is_one_clear_error_and_costs_no_committed_record(tmp_path, limited, reason):
    disk = tmp_path / "disk"
    with limited(disk):
        store = disk / "run.zarr"
        model, optimizer = wide()
        select = None if limited is full_disk else "0.weight"
        with Recorder(model, optimizer, store, every=1, record=["weight"], select=select):
            steps(model, optimizer, 1, 1)
        model, optimizer = wide()
        steps(model, optimizer, 1, 1)
        recorder = Recorder(model, optimizer, store, every=1, record=["weight"], resume_at=1)
        recorder.attach()
        reached = 1
        error = ""
        for step in range(2, 100):
            try:
                steps(model, optimizer, step, step)
            except RuntimeError as raised:
                error = str(raised)
                break
            reached = step
        assert error.startswith("The recorder could not write: ")
        assert reason in error
        assert "\n" not in error
        assert reached < 60
        with pytest.raises(RuntimeError, match=reason):
            recorder.close()

        # What is committed reads back, the error said how much, and no record is damaged.
        run = dy.open_run(store)
        assert f"records up to step {run.steps[-1]} are kept" in error
        assert run.steps.tolist() == list(range(len(run.steps)))
        found = verify(Recording(store))
        assert (found.damaged, found.sound) == ((), len(run.steps))
        # The error came before the optimizer's step: training is where it was, and can go on.
        fresh, fresh_optimizer = wide()
        steps(fresh, fresh_optimizer, 1, reached)
        assert same(model, fresh)
        for each in run.steps:
            at, at_optimizer = wide()
            steps(at, at_optimizer, 1, int(each))
            read = run.read("0.weight", int(each), "weight")
            np.testing.assert_array_equal(read.values, at[0].weight.detach().numpy())
        steps(model, optimizer, reached + 1, reached + 3)
        steps(fresh, fresh_optimizer, reached + 1, reached + 3)
        assert same(model, fresh)

        if limited is full_disk:  # more room, and the run resumes
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            last = int(run.steps[-1])
            model, optimizer = wide()
            steps(model, optimizer, 1, last)
            with Recorder(model, optimizer, store, every=1, record=["weight"], resume_at=last):
                steps(model, optimizer, last + 1, last + 3)
            found = verify(Recording(store))
            assert (found.damaged, found.sound) == ((), last + 4)
            assert found.leftovers == ()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_second_recorder_on_the_same_store_is_refused_and_the_first_goes_on(tmp_path):
    store = tmp_path / "run.zarr"
    model, optimizer = build()
    with Recorder(model, optimizer, store, every=1):
        train(model, optimizer, 2)
        other, other_optimizer = build()
        with pytest.raises(DynamicsError, match="is being written by this process"):
            Recorder(other, other_optimizer, store, every=1, resume_at=2).attach()
        train(model, optimizer, 4, start=2)
    assert dy.open_run(store).steps.tolist() == [0, 1, 2, 3, 4]


# Storage of less precision --------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16])
def test_a_coarser_storage_is_a_rounding_that_the_recording_tells(tmp_path, source, stored):
    model, optimizer = build()
    model.to(source)
    with torch.no_grad():
        model.up_proj.weight *= (
            1 + 2**-6 + 2**-12 + 2**-30
        )  # bits of every precision, if it has them
    before = model.up_proj.weight.detach().clone()
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, storage_dtype=stored):
        pass
    found = dy.open_run(tmp_path / "run.zarr").read("up_proj.weight", 0, "weight")
    dtype = getattr(torch, stored)
    coarser = torch.finfo(source).eps < torch.finfo(dtype).eps
    assert found.dtype == (stored if coarser else str(source).removeprefix("torch."))
    expected = before.to(dtype) if coarser else before
    np.testing.assert_array_equal(found.values, expected.double().numpy())
    if coarser:
        assert not np.array_equal(found.values, before.double().numpy())


def test_noise_floors_are_those_of_the_coarser_storage(tmp_path):
    floors = {}
    for stored in (None, "bfloat16"):
        model, optimizer = build()
        path = tmp_path / f"{stored}.zarr"
        with Recorder(model, optimizer, path, every=1, storage_dtype=stored):
            pass
        floors[stored] = dy.analyze(path, kinds=["weight"])["noise_floor"].values
    ratios = floors["bfloat16"] / floors[None]
    assert ((ratios > 2**15) & (ratios < 2**17)).all()  # 16 bits of the significand less


def test_numbers_beyond_the_range_of_the_storage_are_a_warning_of_their_own(tmp_path):
    model, optimizer = build()
    with torch.no_grad():
        model.up_proj.weight[0, 0] = 1e6
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, storage_dtype="float16"):
            pass
    assert [str(each.message).split(";")[0] for each in caught] == [
        "Step 0: 1 numbers of weight/up_proj.weight are beyond the range of float16 and stored as "
        "Inf"
    ]


@pytest.mark.parametrize(("compression", "level"), [("none", None), ("zstd", 3), ("lz4", 5)])
def test_every_compression_keeps_the_bits(tmp_path, compression, level):
    model, optimizer = build()
    store = LocalStore(tmp_path / "run.zarr")
    with Recorder(model, optimizer, store, every=1, compression=compression, level=level):
        train(model, optimizer, 2)
    read = dy.open_run(store).read("up_proj.weight", 2, "weight")
    np.testing.assert_array_equal(read.values, model.up_proj.weight.detach().numpy())
    codecs = [
        codec.to_dict() for codec in Recording(store).array("weight/up_proj.weight").compressors
    ]
    names = {"none": [], "zstd": ["blosc"], "lz4": ["blosc"]}[compression]
    assert [codec["name"] for codec in codecs] == [*names, "crc32c"]
    if level is not None:
        assert level in codecs[0]["configuration"].values()
