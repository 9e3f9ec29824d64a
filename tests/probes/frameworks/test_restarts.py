"""Trainings that begin again: none dies of the recorder, and each restart finds its recording."""

import copy
import pickle
import shutil
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from zarr.storage import MemoryStore

import dynamics as dy
from dynamics.errors import OutputExistsError
from dynamics.recordings import Recording, verify
from probes.frameworks import hf_trainer, lightning
from probes.frameworks.attaching import NotRecordedWarning
from tests.probes.frameworks.test_hf_trainer import CONFIG, Tokens
from tests.probes.frameworks.test_lightning import QUIET
from tests.probes.stacks import ROWS, Module, Rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


def trainer(folder, callback, *callbacks, kind=Trainer, **options):
    torch.manual_seed(0)
    settings = {"max_steps": 3, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return kind(
        model_init=lambda: LlamaForCausalLM(CONFIG),
        args=arguments,
        train_dataset=Tokens(),
        eval_dataset=Tokens(),
        callbacks=[callback, *callbacks],
    )


def recordings(folder):
    """Name -> steps of every recording, all of which must be sound and closed."""
    found = {}
    for path in sorted(folder.glob("*.zarr")):
        assert not verify(Recording(path)).damaged
        assert not (path / "writer/zarr.json").exists()
        found[path.name] = Recording(path).steps.tolist()
    return found


def raising(error, at):
    class Raising(TrainerCallback):
        times = 0

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == at and not self.times:
                Raising.times += 1
                raise error

    return Raising()


def test_a_second_training_of_one_trainer(tmp_path):
    callback = hf_trainer.RecorderCallback(tmp_path / "run.zarr", every=1)
    one = trainer(tmp_path, callback)
    one.train()
    one.train()
    one.evaluate()
    one.predict(Tokens())
    one.train()
    assert recordings(tmp_path) == {
        "run.zarr": [0, 1, 2, 3],
        "run-2.zarr": [0, 1, 2, 3],
        "run-3.zarr": [0, 1, 2, 3],
    }


@pytest.mark.parametrize("if_exists", ["overwrite", "refuse"])
def test_other_choices_for_a_second_training(tmp_path, if_exists):
    callback = hf_trainer.RecorderCallback(tmp_path / "run.zarr", every=1, if_exists=if_exists)
    one = trainer(tmp_path, callback)
    one.train()
    if if_exists == "refuse":
        with pytest.raises(OutputExistsError, match="if_exists='next'"):
            one.train()
    else:
        one.train()
    assert recordings(tmp_path) == {"run.zarr": [0, 1, 2, 3]}


def test_a_store_without_a_name_is_told_and_the_training_goes_on():
    store = MemoryStore()
    callback = hf_trainer.RecorderCallback(store, every=1)
    with tempfile.TemporaryDirectory() as folder:
        one = trainer(Path(folder), callback)
        one.train()
        with pytest.warns(NotRecordedWarning, match="not recorded: .* already holds a recording"):
            assert one.train().global_step == 3
    assert dy.open_run(store).steps.tolist() == [0, 1, 2, 3]


class Crowded(Trainer):
    def training_step(self, model, inputs, *rest):
        if self.state.global_step == 1 and len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().training_step(model, inputs, *rest)


def test_a_smaller_batch_after_an_out_of_memory_error(tmp_path):
    callback = hf_trainer.RecorderCallback(tmp_path / "run.zarr", every=1)
    one = trainer(tmp_path, callback, kind=Crowded, auto_find_batch_size=True)
    assert one.train().global_step == 3
    found = recordings(tmp_path)
    assert list(found.values())[-1] == [0, 1] or [0, 1, 2, 3] in found.values()
    assert callback.recorder is None


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_exception_loses_no_record_and_the_next_training_begins(tmp_path, error):
    callback = hf_trainer.RecorderCallback(tmp_path / "run.zarr", every=1)
    one = trainer(tmp_path, callback, raising(error, 2))
    with pytest.raises(type(error)):
        one.train()
    one.train()
    assert recordings(tmp_path) == {"run.zarr": [0, 1, 2], "run-2.zarr": [0, 1, 2, 3]}


def test_a_hyperparameter_search(tmp_path):
    pytest.importorskip("optuna")
    callback = hf_trainer.RecorderCallback(tmp_path / "run.zarr", every=1)
    one = trainer(tmp_path, callback, eval_strategy="steps", eval_steps=3)
    one.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("lr", 1e-4, 1e-3)},
        backend="optuna",
        n_trials=3,
    )
    assert list(recordings(tmp_path).values()) == [[0, 1, 2, 3]] * 3


def test_trials_one_after_another(tmp_path):
    """What a search does: new models and arguments, one callback."""
    callback = hf_trainer.RecorderCallback(tmp_path / "run.zarr", every=1)
    for rate in (1e-3, 1e-4):
        trainer(tmp_path, callback, learning_rate=rate).train()
    found = [dy.open_run(tmp_path / name) for name in ("run.zarr", "run-2.zarr")]
    rates = [run.scalars["learning_rate"][0] for run in found]
    assert rates == [1e-3, 1e-4]


def test_a_checkpoint_names_the_recording_that_it_belongs_to(tmp_path):
    store = tmp_path / "run.zarr"
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    first = trainer(tmp_path, hf_trainer.RecorderCallback(store, every=1), **options)
    first.train()
    (tmp_path / "out").rename(tmp_path / "first")
    trainer(tmp_path, hf_trainer.RecorderCallback(store, every=1), **options).train()
    (tmp_path / "out").rename(tmp_path / "second")
    assert recordings(tmp_path) == {"run.zarr": [*range(6)], "run-2.zarr": [*range(6)]}
    # Resuming the older training must not touch the recording of the newer one.
    again = trainer(tmp_path, hf_trainer.RecorderCallback(store, every=1), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-2"))
    runs = [dy.open_run(tmp_path / name) for name in ("run.zarr", "run-2.zarr")]
    assert [run.steps.tolist() for run in runs] == [[*range(6)]] * 2
    assert [[event.kind for event in run.events] for run in runs] == [["resume"], []]
    again = trainer(tmp_path, hf_trainer.RecorderCallback(store, every=1), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "second/checkpoint-4"))
    runs = [dy.open_run(tmp_path / name) for name in ("run.zarr", "run-2.zarr")]
    assert [len(run.events) for run in runs] == [1, 1]


def test_copies_of_a_callback_do_not_share_its_recorder(tmp_path):
    copies = []

    class Copying(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            copies.append(copy.deepcopy(callback))
            copies.append(pickle.loads(pickle.dumps(callback)))

    callback = hf_trainer.RecorderCallback(tmp_path / "run.zarr", every=1)
    trainer(tmp_path, callback, Copying()).train()
    assert all(each.recorder is None for each in copies)
    for each in copies:
        each.close()
    trainer(tmp_path, copies[0]).train()
    assert recordings(tmp_path) == {"run.zarr": [0, 1, 2, 3], "run-2.zarr": [0, 1, 2, 3]}


def test_relative_paths_are_those_of_the_callback(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    callbacks = [kind.RecorderCallback("run.zarr") for kind in (hf_trainer, lightning)]
    monkeypatch.chdir(tmp_path / "elsewhere")
    trainer(tmp_path, callbacks[0]).train()
    fit(tmp_path, callbacks[1])
    assert sorted(recordings(tmp_path)) == ["run-2.zarr", "run.zarr"]


# Lightning --------------------------------------------------------------------------------------


def fit(folder, callback, *callbacks, trainer=None, module=None, ckpt_path=None, **options):
    settings = {"max_steps": 3, "enable_checkpointing": False, **QUIET, **options}
    if trainer is None:
        trainer = pl.Trainer(default_root_dir=folder, callbacks=[callback, *callbacks], **settings)
    trainer.fit(module or Module(0.0), DataLoader(Rows(), batch_size=ROWS), ckpt_path=ckpt_path)
    return trainer


def test_a_second_fit_by_another_trainer(tmp_path):
    callback = lightning.RecorderCallback(tmp_path / "run.zarr", every=1)
    fit(tmp_path, callback)
    fit(tmp_path, callback)
    assert recordings(tmp_path) == {"run.zarr": [0, 1, 2, 3], "run-2.zarr": [0, 1, 2, 3]}


def test_a_second_fit_of_one_trainer_goes_on(tmp_path):
    callback, module = lightning.RecorderCallback(tmp_path / "run.zarr", every=1), Validated()
    module.validation_step = lambda batch, index=0: None
    one = fit(tmp_path, callback, module=module, max_steps=-1, max_epochs=1, limit_train_batches=2)
    one.validate(module, DataLoader(Rows(), batch_size=ROWS), verbose=False)
    one.fit_loop.max_epochs = 2
    fit(tmp_path, callback, trainer=one, module=module)
    assert recordings(tmp_path) == {"run.zarr": [0, 1, 2, 3, 4]}
    one.fit_loop.max_epochs = 2
    fit(tmp_path, callback, trainer=one, module=module)  # nothing is left to do
    assert recordings(tmp_path) == {"run.zarr": [0, 1, 2, 3, 4]}


class Validated(Module):
    def __init__(self, batch_size=ROWS, lr=0.1):
        super().__init__(0.0)
        self.batch_size, self.lr = batch_size, lr
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(Rows(), batch_size=self.batch_size)


@pytest.mark.parametrize("what", ["scale_batch_size", "lr_find"])
def test_a_tuner_before_the_fit(tmp_path, what):
    callback = lightning.RecorderCallback(tmp_path / "run.zarr", every=1)
    module = Validated()
    one = pl.Trainer(
        default_root_dir=tmp_path, callbacks=[callback], max_steps=3, **QUIET,
        enable_checkpointing=False,
    )  # fmt: skip
    tuner = Tuner(one)
    if what == "lr_find":
        tuner.lr_find(module, num_training=5)
    else:
        tuner.scale_batch_size(module, max_trials=2, steps_per_trial=2)
    one.fit(module)
    assert recordings(tmp_path) == {"run.zarr": [0, 1, 2, 3]}


def test_an_exception_in_a_fit_and_the_fit_after_it(tmp_path):
    class Raising(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                raise ZeroDivisionError

    callback = lightning.RecorderCallback(tmp_path / "run.zarr", every=1)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, callback, Raising())
    fit(tmp_path, callback)
    assert recordings(tmp_path) == {"run.zarr": [0, 1, 2], "run-2.zarr": [0, 1, 2, 3]}


def test_a_checkpoint_of_lightning_names_its_recording_and_is_never_ahead_of_it(tmp_path):
    store = tmp_path / "run.zarr"

    class Watching(pl.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            assert Recording(callback.store).steps[-1] == trainer.global_step

    for _ in range(2):
        callback = lightning.RecorderCallback(store, every=1)
        saving = pl.callbacks.ModelCheckpoint(
            tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1
        )
        options = {"max_steps": 5, "enable_checkpointing": True}
        fit(tmp_path, callback, Watching(), saving, **options)
    checkpoint = tmp_path / "step=2.ckpt"  # of the first, as the second has a version
    fit(tmp_path, lightning.RecorderCallback(store, every=1), ckpt_path=checkpoint, max_steps=5)
    runs = [dy.open_run(tmp_path / name) for name in ("run.zarr", "run-2.zarr")]
    assert [run.steps.tolist() for run in runs] == [[*range(6)]] * 2
    assert [[event.kind for event in run.events] for run in runs] == [["resume"], []]


def test_training_has_the_same_bits_in_each_restart(tmp_path):
    ends = []
    for recorded in (False, True):
        callback = hf_trainer.RecorderCallback(tmp_path / "run.zarr", every=1)
        one = trainer(tmp_path, *([callback] if recorded else [TrainerCallback()]))
        for _ in range(2):
            one.train()
            ends.append([each.detach().numpy().copy() for each in one.model.parameters()])
    for plain, recorded in zip(ends[:2], ends[2:], strict=True):
        for a, b in zip(plain, recorded, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_writer_that_failed_does_not_end_the_next_training(tmp_path):
    store = tmp_path / "run.zarr"
    callback = hf_trainer.RecorderCallback(store, every=1)

    class Deleting(TrainerCallback):
        done = False

        def on_step_end(self, args, state, control, **_):
            if not self.done and state.global_step == 1:
                self.done = True
                callback.recorder.flush()
                shutil.rmtree(store)

    one = trainer(tmp_path, callback, Deleting(), raising(ZeroDivisionError(), 2))
    with pytest.raises(ZeroDivisionError):
        one.train()
    with pytest.warns(NotRecordedWarning, match="could not write"):
        assert one.train().global_step == 3
    assert [0, 1, 2, 3] in recordings(tmp_path).values()
