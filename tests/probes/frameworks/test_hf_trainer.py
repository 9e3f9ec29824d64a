"""The recorder inside a real Hugging Face Trainer."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import Subset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import dynamics as dy
from probes import Live
from probes.frameworks.hf_trainer import RecorderCallback
from tests.probes import stacks
from tests.probes.adapted import adapted_model, frozen_matrices, relative_error
from tests.probes.frameworks.trainer import trained_by_trainer

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.randint(32, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def _train(directory, steps, *, callbacks=(), resume=False, **options):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=2,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        include_num_input_tokens_seen="all",
        **options,
    )
    trainer = Trainer(
        LlamaForCausalLM(CONFIG),
        arguments,
        train_dataset=Tokens(),
        eval_dataset=Subset(Tokens(), range(4)),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    callback = RecorderCallback(directory / "run.zarr", every=2)
    return directory, _train(directory / "out", 6, callbacks=[callback])


def test_a_record_equals_the_checkpoint_of_its_step(recorded):
    directory, _ = recorded
    run, checkpoints = dy.open_run(directory / "run.zarr"), dy.open_run(directory / "out")
    assert run.steps.tolist() == [0, 2, 4, 6]
    assert checkpoints.steps.tolist() == [2, 4, 6]
    assert list(run.matrices.values()) == list(checkpoints.matrices.values())
    for step in (2, 4, 6):
        for name in run.matrices:
            ours, theirs = (each.read(name, step, "weight") for each in (run, checkpoints))
            np.testing.assert_array_equal(ours.values, theirs.values)


def test_logged_scalars_stand_at_their_steps(recorded):
    directory, trainer = recorded
    scalars = dy.open_run(directory / "run.zarr").scalars
    logged = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    np.testing.assert_array_equal(scalars["loss"], [np.nan, logged[2], logged[4], logged[6]])
    np.testing.assert_array_equal(scalars["tokens"], [np.nan, 128, 256, 384])
    assert np.isfinite(scalars["grad_norm"][1:]).all()


@pytest.mark.parametrize("live", [None, Live(to=lambda values, step: None)], ids=["", "live"])
def test_an_evaluation_after_the_log_of_its_step_belongs_to_the_record(live, tmp_path):
    # With counted tokens, each log of the Trainer has a "train_runtime", not only the last one.
    callback = RecorderCallback(tmp_path / "run.zarr", every=2, live=live)
    evaluated = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = _train(tmp_path / "out", 4, callbacks=[callback], **evaluated)
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    recorded = dy.open_run(tmp_path / "run.zarr").scalars["eval_loss"]
    np.testing.assert_array_equal(recorded, [np.nan, *losses])


@pytest.mark.slow
def test_training_computes_the_same_bits_with_and_without_the_callback(recorded, tmp_path):
    _, trainer = recorded
    plain = _train(tmp_path / "out", 6)
    for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_resumed_trainer_continues_its_recording(recorded, tmp_path):
    directory, _ = recorded
    store = tmp_path / "run.zarr"
    _train(tmp_path / "out", 4, callbacks=[RecorderCallback(store, every=2)])
    _train(tmp_path / "out", 6, callbacks=[RecorderCallback(store, every=2)], resume=True)
    whole, resumed = dy.open_run(directory / "run.zarr"), dy.open_run(store)
    assert resumed.steps.tolist() == [0, 2, 4, 6]
    for name in whole.matrices:
        for kind in ("weight", "gradient"):
            a, b = (each.read(name, 6, kind).values for each in (whole, resumed))
            np.testing.assert_array_equal(a, b)
    assert [(event.kind, event.step) for event in resumed.events] == [("resume", 4)]


@pytest.mark.slow
def test_the_recorded_gradient_is_the_clipped_one(tmp_path):
    callback = RecorderCallback(tmp_path / "run.zarr", every=1)
    _train(tmp_path / "out", 2, callbacks=[callback], max_grad_norm=1e-3)
    run = dy.open_run(tmp_path / "run.zarr")
    squared = sum((run.read(name, 2, "gradient").values ** 2).sum() for name in run.matrices)
    assert 0 < squared <= 1e-6 * (1 + 1e-4)


class _Uneven(Tokens):
    """Sequences in which ever fewer labels count."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        labels = item["labels"].clone()
        labels[: index % 7] = -100
        return {**item, "labels": labels}


@pytest.mark.slow
def test_the_gradient_is_that_of_the_mean_over_the_tokens_of_all_micro_batches(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    reference = copy.deepcopy(model).double()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    callback = RecorderCallback(tmp_path / "run.zarr", every=1)
    Trainer(model, arguments, train_dataset=_Uneven(), callbacks=[callback]).train()

    rows = [_Uneven()[index] for index in range(4)]
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    scores = reference(input_ids=ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten()).backward()
    run = dy.open_run(tmp_path / "run.zarr")
    for name in run.matrices:
        found = run.read(name, 1, "gradient").values
        assert relative_error(found, reference.get_parameter(name).grad) < 2e-6


class _Overflow(TrainerCallback):
    """Spoils the gradients of the second step; the scaler looks for Inf when it unscales them."""

    def __init__(self):
        self.handle = None

    def on_step_begin(self, args, state, control, *, model, **kwargs):
        if state.global_step == 1:
            weight = model.up_proj.weight
            self.handle = weight.register_hook(lambda gradient: gradient * float("inf"))
        elif self.handle is not None:
            self.handle.remove()


@pytest.mark.slow
def test_a_step_that_the_scaler_skipped_counts_as_the_trainer_counts_it(tmp_path):
    callback = RecorderCallback(tmp_path / "run.zarr", every=1)
    case = stacks.Case("float16")
    stacks.trainer(case, None, tmp_path, callbacks=[_Overflow(), callback], logging_steps=1)
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


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_probing_adapted_models_changes_no_bit_and_leaves_them_frozen(tmp_path, every):
    probed = trained_by_trainer(tmp_path, "probed", batch=4, every=every, dropout=0.3)
    plain = trained_by_trainer(tmp_path, "plain", batch=4, dropout=0.3)
    for a, b in zip(probed.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    norms = [
        [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
        for trainer in (probed, plain)
    ]
    assert norms[0] == norms[1]
    assert max(norms[0]) > 0.05  # there was something to clip
    run = dy.open_run(tmp_path / "probed.zarr")
    for name in frozen_matrices(adapted_model()):
        for step in run.steps[1:].tolist():
            assert run.read(name, step, "gradient").values.any()


class _Crash(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_after_an_exception_the_callback_can_be_closed(tmp_path):
    models = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, *, model, **kwargs):
            models.append(model)

    callback = RecorderCallback(tmp_path / "run.zarr", every=1)
    with pytest.raises(KeyboardInterrupt):
        trained_by_trainer(tmp_path, "out", batch=4, callbacks=[callback, Watch(), _Crash()])
    frozen = frozen_matrices(adapted_model())
    callback.close()
    callback.close()
    assert set(frozen_matrices(models[0])) == set(frozen)
    assert dy.open_run(tmp_path / "run.zarr").steps.tolist() == [0, 1, 2]
