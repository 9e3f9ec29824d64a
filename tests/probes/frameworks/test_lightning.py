"""The recorder inside a real Lightning Trainer."""

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

import dynamics as dy
from probes.frameworks.lightning import RecorderCallback
from tests.probes.stacks import LR, ROWS, Module, Rows

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(module, folder, *callbacks, library=pl, ckpt_path=None, **options):
    options = {"enable_checkpointing": False, **QUIET, **options}
    trainer = library.Trainer(default_root_dir=folder, callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(Rows(), batch_size=ROWS), ckpt_path=ckpt_path)
    return trainer


class Losses(pl.Callback):
    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            self.found.append(float(outputs["loss"]))


def test_the_loss_is_the_mean_over_the_micro_batches_and_learning_rates_stand_beside(tmp_path):
    losses = Losses()
    callback = RecorderCallback(tmp_path / "run.zarr", every=1)
    fit(Module(0.0), tmp_path, callback, losses, max_steps=3, accumulate_grad_batches=2)
    run = dy.open_run(tmp_path / "run.zarr")
    assert run.steps.tolist() == [0, 1, 2, 3]
    expected = np.asarray(losses.found).reshape(3, 2).sum(axis=1)  # each has been halved
    np.testing.assert_allclose(run.scalars["loss"][1:], expected, rtol=1e-6)
    np.testing.assert_array_equal(run.scalars["learning_rate"], [LR] * 4)
    assert callback.recorder is None


@pytest.mark.slow
def test_a_fit_from_a_checkpoint_continues_its_recording(tmp_path):
    store, whole = tmp_path / "run.zarr", tmp_path / "whole.zarr"
    epochs = {"limit_train_batches": 2}
    fit(Module(0.0), tmp_path, RecorderCallback(whole, every=1), max_steps=4, **epochs)
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, "half", every_n_train_steps=2)
    callback = RecorderCallback(store, every=1)
    options = {"enable_checkpointing": True, **epochs}
    fit(Module(0.0), tmp_path, callback, checkpoints, max_steps=3, **options)
    callback = RecorderCallback(store, every=1)
    half = tmp_path / "half.ckpt"
    fit(Module(0.0), tmp_path, callback, ckpt_path=half, max_steps=4, **epochs)
    run, expected = dy.open_run(store), dy.open_run(whole)
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    (event,) = run.events
    assert (event.kind, event.step, event.attrs["dropped_records"]) == ("resume", 2, 1)
    for name in expected.matrices:
        for kind in ("weight", "gradient"):
            a, b = (each.read(name, 4, kind).values for each in (run, expected))
            np.testing.assert_array_equal(a, b)


class Alternating(pl.LightningModule):
    """Manual optimization with an optimizer for each matrix."""

    def __init__(self):
        super().__init__()
        self.net = Module(0.0).net
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.net(**batch)["loss"])
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(layer.parameters(), lr=LR)
            for layer in (self.net.up_proj, self.net.down_proj)
        ]


@pytest.mark.slow
def test_steps_of_several_optimizers_are_those_of_the_last(tmp_path):
    automatic, manual = tmp_path / "automatic.zarr", tmp_path / "manual.zarr"
    fit(Module(0.0), tmp_path, RecorderCallback(automatic, every=1), max_steps=4)
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path, "half", every_n_train_steps=4)
    options = {"limit_train_batches": 2, "max_epochs": 1, "enable_checkpointing": True}
    fit(Alternating(), tmp_path, RecorderCallback(manual, every=1), checkpoints, **options)
    # Lightning counts 4 steps of two optimizers; the recording has to go on after step 2.
    half = tmp_path / "half.ckpt"
    options = {"limit_train_batches": 2, "max_epochs": 2}
    callback = RecorderCallback(manual, every=1)
    trainer = fit(Alternating(), tmp_path, callback, ckpt_path=half, **options)
    assert trainer.global_step == 8
    run, expected = dy.open_run(manual), dy.open_run(automatic)
    assert [(event.kind, event.step) for event in run.events] == [("resume", 2)]
    assert run.steps.tolist() == expected.steps.tolist() == [0, 1, 2, 3, 4]
    for name in expected.matrices:
        a, b = (each.read(name, 2, "gradient").values for each in (run, expected))
        np.testing.assert_array_equal(a, b)


class Overflowing(pl.Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1:  # the second step
            pl_module.net.up_proj.weight.grad[0, 0] = float("inf")


def test_a_step_that_the_scaler_skipped_counts_as_lightning_counts_it(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit(
        Module(0.0),
        tmp_path,
        Overflowing(),
        RecorderCallback(tmp_path / "run.zarr", every=1),
        max_steps=3,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
    )
    run = dy.open_run(tmp_path / "run.zarr")
    assert run.steps.tolist() == [0, 1, 2, 3]
    assert [(event.kind, event.step) for event in run.events] == [("skipped_step", 2)]
    assert np.isfinite(run.scalars["loss"][1:]).all()
    for name in run.matrices:
        weights = [run.read(name, step, "weight").values for step in run.steps]
        np.testing.assert_array_equal(weights[1], weights[2])
        assert (weights[2] != weights[3]).any()
        assert run.read(name, 2, "gradient") is None
        assert np.isfinite(run.read(name, 3, "gradient").values).all()


class Interrupting(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            raise ZeroDivisionError


def test_an_exception_finishes_the_recording(tmp_path):
    callback = RecorderCallback(tmp_path / "run.zarr", every=1)
    with pytest.raises(ZeroDivisionError):
        fit(Module(0.0), tmp_path, callback, Interrupting(), max_steps=4)
    assert callback.recorder is None
    assert dy.open_run(tmp_path / "run.zarr").steps.tolist() == [0, 1, 2]


def test_the_older_package_of_lightning_takes_the_callback_too(tmp_path):
    older = pytest.importorskip("pytorch_lightning")

    class OlderModule(older.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Module(0.0).net

        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers

    store = tmp_path / "run.zarr"
    fit(OlderModule(), tmp_path, RecorderCallback(store, every=1), library=older, max_steps=2)
    assert dy.open_run(store).steps.tolist() == [0, 1, 2]
