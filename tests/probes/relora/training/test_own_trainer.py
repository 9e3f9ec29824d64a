"""`add_relora`: a Trainer of one's own has the merges, schedule and events of ReLoRA."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import dynamics as dy
from dynamics.errors import DynamicsError
from probes.frameworks.hf_trainer import RecorderCallback
from probes.relora import add_relora, jagged_cosine


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.cross_entropy(self.head(self.up(x).tanh()), labels)}


class Rates(TrainerCallback):
    def __init__(self):
        self.used = []

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.used.append(kwargs["optimizer"].param_groups[0]["lr"])


def adapted():
    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["up"]))
    for name, each in model.named_parameters():
        each.requires_grad_(".base_layer." not in name)
    return model


def trainer_of(folder, model, callbacks=(), **arguments):
    settings = {"max_steps": 9, "warmup_steps": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    torch.manual_seed(0)
    data = [{"x": torch.randn(6), "labels": torch.tensor(i % 3)} for i in range(32)]
    return Trainer(
        model,
        TrainingArguments(folder / "out", use_cpu=True, **settings | arguments),
        train_dataset=data,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("later", [False, True])
def test_the_schedule_the_merges_and_the_events_are_those_of_relora(tmp_path, later):
    rates, recorder = Rates(), RecorderCallback(tmp_path / "run.zarr", every=3)
    trainer = trainer_of(tmp_path, adapted(), [rates] if later else [recorder, rates])
    add_relora(trainer, reset_every=3, restart_warmup_steps=2)
    if later:
        trainer.add_callback(recorder)
    trainer.train()
    options = {"max_steps": 9, "warmup_steps": 2, "restart_warmup_steps": 2, "reset_every": 3}
    expected = [1e-2 * jagged_cosine(t, min_lr_ratio=0.1, **options) for t in range(9)]
    np.testing.assert_allclose(rates.used, expected, rtol=1e-12)
    run = dy.open_run(tmp_path / "run.zarr")
    told = [(each.step, each.kind) for each in run.events]
    assert told == [(step, kind) for step in (3, 6) for kind in ("merge", "optimizer_reset")]
    report = dy.audit(run)
    assert report.severity == "pass", report.line


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (Model, {}, "Model has no LoRA layer to merge; add adapters"),
        (adapted, {"max_steps": -1}, "max_steps = -1; set the number"),
    ],
)
def test_what_cannot_train_by_relora_is_refused_and_left_alone(tmp_path, build, arguments, message):
    trainer = trainer_of(tmp_path, build(), **arguments)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(DynamicsError, match=message):
        add_relora(trainer, reset_every=3, restart_warmup_steps=1)
    assert (trainer.optimizer, trainer.lr_scheduler) == (None, None)
    assert trainer.callback_handler.callbacks == before


def test_a_second_schedule_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, adapted())
    add_relora(trainer, reset_every=3, restart_warmup_steps=1)
    with pytest.raises(DynamicsError, match=r"has a schedule already \(LambdaLR\)"):
        add_relora(trainer, reset_every=3, restart_warmup_steps=1)
