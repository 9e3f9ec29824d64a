"""Kills a training again and again while it records: python tests/benchmarks/killed_writers.py [N].

Each of N (200) trainings resumes where the one before was killed, is sent SIGKILL after a random
time from its start or from its first step, and leaves a store that must open, hold every record
that was committed before, bit for bit as an undisturbed training has it, and verify. A recording
that has come to its end makes room for a new one, so that creation is hit as well.
"""

import multiprocessing
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

LAST = 100


def train_and_record(store, resume_at, progress):
    """Train to step LAST and record every step; `progress` says which steps are done."""
    import torch

    from probes import Recorder
    from tests.probes import training

    torch.set_num_threads(1)
    model, optimizer = training.build()
    training.train(model, optimizer, resume_at)
    with Recorder(model, optimizer, store, every=1, resume_at=resume_at) as recorder:

        def report(step):
            progress.value = step
            if step % 10 == 1:
                recorder.event("merge", layers=2)

        training.train(model, optimizer, LAST, start=resume_at, after_backward=report)


def contents(store):
    """(steps, array -> numbers, events), as plain xarray shows them."""
    import xarray as xr

    with xr.open_datatree(store, engine="zarr") as tree:
        arrays = {
            f"{group}/{name}": values.values
            for group in ("weight", "gradient", "scalars")
            if group in tree
            for name, values in tree[group].data_vars.items()
        }
        happened = tree["events"].to_dataset(inherit=False)
        events = list(zip(happened["step"].values, happened["kind"].values, strict=True))
        return tree["step"].values.tolist(), arrays, events


def check(store, truth, resumed_at, seen):
    """How many records the store has; raises where one is not the truth, or is gone."""
    import numpy as np

    from dynamics.recordings import Recording, verify

    steps, arrays, events = contents(store)
    assert steps == list(range(len(steps))), steps
    for name, values in arrays.items():
        assert values.shape[0] == len(steps), name
        assert values.tobytes() == truth[name][: len(steps)].tobytes(), name
        assert not np.isnan(values[1:]).any(), name
    found = verify(Recording(store))
    assert not found.damaged, found.damaged
    assert found.sound == len(steps)
    # The training may be ahead by its queue, a pending record and the one being written.
    assert len(steps) > resumed_at, (len(steps), resumed_at)
    assert len(steps) - 1 >= seen - 5, (len(steps), seen)
    merges = [step for step, kind in events if kind == "merge"]
    assert merges == sorted(set(merges)), merges
    return len(steps)


def main(kills):
    """Print what was survived."""
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["torch", "probes.recorder", "tests.probes.training"])
    moment = random.Random(0)
    folder = Path(tempfile.mkdtemp())
    progress = start.RawValue("i", 0)  # without a lock, which a killed process would keep
    whole = start.Process(target=train_and_record, args=(folder / "truth.zarr", 0, progress))
    whole.start()
    whole.join()
    assert whole.exitcode == 0
    steps, truth, _ = contents(folder / "truth.zarr")
    assert len(steps) == LAST + 1
    began = time.monotonic()
    store, resume_at, recordings, before_the_first, finished = folder / "0.zarr", 0, 1, 0, 0
    for _ in range(kills):
        progress.value = 0
        process = start.Process(target=train_and_record, args=(store, resume_at, progress))
        process.start()
        if moment.random() < 0.8:  # the others may not get as far as their first record
            while process.is_alive() and progress.value <= resume_at:
                time.sleep(0.001)
        process.join(moment.uniform(0, 0.6))
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), process.exitcode
        finished += process.exitcode == 0
        if not (store / "zarr.json").exists() or not contents_are_there(store):
            assert resume_at == 0, resume_at
            assert progress.value <= 4, progress.value
            before_the_first += 1
            continue
        count = check(store, truth, resume_at, progress.value)
        resume_at = max(count - 1 - moment.randint(0, 5), 0)
        if count == LAST + 1:
            store, resume_at, recordings = folder / f"{recordings}.zarr", 0, recordings + 1
    print(
        f"{kills} trainings, {kills - finished} of them killed, {before_the_first} before the "
        f"first record; {recordings} recordings; every committed record as it should be; "
        f"{time.monotonic() - began:.0f} s."
    )


def contents_are_there(store):
    """Whether a first record was committed."""
    try:
        with warnings.catch_warnings():  # of metadata that no commit has consolidated yet
            warnings.simplefilter("ignore", RuntimeWarning)
            return bool(contents(store)[0])
    except (KeyError, ValueError):
        return False  # killed before the first commit; resuming begins anew


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
