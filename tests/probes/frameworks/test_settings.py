"""A recording knows what its run was made with: arguments, hyperparameters, the adapter."""

import json

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import dynamics as dy
from dynamics.analysis.settings import settings_of
from probes.frameworks.lightning import RecorderCallback
from probes.model.provenance import settings
from tests.probes.frameworks.trainer import trained_by_trainer


def test_secrets_and_places_are_no_settings():
    given = {
        "hub_token": "hf_1",
        "push_to_hub_token": "hf_2",
        "num_tokens": 8,
        "output_dir": "/home/me",
        "nested": {"api_key": "k", "lr": 0.1, "store": "s3://me:word@host/x", "path": "s3://x"},
        "model": torch.nn.Linear(1, 1),
        "modules": {"v", "q"},
    }
    assert settings(given) == {
        "num_tokens": 8,
        "nested": {"lr": 0.1, "path": "s3://x"},
        "modules": ["q", "v"],
    }


@pytest.mark.slow
def test_runs_of_the_trainer_differ_in_the_arguments_that_differ(tmp_path):
    for seed, decay in ((0, 0.0), (1, 0.0), (0, 0.5), (1, 0.5)):
        trained_by_trainer(
            tmp_path, f"{decay}-{seed}", batch=4, every=2, seed=seed, weight_decay=decay,
            hub_token="hf_secret", logging_strategy="no",
        )  # fmt: skip
    runs = {path.stem: path for path in sorted(tmp_path.glob("*.zarr"))}
    both = dy.compare(runs, kinds=["displacement"], metrics=["effective_rank"])
    assert both["seed"].values.tolist() == [0, 1, 0, 1]
    assert both["weight_decay"].values.tolist() == [0.0, 0.0, 0.5, 0.5]
    along_run = {name for name, each in both.coords.items() if each.dims == ("run",)}
    assert along_run == {"run", "seed", "weight_decay"}
    found = dy.over(both["effective_rank"].sel(step=4, kind="displacement"), "seed")
    assert found["run"].values.tolist() == ["weight_decay=0.0", "weight_decay=0.5"]
    attrs = dict(dy.open_run(runs["0.5-1"]).attrs)
    assert attrs["training_arguments"]["learning_rate"] == 1e-2
    assert "secret" not in json.dumps(attrs)
    assert str(tmp_path) not in json.dumps(attrs)
    known = settings_of(attrs)
    assert (known["r"], known["peft_type"]) == (attrs["adapter_config"]["r"], "LORA")


class Saving(pl.LightningModule):
    """A module that saves its hyperparameters."""

    def __init__(self, width, lr):
        super().__init__()
        self.save_hyperparameters()
        self.up_proj = torch.nn.Linear(4, width)

    def training_step(self, batch, index):
        return self.up_proj(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


@pytest.mark.slow
def test_runs_of_lightning_differ_in_their_hyperparameters(tmp_path):
    for width, lr in ((2, 0.1), (2, 0.2)):
        trainer = pl.Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
            callbacks=[RecorderCallback(tmp_path / f"{lr}", every=1, attrs={"seed": 3})],
        )  # fmt: skip
        trainer.fit(Saving(width, lr), DataLoader(torch.ones(8, 4), batch_size=2))
    both = dy.compare({"a": tmp_path / "0.1", "b": tmp_path / "0.2"}, kinds=["weight"])
    assert both["lr"].values.tolist() == [0.1, 0.2]
    attrs = dy.open_run(tmp_path / "0.1").attrs
    assert attrs["hyperparameters"] == {"width": 2, "lr": 0.1}
    assert attrs["seed"] == 3
