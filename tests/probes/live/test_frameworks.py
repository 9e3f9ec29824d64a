"""Live values reach what the framework reports to, beside its own, at the right steps."""

import json

import pytest
import torch

import dynamics as dy
from dynamics.errors import DynamicsError
from probes import Live
from tests.probes.frameworks.trainer import trained_by_trainer
from tests.probes.live import reading
from tests.probes.live.test_trackers import in_float32, offline
from tests.probes.live.training import Net, expected

pytestmark = pytest.mark.slow
__all__ = ["offline"]


def trained(folder, name, report_to, **live):
    """A Trainer after 4 steps, of which every one is logged and recorded."""
    from probes.frameworks.hf_trainer import RecorderCallback

    settings = Live(budget=None, **live)
    callback = RecorderCallback(folder / f"{name}.zarr", every=1, live=settings)
    return trained_by_trainer(folder, name, batch=4, callbacks=[callback], report_to=report_to)


def same_weights(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def losses(history):
    return {row["step"]: row["loss"] for row in history if "loss" in row}


def test_the_trainers_trackers_have_the_values_and_all_of_its_own(tmp_path, offline, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trained(tmp_path, "run", ["tensorboard", "wandb"])
    assert same_weights(trainer.model, trained_by_trainer(tmp_path, "plain", batch=4).model)
    history = trainer.state.log_history
    values = expected(tmp_path / "run.zarr")
    assert list(losses(history)) == [1, 2, 3, 4]  # nothing of the Trainer's own log is missing,
    assert "rank/" not in json.dumps(history)  # and nothing of ours is in it
    assert reading.of_tensorboard(tmp_path, "train/") == in_float32(values)
    assert reading.of_wandb(tmp_path, "train/", "train/global_step") == values
    rows = reading.rows_of_wandb(tmp_path)
    own = {row["train/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert own == losses(history)
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert len({file.parent for file in files}) == 1  # one run of TensorBoard
    tags = EventAccumulator(str(files[0].parent))
    tags.Reload()
    assert "train/loss" in tags.Tags()["scalars"]


def test_a_trainer_that_reports_to_nobody_is_told_so(tmp_path):
    with pytest.raises(DynamicsError, match=r"report_to='tensorboard'"):
        trained(tmp_path, "run", "none")
    shown = {}
    trained(tmp_path, "own", "none", to=lambda values, step: shown.update({step: values}))
    assert shown == expected(tmp_path / "own.zarr")


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.randn(12, generator=torch.Generator().manual_seed(index))


def fitted(folder, loggers, live=True, **options):
    import lightning.pytorch as pl

    from probes.frameworks.lightning import RecorderCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            loss = (self.net(batch) - batch.flip(1)).pow(2).mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    callback = RecorderCallback(folder / "run.zarr", every=1, live=Live(budget=None))
    trainer = pl.Trainer(
        max_steps=6, accelerator="cpu", logger=loggers, callbacks=[callback] if live else [],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        log_every_n_steps=2, **options,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(Data(), batch_size=4))
    return module


def test_lightnings_loggers_have_the_values_and_their_own(tmp_path, offline):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

    loggers = [
        TensorBoardLogger(tmp_path / "log"),
        WandbLogger(save_dir=tmp_path, offline=True),
        CSVLogger(tmp_path / "csv"),
    ]
    assert same_weights(fitted(tmp_path, loggers), fitted(tmp_path, False, live=False))
    values = expected(tmp_path / "run.zarr")
    assert reading.of_tensorboard(tmp_path / "log") == in_float32(values)
    assert reading.of_wandb(tmp_path, step="trainer/global_step") == values
    rows = reading.rows_of_wandb(tmp_path)
    assert [row["trainer/global_step"] for row in rows if "loss" in row] == [1, 3, 5]


@pytest.mark.parametrize("log_with", ["tensorboard", "wandb"])
def test_accelerates_trackers_have_the_values_and_all_that_is_logged(tmp_path, offline, log_with):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from accelerate import Accelerator

    from probes import Recorder
    from tests.probes.live.training import build, loop

    accelerator = Accelerator(cpu=True, log_with=log_with, project_dir=tmp_path)
    accelerator.init_trackers("test")
    model, optimizer = accelerator.prepare(*build())
    live = Live(to=accelerator.log, budget=None)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1, live=live):
        loop(
            model, optimizer, 6, after_step=lambda t, loss: accelerator.log({"loss": loss}, step=t)
        )
    accelerator.end_training()
    values = expected(tmp_path / "run.zarr")
    if log_with == "tensorboard":
        assert reading.of_tensorboard(tmp_path) == in_float32(values)
    else:
        assert reading.of_wandb(tmp_path) == values
        assert sum("loss" in row for row in reading.rows_of_wandb(tmp_path)) == 6
    assert dy.open_run(tmp_path / "run.zarr").steps.tolist() == list(range(7))
