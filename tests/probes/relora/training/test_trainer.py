"""One training run: its batches, schedule, merges and checks."""

import json
import shutil
import socket
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamics.errors import DynamicsError
from probes.relora import TextData, TrainConfig, train
from probes.relora.training.schedule import schedule_of
from tests.probes.relora.conftest import assert_equal_weights


def test_twins_see_identical_batches(relora_run: Any, full_rank_run: Any) -> None:
    assert len(relora_run.batches) == len(full_rank_run.batches) == 16
    for a, b in zip(relora_run.batches, full_rank_run.batches, strict=True):
        assert torch.equal(a, b)


def test_batches_come_in_the_order_of_the_data_and_start_over(
    relora_run: Any, data: TextData
) -> None:
    expected = torch.cat([data.train.blocks, data.train.blocks])[:32]
    assert torch.equal(torch.cat(relora_run.batches), expected)


def test_the_merges_and_resets_happen_and_are_told(relora_run: Any, full_rank_run: Any) -> None:
    assert full_rank_run.events == []
    kinds = [(kind, step) for kind, step, _ in relora_run.events]
    assert kinds == [(kind, step) for step in (4, 8, 12) for kind in ("merge", "optimizer_reset")]
    for kind, _, attrs in relora_run.events:
        if kind == "merge":
            assert (attrs["merged_layers"], attrs["scaling"]) == (14, 3.0)
            assert attrs["relative_change"] <= attrs["tolerance"] < 1e-4
            assert attrs["scale"] == pytest.approx(1, abs=1e-5)
        else:
            assert (attrs["tensors"], attrs["mode"], attrs["reset_share"]) == (28, "drop", 1.0)
            assert attrs["zero_exp_avg"] == attrs["zero_exp_avg_sq"] == 1
            assert attrs["learning_rate"] == 0  # of the next step, the ramp's first


def test_adams_step_count_restarts_with_the_adapters_and_goes_on_elsewhere(
    relora_run: Any,
) -> None:
    trainable = [name for name, p in relora_run.model.named_parameters() if p.requires_grad]
    for step, since_merge in ((4, 4), (6, 2), (8, 4), (14, 2)):
        state = torch.load(relora_run.path / f"checkpoint-{step}/optimizer.pt")["state"]
        counts = {name: state[index]["step"] for index, name in enumerate(trainable)}
        for name, count in counts.items():
            assert count == (since_merge if "lora_" in name else step), name


def test_each_twin_trains_with_its_published_schedule(relora_run: Any, full_rank_run: Any) -> None:
    for run in (relora_run, full_rank_run):
        rates = {e["step"]: e["learning_rate"] for e in run.log if "loss" in e}
        assert list(rates) == [2, 4, 6, 8, 10, 12, 14, 16]
        multiplier = schedule_of(run.config)
        for step, rate in rates.items():
            # The rate logged after N steps is that of the N-th, which N - 1 steps preceded.
            assert rate == pytest.approx(1e-2 * multiplier(step - 1))


@pytest.mark.slow
def test_two_trainings_of_one_config_give_the_same_bits(
    relora_run: Any, run_to_end: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(123)
    assert_equal_weights(run_to_end(relora_run.config, tmp_path).model, relora_run.model)


@pytest.mark.slow
def test_accumulated_gradients_count_as_one_step(
    config: TrainConfig, run_to_end: Callable[..., Any], tmp_path: Path
) -> None:
    # 20 sequences, 6 to a step: the two left over are not seen as a smaller step.
    config = replace(config, batch_size=2, gradient_accumulation_steps=3, max_steps=9)
    run = run_to_end(config, tmp_path)
    assert [step for kind, step, _ in run.events if kind == "merge"] == [4, 8]
    assert len(run.batches) == 27
    assert torch.equal(torch.stack(run.batches[:9]), torch.stack(run.batches[9:18]))


def test_data_that_does_not_fit_the_config_is_refused(
    config: TrainConfig, data: TextData, tmp_path: Path
) -> None:
    with pytest.raises(DynamicsError) as few:
        train(replace(config, batch_size=64), data, tmp_path)
    assert str(few.value) == (
        "The data has 20 training sequences and one step takes 64; give more text or a smaller "
        "batch_size."
    )
    with pytest.raises(DynamicsError, match="sequences of 16 tokens and sequence_length is 8"):
        train(replace(config, sequence_length=8), data, tmp_path)
    with pytest.raises(DynamicsError, match="token 255 and vocab_size is 100"):
        train(replace(config, vocab_size=100), data, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full_rank", "relora"])
def test_training_is_silent_and_offline(
    config: TrainConfig,
    data: TextData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    method: str,
) -> None:
    attempts: list[Any] = []

    def refuse(*address: Any, **options: Any) -> None:
        attempts.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = replace(config, method=method, max_steps=6, save_every=3)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(config, data, tmp_path / "run")
        shutil.rmtree(tmp_path / "run/checkpoint-6")
        train(config, data, tmp_path / "run", resume=True)
    assert attempts == []
    assert [str(warning.message) for warning in warned] == []
    assert capfd.readouterr() == ("", "")


def test_the_folder_says_how_the_run_was_started(relora_run: Any, data: TextData) -> None:
    stored = json.loads((relora_run.path / "train_config.json").read_text())
    assert stored.pop("train_tokens_sha256") == data.train.digest()
    stored["target_modules"] = tuple(stored["target_modules"])
    assert TrainConfig(**stored) == relora_run.config


def test_a_missing_dependency_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib
    import sys

    for name in [name for name in sys.modules if name.split(".")[:2] == ["probes", "relora"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    package = importlib.import_module("probes.relora")
    with pytest.raises(DynamicsError) as refused:
        _ = package.train
    assert str(refused.value) == (
        "This needs the package 'peft': pip install 'learning-dynamics[relora]'."
    )


@pytest.mark.slow
def test_under_autocast_the_parameters_stay_in_float32(
    config: TrainConfig, run_to_end: Callable[..., Any], tmp_path: Path, relora_run: Any
) -> None:
    run = run_to_end(replace(config, precision="bfloat16"), tmp_path)
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    losses, exact = (
        [each["loss"] for each in log if "loss" in each] for log in (run.log, relora_run.log)
    )
    assert losses != exact
    assert losses == pytest.approx(exact, rel=2**-7)  # bfloat16 keeps eight bits


@pytest.mark.slow
def test_validation_has_its_own_period(
    config: TrainConfig, run_to_end: Callable[..., Any], tmp_path: Path
) -> None:
    run = run_to_end(replace(config, evaluate_every=4, save_every=16, log_every=8), tmp_path)
    assert [each["step"] for each in run.log if "eval_loss" in each] == [4, 8, 12, 16]
    assert [each["step"] for each in run.log if "loss" in each] == [8, 16]
    assert [path.name for path in run.path.glob("checkpoint-*")] == ["checkpoint-16"]


def test_what_cannot_train_is_told_before_anything_is_written(
    config: TrainConfig, data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DynamicsError, match="Cannot report to 'abacus': "):
        train(config, data, tmp_path, report_to=["abacus"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DynamicsError) as uneven:
        train(config, data, tmp_path)
    assert str(uneven.value) == (
        "3 processes cannot share batch_size = 2 sequences evenly; set a multiple of their number."
    )
    assert list(tmp_path.iterdir()) == []
