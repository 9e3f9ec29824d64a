"""Where a recording begins: beside another one, in its place, or not at all, leaving no trace."""

import json
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from zarr.storage import LocalStore, MemoryStore

import dynamics as dy
from dynamics import schema
from dynamics.errors import (
    DynamicsError,
    FormatError,
    OutputExistsError,
    RecordingHeldError,
)
from dynamics.recordings import Recording, RecordingWriter
from probes import Recorder, at_steps
from probes.records import process_end
from probes.records.opening import NewRecordingWarning
from tests.probes.training import build, train


def recorded(store, steps, *, seed=0, start=0, **options):
    """Train to `steps` and record each step; the name of the store that was written."""
    model, optimizer = build(seed)
    train(model, optimizer, start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewRecordingWarning)
        with Recorder(model, optimizer, store, every=1, **options) as recorder:
            train(model, optimizer, steps, start=start)
    return recorder.store_name


def steps_of(path):
    return dy.open_run(path).steps.tolist()


# Where there is a recording already ------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path, LocalStore])
def test_the_next_recordings_stand_beside_the_first(tmp_path, kind):
    store = kind(str(tmp_path / "run.zarr"))
    names = [recorded(store, steps, if_exists="next") for steps in (1, 2, 3)]
    assert names == ["run.zarr", "run-2.zarr", "run-3.zarr"]
    assert [steps_of(tmp_path / name)[-1] for name in names] == [1, 2, 3]
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("run", "run-2"),
        (".run", ".run-2"),
        ("a.b.zarr", "a.b-2.zarr"),
        ("run-2.zarr", "run-2-2.zarr"),
    ],
)
def test_a_number_comes_before_the_suffix(tmp_path, name, second):
    assert [recorded(tmp_path / name, 0, if_exists="next") for _ in range(2)] == [name, second]


def test_the_newest_has_the_highest_number_also_where_others_were_deleted(tmp_path):
    recorded(tmp_path / "run-7.zarr", 0)
    for other in ("run-07.zarr", "run-1.zarr", "run-x.zarr", "sun-9.zarr", "run-9.zarr.txt"):
        (tmp_path / other).mkdir()
    assert recorded(tmp_path / "run.zarr", 0, if_exists="next") == "run-8.zarr"


def test_what_is_no_recording_is_passed_over(tmp_path):
    (tmp_path / "run.zarr").write_text("notes")
    (tmp_path / "run-2.zarr").mkdir()
    (tmp_path / "run-2.zarr/thesis.txt").write_text("years of work")
    assert recorded(tmp_path / "run.zarr", 1, if_exists="next") == "run-3.zarr"
    assert (tmp_path / "run-2.zarr/thesis.txt").read_text() == "years of work"


def test_a_store_whose_writer_died_before_its_first_commit_is_taken(tmp_path):
    recorded(tmp_path / "run.zarr", 0)
    store = tmp_path / "run-2.zarr"
    store.mkdir()
    zarr.create_group(str(store), attributes={"format": schema.RECORDING_FORMAT})
    assert recorded(tmp_path / "run.zarr", 1, if_exists="next") == "run-2.zarr"


def test_two_that_begin_at_once_get_a_store_each(tmp_path):
    stores, start = [], threading.Barrier(4, timeout=30)

    def work(seed):
        model, optimizer = build(seed)
        recorder = Recorder(model, optimizer, tmp_path / "run.zarr", every=1, if_exists="next")
        start.wait()
        with recorder:
            stores.append(recorder.store_name)
            start.wait()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NewRecordingWarning)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(set(stores)) == 4
    assert all(steps_of(tmp_path / name) == [0] for name in stores)


def test_a_new_store_beside_is_said(tmp_path):
    recorded(tmp_path / "run.zarr", 0)
    model, optimizer = build()
    with pytest.warns(NewRecordingWarning, match=r"run\.zarr is there already.*run-2\.zarr"):
        Recorder(model, optimizer, tmp_path / "run.zarr", if_exists="next").attach().close()


def test_a_recording_is_overwritten_where_that_is_asked_for_and_other_files_stay(tmp_path):
    store = tmp_path / "run.zarr"
    recorded(store, 3)
    (store / "notes.txt").write_text("mine")
    (store / "weight/notes.txt").write_text("mine, but within")
    recorded(store, 1, seed=1, if_exists="overwrite")
    model, _ = build(1)
    run = dy.open_run(store)
    assert run.steps.tolist() == [0, 1]
    first = run.read("up_proj.weight", 0, "weight").values
    np.testing.assert_array_equal(first, model.up_proj.weight.detach())
    assert (store / "notes.txt").read_text() == "mine"
    assert Recording(store).events == ()


@pytest.mark.parametrize("damage", ["zarr.json", "step/zarr.json", "step/c/0"])
def test_a_damaged_recording_is_overwritten_too(tmp_path, damage):
    store = tmp_path / "run.zarr"
    recorded(store, 2)
    if damage == "zarr.json":
        root = json.loads((store / damage).read_text())
        root["consolidated_metadata"] = None
        (store / damage).write_text(json.dumps(root))
    else:
        (store / damage).write_bytes(b"\0")
    recorded(store, 1, if_exists="overwrite")
    assert steps_of(store) == [0, 1]


def test_nothing_but_a_recording_is_overwritten(tmp_path):
    model, optimizer = build()
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.txt").write_text("years of work")
    zarr.create_group(str(tmp_path / "group"), attributes={"mine": 1})
    for name in ("file", "folder", "group"):
        before = sorted(tmp_path.rglob("*"))
        recorder = Recorder(model, optimizer, tmp_path / name, if_exists="overwrite")
        with pytest.raises(FormatError, match=name):
            recorder.attach()
        assert sorted(tmp_path.rglob("*")) == before
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("if_exists", ["refuse", "overwrite"])
@pytest.mark.parametrize("resume_at", [None, 1])
def test_a_recording_with_a_live_writer_is_left_alone(tmp_path, if_exists, resume_at):
    os.symlink(tmp_path, tmp_path / "link")
    spellings = [tmp_path / "run.zarr", tmp_path / "x/../run.zarr", tmp_path / "link/run.zarr"]
    model, optimizer = build()
    with Recorder(model, optimizer, spellings[0], every=1):
        train(model, optimizer, 1)
        for store in spellings:
            other, its_optimizer = build()
            second = Recorder(
                other, its_optimizer, store, every=1, if_exists=if_exists, resume_at=resume_at
            )
            with pytest.raises((RecordingHeldError, OutputExistsError)):
                second.attach()
            assert not its_optimizer._optimizer_step_post_hooks
        train(model, optimizer, 3, start=1)
    assert steps_of(spellings[0]) == [0, 1, 2, 3]


def test_overwriting_that_fails_to_begin_overwrites_nothing(tmp_path):
    recorded(tmp_path / "run.zarr", 3)
    model, optimizer = build()
    recorder = Recorder(model, optimizer, tmp_path / "run.zarr", if_exists="overwrite")
    recorder._contents.fill = failing
    with pytest.raises(ZeroDivisionError):
        recorder.attach()
    assert steps_of(tmp_path / "run.zarr") == [0, 1, 2, 3]


# Which one is continued -------------------------------------------------------------------------


def test_a_resumed_training_continues_the_newest_one_that_reaches_its_step(tmp_path):
    store = tmp_path / "run.zarr"
    recorded(store, 9, if_exists="next")
    recorded(store, 7, if_exists="next", seed=1)
    assert recorded(store, 8, start=6, if_exists="next", resume_at=6) == "run-2.zarr"
    assert steps_of(store) == list(range(10))
    assert steps_of(tmp_path / "run-2.zarr") == list(range(9))


def test_a_later_one_that_never_got_there_is_not_continued(tmp_path):
    store = tmp_path / "run.zarr"
    recorded(store, 20, if_exists="next")
    recorded(store, 0, if_exists="next")  # begun by mistake, and interrupted
    assert recorded(store, 22, start=20, if_exists="next", resume_at=20) == "run.zarr"
    assert steps_of(store) == list(range(23))


def test_records_that_a_killed_writer_lost_are_no_reason_to_begin_anew(tmp_path):
    store = tmp_path / "run.zarr"
    recorded(store, 17, if_exists="next")
    assert recorded(store, 22, start=20, if_exists="next", resume_at=20) == "run.zarr"
    assert steps_of(store) == [*range(18), 20, 21, 22]


def test_where_none_fits_a_new_one_begins_at_that_step(tmp_path):
    store = tmp_path / "run.zarr"
    recorded(store, 3, if_exists="next")
    assert recorded(store, 22, start=20, if_exists="next", resume_at=20) == "run-2.zarr"
    assert steps_of(store) == [0, 1, 2, 3]
    assert steps_of(tmp_path / "run-2.zarr") == [20, 21, 22]


def test_the_store_that_the_checkpoint_names_is_continued(tmp_path):
    store = tmp_path / "run.zarr"
    recorded(store, 9, if_exists="next")
    recorded(store, 9, if_exists="next")
    model, optimizer = build()
    train(model, optimizer, 5)
    options = {"every": 1, "if_exists": "next", "resume_at": 5}
    with Recorder(model, optimizer, store, **options).attach(continuing="run.zarr"):
        pass
    assert steps_of(store) == [0, 1, 2, 3, 4, 5]
    assert steps_of(tmp_path / "run-2.zarr") == list(range(10))


def test_one_that_is_being_written_is_not_continued(tmp_path):
    store = tmp_path / "run.zarr"
    model, optimizer = build()
    with Recorder(model, optimizer, store, every=1) as recorder:
        train(model, optimizer, 3)
        recorder.flush()
        assert recorded(store, 4, start=3, if_exists="next", resume_at=3) == "run-2.zarr"
    assert steps_of(store) == [0, 1, 2, 3]


def test_stores_without_a_name_take_one_recording(tmp_path):
    store = MemoryStore()
    assert recorded(store, 1, if_exists="next") == ""
    with pytest.raises(OutputExistsError):
        recorded(store, 1, if_exists="next")
    recorded(store, 2, start=1, if_exists="next", resume_at=1)
    recorded(store, 1, if_exists="overwrite")
    assert steps_of(store) == [0, 1]


# Attaching that fails ---------------------------------------------------------------------------


def failing(*_, **__):
    raise ZeroDivisionError


def fails_at(step):
    def schedule(at):
        if at == step:
            raise ZeroDivisionError
        return True

    return schedule


def spoil_contents(recorder, monkeypatch):
    monkeypatch.setattr(recorder._contents, "fill", failing)


def spoil_hooks(recorder, monkeypatch):
    monkeypatch.setattr(recorder._gradients, "arm", failing)


def spoil_thread(recorder, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", failing)


def spoil_rewind(recorder, monkeypatch):
    monkeypatch.setattr(RecordingWriter, "rewind", failing)


def spoil_creation(recorder, monkeypatch):
    monkeypatch.setattr(RecordingWriter, "_commit", failing)


def spoil_registering(recorder, monkeypatch):
    monkeypatch.setattr(process_end, "add", failing)


@pytest.mark.parametrize("resume_at", [None, 2])
@pytest.mark.parametrize("spectra_only", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [
        0,
        1,
        spoil_contents,
        spoil_hooks,
        spoil_thread,
        spoil_rewind,
        spoil_creation,
        spoil_registering,
    ],
)
def test_attaching_that_fails_leaves_nothing_behind(
    tmp_path, monkeypatch, spoil, spectra_only, resume_at
):
    if spoil is spoil_rewind and resume_at is None:
        pytest.skip("nothing is rewound")
    model, optimizer = build()
    model.up_proj.weight.requires_grad_(False)
    store = tmp_path / "folder" / "run.zarr"
    every = fails_at(spoil + (resume_at or 0)) if isinstance(spoil, int) else 1
    recorder = Recorder(
        model, optimizer, store, every=every, spectra_only=spectra_only, resume_at=resume_at
    )
    hooks = [dict(each._backward_hooks or {}) for each in model.parameters()]
    with monkeypatch.context() as patch:
        if not isinstance(spoil, int):
            spoil(recorder, patch)
        with pytest.raises(ZeroDivisionError):
            recorder.attach()
    assert not store.exists()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert [dict(each._backward_hooks or {}) for each in model.parameters()] == hooks
    assert not model.up_proj.weight.requires_grad
    assert recorder not in process_end._attached
    assert [each.name for each in threading.enumerate()].count("recorder") == 0
    train(model, optimizer, 1)  # it goes on
    with Recorder(model, optimizer, store, every=1, spectra_only=spectra_only):
        train(model, optimizer, 2, start=1)
    assert steps_of(store) == [0, 1]


@pytest.mark.parametrize("spoil", [spoil_contents, spoil_hooks, spoil_thread, spoil_rewind])
def test_resuming_that_fails_leaves_the_recording_as_it_was(tmp_path, monkeypatch, spoil):
    store = tmp_path / "run.zarr"
    recorded(store, 5)
    model, optimizer = build()
    recorder = Recorder(model, optimizer, store, every=1, resume_at=2)
    with monkeypatch.context() as patch:
        spoil(recorder, patch)
        with pytest.raises(ZeroDivisionError):
            recorder.attach()
    if spoil is not spoil_thread:  # this one fails when all is done
        assert steps_of(store) == [0, 1, 2, 3, 4, 5]
    assert not (store / "writer/zarr.json").exists()
    assert recorded(store, 3, start=2, resume_at=2) == "run.zarr"
    assert steps_of(store) == [0, 1, 2, 3]


@pytest.mark.parametrize("where", ["file", "below a file"])
def test_a_store_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, where):
    (tmp_path / "file").write_text("x")
    store = tmp_path / "file" if where == "file" else tmp_path / "file/run.zarr"
    model, optimizer = build()
    for if_exists in ("refuse", "overwrite", *(["next"] if where != "file" else [])):
        with pytest.raises(DynamicsError, match="file"):
            Recorder(model, optimizer, store, if_exists=if_exists).attach()
    assert (tmp_path / "file").read_text() == "x"
    assert not optimizer._optimizer_step_post_hooks


# Arguments that cannot be meant -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 1.5}, r"every takes a whole number .* found 1\.5"),
        ({"every": True}, "every takes a whole number .* found True"),
        ({"every": "10"}, "every takes a whole number .* found '10'"),
        ({"every": 0}, "every takes a whole number .* found 0"),
        ({"every": -1}, "every takes"),
        ({"every": None}, "every takes"),
        ({"every": [1, 2]}, "every takes"),
        ({"every": float("nan")}, "every takes"),
        ({"every": torch.tensor(True)}, "every takes"),
        ({"resume_at": -1}, "resume_at takes the number of optimizer steps done.* found -1"),
        ({"resume_at": 1.5}, "resume_at takes"),
        ({"resume_at": True}, "resume_at takes"),
        ({"resume_at": "3"}, "resume_at takes"),
        ({"queue_size": 1.5}, r"queue_size takes 1 or more records; found 1\.5"),
        ({"queue_size": True}, "queue_size takes"),
        ({"queue_size": "2"}, "queue_size takes"),
        ({"queue_size": None}, "queue_size takes"),
        ({"when_full": None}, "when_full takes"),
        ({"if_exists": "append"}, "if_exists takes one of refuse, overwrite, next; found 'append'"),
        ({"if_exists": None}, "if_exists takes"),
        ({"if_exists": ["next"]}, "if_exists takes"),
        ({"storage_dtype": torch.float16}, "storage_dtype takes"),
        ({"storage_dtype": ["float16"]}, "storage_dtype takes"),
        ({"compression": None}, "compression takes"),
        ({"compression": ["lz4"]}, "compression takes"),
        ({"level": "1"}, "levels 0 to 9; found '1'"),
        ({"level": 1.0}, r"levels 0 to 9; found 1\.0"),
        ({"level": True}, "levels 0 to 9; found True"),
        ({"level": -1}, "levels 0 to 9"),
        ({"level": [1]}, "levels 0 to 9"),
        ({"attrs": {"x": object()}}, "attrs takes names and values that JSON can hold"),
        ({"attrs": {"x": {1, 2}}}, "attrs takes"),
        ({"attrs": {("a", "b"): 1}}, "attrs takes"),
        ({"attrs": 3}, "attrs takes"),
        ({"attrs": {"format": "mine"}}, "attrs may not set 'format'"),
    ],
)
def test_a_mistaken_argument_is_refused_at_once_in_one_line(tmp_path, options, says):
    model, optimizer = build()
    with pytest.raises(DynamicsError, match=says) as caught:
        Recorder(model, optimizer, tmp_path / "run.zarr", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("store", [None, 3, "", "  ", b"run.zarr", [], Path("s3://bucket/run")])
def test_what_is_no_store_is_refused_at_once(store):
    model, optimizer = build()
    with pytest.raises(DynamicsError, match="store takes"):
        Recorder(model, optimizer, store)


def test_a_store_that_may_not_be_written_is_refused(tmp_path):
    model, optimizer = build()
    with pytest.raises(DynamicsError, match="opened for reading only"):
        Recorder(model, optimizer, LocalStore(tmp_path / "run.zarr", read_only=True)).attach()
    assert not optimizer._optimizer_step_post_hooks


def test_a_model_on_the_meta_device_is_refused_at_once(tmp_path):
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        DynamicsError, match="weights of Linear, such as weight, are on the meta device"
    ):
        Recorder(model, optimizer, tmp_path / "run.zarr")


@pytest.mark.parametrize(
    "every", [np.int64(2), torch.tensor(2), lambda step: np.bool_(step % 2 == 0)]
)
def test_whole_numbers_of_every_kind_are_taken(tmp_path, every):
    model, optimizer = build()
    options = {"every": every, "queue_size": np.int32(3), "resume_at": np.int64(0)}
    with Recorder(model, optimizer, tmp_path / "run.zarr", **options):
        train(model, optimizer, 4)
    assert steps_of(tmp_path / "run.zarr") == [0, 2, 4]


@pytest.mark.parametrize("steps", [3, None, [1.5], ["1"], [True], [-1], [None]])
def test_steps_that_cannot_be_meant_are_refused(steps):
    with pytest.raises(DynamicsError, match="at_steps takes"):
        at_steps(steps)


def test_steps_may_come_in_any_list():
    for steps in (np.linspace(0, 4, 3), torch.tensor([0, 2, 4]), (each for each in (0, 2, 4))):
        due = at_steps(steps)
        assert [step for step in range(6) if due(step)] == [0, 2, 4]


# The surroundings of the process ----------------------------------------------------------------


def test_a_relative_path_is_that_of_the_beginning(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, store in (
        ("a", "a.zarr"),
        ("b", Path("b.zarr")),
        ("c", LocalStore("c.zarr")),
        ("d", "./x/../d.zarr"),
    ):
        model, optimizer = build()
        monkeypatch.chdir(tmp_path)
        recorder = Recorder(model, optimizer, store, every=1)
        monkeypatch.chdir(tmp_path / "elsewhere")
        with recorder:
            train(model, optimizer, 2)
        assert steps_of(tmp_path / f"{name}.zarr") == [0, 1, 2]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("spectra_only", [False, True])
def test_the_default_device_and_dtype_of_the_process_do_not_count(tmp_path, device, spectra_only):
    model, optimizer = build()
    record = ["weight", "gradient"] + ["update", "displacement"] * spectra_only
    options = {"every": 1, "spectra_only": spectra_only, "record": record}
    with Recorder(model, optimizer, tmp_path / "plain.zarr", **options):
        train(model, optimizer, 2)
    model, optimizer = build()
    recorder = Recorder(model, optimizer, tmp_path / "run.zarr", **options)
    torch.set_default_device(device)
    torch.set_default_dtype(torch.float64 if device == "cpu" else torch.float32)
    try:
        with recorder:
            recorder.log(loss=1.5)
            for _ in range(2):
                torch.set_default_device("cpu")
                torch.set_default_dtype(torch.float32)
                train(model, optimizer, recorder.step + 1, start=recorder.step)
                torch.set_default_device(device)
                torch.set_default_dtype(torch.float64 if device == "cpu" else torch.float32)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    found, expected = (Recording(tmp_path / f"{name}.zarr") for name in ("run", "plain"))
    assert found.steps.tolist() == [0, 1, 2]
    assert found.scalars["loss"][1] == 1.5
    for path in expected.paths:
        for index in range(3):
            a, b = (each.read(path, index) for each in (found, expected))
            if path.split("/")[0] in ("weight", "gradient", "spectra") and b is not None:
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
