"""Checkpoints of a run: whole ones, and going on from them with the same bits."""

import shutil
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
from probes.relora.training.restart import lora_layers
from tests.probes.relora.conftest import TOKENS, assert_equal_weights


def interrupted_at(step: int, run: Any, folder: Path) -> Path:
    """What a run that was killed right after saving `step` has left."""
    shutil.copytree(run.path, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    return folder


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
