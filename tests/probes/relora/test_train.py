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
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from dynamics.errors import DynamicsError, FormatError, MissingError, OutputExistsError
from probes.relora import (
    TextData,
    TokenBlocks,
    TrainConfig,
    add_adapters,
    build_model,
    load_base,
    newest_checkpoint,
    train,
)
from probes.relora.restart import lora_layers
from probes.relora.schedule import schedule_of

TOKENS = torch.arange(32).view(2, 16)


def interrupted_at(step: int, run: Any, folder: Path) -> Path:
    """What a run that was killed right after saving `step` has left."""
    shutil.copytree(run.path, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    return folder


def assert_equal_weights(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


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


def test_a_checkpoint_at_a_merge_step_holds_the_state_before_the_merge(relora_run: Any) -> None:
    bases = {
        step: load_file(relora_run.path / f"checkpoint-{step}/base/model.safetensors")
        for step in (4, 6, 8)
    }
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = load_file(relora_run.path / "checkpoint-4/adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    update = 3.0 * adapter[f"{prefix}B.weight"] @ adapter[f"{prefix}A.weight"]
    assert update.any()
    torch.testing.assert_close(bases[6][name], bases[4][name] + update)
    assert torch.equal(bases[8][name], bases[6][name])
    assert not torch.equal(bases[8]["lm_head.weight"], bases[6]["lm_head.weight"])


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


@pytest.mark.parametrize("step", [4, 6, 10])
def test_a_resumed_relora_run_ends_with_the_same_bits(
    relora_run: Any, run_to_end: Callable[..., Any], tmp_path: Path, step: int
) -> None:
    folder = interrupted_at(step, relora_run, tmp_path / "run")
    resumed = run_to_end(relora_run.config, folder, resume=True)
    assert_equal_weights(resumed.model, relora_run.model)
    assert resumed.events == [event for event in relora_run.events if event[1] >= step]
    assert len(resumed.batches) == 16 - step
    for a, b in zip(resumed.batches, relora_run.batches[step:], strict=True):
        assert torch.equal(a, b)


def test_a_resumed_full_rank_run_ends_with_the_same_bits(
    full_rank_run: Any, run_to_end: Callable[..., Any], tmp_path: Path
) -> None:
    folder = interrupted_at(6, full_rank_run, tmp_path / "run")
    resumed = run_to_end(full_rank_run.config, folder, resume=True)
    assert_equal_weights(resumed.model, full_rank_run.model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_base_and_adapter_of_a_checkpoint_reproduce_the_model(relora_run: Any) -> None:
    checkpoint = relora_run.path / "checkpoint-16"
    base, loading = LlamaForCausalLM.from_pretrained(checkpoint / "base", output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys"))
    model = PeftModel.from_pretrained(base, checkpoint).eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, relora_run.model.eval()(TOKENS).logits)


def test_two_trainings_of_one_config_give_the_same_bits(
    relora_run: Any, run_to_end: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(123)
    assert_equal_weights(run_to_end(relora_run.config, tmp_path).model, relora_run.model)


def test_accumulated_gradients_count_as_one_step(
    config: TrainConfig, run_to_end: Callable[..., Any], tmp_path: Path
) -> None:
    # 20 sequences, 6 to a step: the two left over are not seen as a smaller step.
    config = replace(config, batch_size=2, gradient_accumulation_steps=3, max_steps=9)
    run = run_to_end(config, tmp_path)
    assert [step for kind, step, _ in run.events if kind == "merge"] == [4, 8]
    assert len(run.batches) == 27
    assert torch.equal(torch.stack(run.batches[:9]), torch.stack(run.batches[9:18]))


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(
    relora_run: Any, tmp_path: Path
) -> None:
    folder = interrupted_at(8, relora_run, tmp_path / "run")
    (folder / "checkpoint-8/base/model.safetensors").unlink()
    (folder / "checkpoint-6/trainer_state.json").write_text('{"global_step": ')
    assert newest_checkpoint(folder) == folder / "checkpoint-4"
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_checkpoints_are_never_overwritten_by_a_new_run(relora_run: Any, data: TextData) -> None:
    with pytest.raises(OutputExistsError) as refused:
        train(relora_run.config, data, relora_run.path)
    assert str(refused.value) == (
        f"{relora_run.path} holds 8 checkpoints, the last of step 16; resume it, or choose another "
        "folder."
    )


def test_resuming_needs_an_unfinished_run_of_the_same_config_and_data(
    relora_run: Any, data: TextData, tmp_path: Path
) -> None:
    config = relora_run.config
    with pytest.raises(
        MissingError, match=r"No complete checkpoint in .*; start it without resume"
    ):
        train(config, data, tmp_path / "nothing", resume=True)
    with pytest.raises(DynamicsError, match="trained to its end, step 16 of 16"):
        train(config, data, relora_run.path, resume=True)
    folder = interrupted_at(4, relora_run, tmp_path / "run")
    with pytest.raises(DynamicsError, match=r"started with learning_rate = 0\.01, not 0\.02"):
        train(replace(config, learning_rate=0.02), data, folder, resume=True)
    other = replace(data, train=TokenBlocks(data.train.blocks.flip(0)))
    with pytest.raises(DynamicsError, match="started with train_tokens_sha256"):
        train(config, other, folder, resume=True)


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


def test_a_base_of_another_model_is_refused(relora_run: Any) -> None:
    config = replace(relora_run.config, intermediate_size=64)
    model = add_adapters(build_model(config), config)
    with pytest.raises(FormatError) as refused:
        load_base(model, relora_run.path / "checkpoint-4")
    assert (
        "model.layers.0.mlp.gate_proj.weight is (48, 32) there and (64, 32) in this model"
        in str(refused.value)
    )
    with pytest.raises(MissingError, match=r"No base/model\.safetensors in"):
        load_base(model, relora_run.path)


def test_loading_a_base_keeps_the_parameters_that_an_optimizer_holds(relora_run: Any) -> None:
    model = add_adapters(build_model(relora_run.config), relora_run.config)
    before = [id(parameter) for parameter in model.parameters()]
    load_base(model, relora_run.path / "checkpoint-16")
    assert [id(parameter) for parameter in model.parameters()] == before
    expected = lora_layers(relora_run.model)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, expected[name].get_base_layer().weight)


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
    with pytest.raises(DynamicsError) as refused:
        importlib.import_module("probes.relora")
    assert str(refused.value) == (
        "This needs the package 'peft': pip install 'learning-dynamics[relora]'."
    )


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


def test_lora_without_merges_is_saved_with_its_base_and_resumed_with_the_same_bits(
    config: TrainConfig, run_to_end: Callable[..., Any], tmp_path: Path
) -> None:
    config = replace(config, method="lora")
    run = run_to_end(config, tmp_path / "whole")
    assert run.events == []
    frozen = "model.layers.0.self_attn.q_proj.weight"
    bases = [load_file(path) for path in run.path.glob("checkpoint-*/base/model.safetensors")]
    assert len(bases) == 8
    assert all(torch.equal(base[frozen], bases[0][frozen]) for base in bases)
    folder = interrupted_at(6, run, tmp_path / "interrupted")
    assert_equal_weights(run_to_end(config, folder, resume=True).model, run.model)


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
