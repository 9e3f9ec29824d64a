"""Checkpoints of two kinds in one directory: the series counts, and all else is named."""

import json
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import dynamics as dy
from tests.dynamics.formats.checking import assert_bits, assert_refused

NAME = "model.layers.0.mlp.up_proj.weight"


def weights(seed):
    return {NAME: torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))}


def hugging_face(run, step):
    (run / f"step_{step}").mkdir(parents=True)
    save_file(weights(step), run / f"step_{step}/model.safetensors")
    return f"step_{step}"


def plain_file(run, step):
    run.mkdir(parents=True, exist_ok=True)
    torch.save(weights(step), run / f"step_{step}.pt")
    return f"step_{step}.pt"


def plain_directory(run, step):
    (run / f"step_{step}").mkdir(parents=True)
    torch.save(weights(step), run / f"step_{step}/model.pt")
    return f"step_{step}"


def distributed(run, step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": weights(step)}, checkpoint_id=run / f"step_{step}")
    return f"step_{step}"


def lightning(run, step):
    run.mkdir(parents=True, exist_ok=True)
    saved = {"state_dict": weights(step), "global_step": step, "pytorch-lightning_version": "2.5"}
    torch.save(saved, run / f"step={step}.ckpt")
    return f"step={step}.ckpt"


def adapter(run, step):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {
        f"{module}.lora_A.weight": torch.randn(2, 4),
        f"{module}.lora_B.weight": torch.randn(6, 2),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    return folder.name


KINDS = {
    "checkpoints": hugging_face,
    "files": plain_file,
    "directories": plain_directory,
    "dcp": distributed,
    "lightning": lightning,
    "peft": adapter,
}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_a_checkpoint_of_another_kind_is_never_silent(one, other, tmp_path):
    names = [KINDS[one](tmp_path, step) for step in (5, 10)]
    names.append(KINDS[other](tmp_path, 20))
    run = dy.open_run(tmp_path)
    seen = {place.rpartition("/")[2] for place in run.places.values()}
    assert seen | {*run.passed_over} == set(names)
    assert {*run.steps.tolist()} >= {5, 10}
    if one != other and 20 not in run.steps:
        assert "it is of format" in run.passed_over[names[-1]]
    assert 20 not in run.steps or 20 in run.problems or run.read(NAME, 20, run.kinds[0])


@pytest.mark.parametrize("first", [5, 30])
def test_the_kind_with_more_steps_is_the_run(first, tmp_path):
    hugging_face(tmp_path, first)
    for step in (10, 20):
        plain_file(tmp_path, step)
    run = dy.open_run(tmp_path)
    assert (run.format, run.steps.tolist()) == ("files", sorted((first, 10, 20)))
    for step in (first, 10, 20):
        assert_bits(run, step, weights(step))
    chosen = dy.open_run(tmp_path, format="checkpoints")
    assert chosen.steps.tolist() == [first]
    assert {*chosen.passed_over} == {"step_10.pt", "step_20.pt"}


@pytest.mark.parametrize("steps", [(5,), (5, 10)])
def test_two_kinds_of_the_same_steps_are_shown(steps, tmp_path):
    for step in steps:
        hugging_face(tmp_path, step)
        plain_file(tmp_path, step)
    assert_refused(
        tmp_path, r"step_.* \(format 'checkpoints'\), or as step_.*\.pt \(format 'files'\)"
    )
    for name in ("checkpoints", "files"):
        run = dy.open_run(tmp_path, format=name)
        assert run.steps.tolist() == list(steps)


# The final model beside the series ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lightning", "files", "directories", "dcp", "checkpoints"])
@pytest.mark.parametrize("folder", ["checkpoints", "ckpt", "."])
def test_a_final_model_beside_a_series_is_its_last_step_or_passed_over(kind, folder, tmp_path):
    for step in (5, 10):
        KINDS[kind](tmp_path / folder, step)
    save_file(weights(30), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == [5, 10]
    (name,) = run.passed_over
    assert name == f"the model in {tmp_path.name}/ itself"
    assert "neither its name nor its files tell a step" in run.passed_over[name]
    (tmp_path / "trainer_state.json").write_text('{"global_step": 30}')
    run = dy.open_run(tmp_path)
    if kind == "lightning":
        assert run.format == "lightning"
    assert (run.steps.tolist(), dict(run.passed_over)) == ([5, 10, 30], {})
    for step in (5, 10, 30):
        assert_bits(run, step, weights(step))
    (tmp_path / "trainer_state.json").write_text('{"global_step": 10}')
    run = dy.open_run(tmp_path)
    assert "is of step 10 too" in run.passed_over[name]
    (tmp_path / "trainer_state.json").write_text("{")
    assert "JSON" in dy.open_run(tmp_path).passed_over[name]


@pytest.mark.parametrize("name", ["final", "best", "last-model"])
@pytest.mark.parametrize("kind", ["lightning", "files", "checkpoints"])
def test_a_directory_with_the_final_model_likewise(kind, name, tmp_path):
    for step in (5, 10):
        KINDS[kind](tmp_path / "checkpoints", step)
    (tmp_path / name).mkdir()
    save_file(weights(30), tmp_path / name / "model.safetensors")
    run = dy.open_run(tmp_path)
    assert (run.steps.tolist(), list(run.passed_over)) == ([5, 10], [name])
    (tmp_path / name / "trainer_state.json").write_text('{"global_step": 30}')
    run = dy.open_run(tmp_path)
    assert (run.steps.tolist(), list(run.passed_over)) == ([5, 10, 30], [])
    assert_bits(run, 30, weights(30))


def test_a_final_adapter_beside_whole_models_is_named_and_hides_no_weight(tmp_path):
    for step in (5, 10):
        hugging_face(tmp_path / "checkpoints", step)
    saved = tmp_path / adapter(tmp_path, 3)
    for each in saved.iterdir():
        shutil.copy(each, tmp_path)
    shutil.rmtree(saved)
    run = dy.open_run(tmp_path)
    assert (run.steps.tolist(), run.kinds[0]) == ([5, 10], "weight")
    assert "format 'peft'" in run.passed_over[f"the model in {tmp_path.name}/ itself"]


@pytest.mark.parametrize("name", ["2_Dense", "1_Pooling", "0_head"])
def test_a_part_of_a_model_is_no_step(name, tmp_path):
    """sentence-transformers keeps the modules after the transformer in numbered directories."""
    save_file(weights(1), tmp_path / "model.safetensors")
    (tmp_path / name).mkdir()
    save_file({"linear.weight": torch.ones(3, 4)}, tmp_path / name / "model.safetensors")
    run = dy.open_run(tmp_path)
    assert run.steps.tolist() == [0]
    assert_bits(run, 0, weights(1))
    assert name in run.passed_over


def test_a_second_model_of_accelerate_is_no_step_of_the_first(tmp_path):
    torch.save(weights(1), tmp_path / "pytorch_model.bin")
    torch.save(weights(2), tmp_path / "pytorch_model_1.bin")
    run = dy.open_run(tmp_path)
    assert (run.format, run.steps.tolist()) == ("checkpoints", [0])
    assert_bits(run, 0, weights(1))
