"""What trainers and scripts leave behind beyond the usual: read, or told in one line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dynamics as dy
from dynamics.schema import Status
from tests.dynamics.formats.checking import assert_bits, assert_problem, assert_refused
from tests.dynamics.formats.test_two_kinds import NAME, adapter, hugging_face, weights


def composer(path, step):
    """composer/checkpoint: the state of all that trains lies one level down."""
    saved = {"state": {"model": weights(step), "timestamp": {}}, "rng": []}
    torch.save(saved, path / f"ep0-ba{step}-rank0.pt")


def imagenet_example(path, step):
    torch.save({"state_dict": weights(step), "epoch": step}, path / f"checkpoint_{step}.pth.tar")


def plain_ckpt(path, step):
    torch.save(weights(step), path / f"model_{step}.ckpt")


def diffusers(path, step):
    (path / f"checkpoint-{step}/unet").mkdir(parents=True)
    name = "unet/diffusion_pytorch_model.safetensors"
    save_file(weights(step), path / f"checkpoint-{step}" / name)


@pytest.mark.parametrize("layout", [composer, imagenet_example, plain_ckpt, diffusers])
def test_they_are_read(layout, tmp_path):
    for step in (5, 10):
        layout(tmp_path, step)
    run = dy.open_run(tmp_path)
    assert (run.steps.tolist(), dict(run.problems), dict(run.passed_over)) == ([5, 10], {}, {})
    assert_bits(run, 10, weights(10))


def test_a_moving_average_beside_the_weights_is_named(tmp_path):
    """As timm keeps it; the state of an optimizer is none."""
    moments = {"state": {0: {"exp_avg": torch.ones(6, 4)}}, "param_groups": [{"lr": 0.1}]}
    saved = {"state_dict": weights(5), "state_dict_ema": weights(6), "optimizer": moments}
    torch.save(saved, tmp_path / "checkpoint-5.pth")
    with pytest.warns(dy.LeftOutWarning, match="state_dict_ema"):
        dy.analyze(tmp_path, metrics=["effective_rank"])
    run = dy.open_run(tmp_path)
    assert_bits(run, 5, weights(5))
    left_out = {each.name: each.reason for each in run.account.left_out}
    assert left_out == {
        f"state_dict_ema.{NAME}": "of a second state dict of the model, 'state_dict_ema'"
    }


def test_two_models_of_diffusers_are_shown(tmp_path):
    for step in (5, 10):
        diffusers(tmp_path, step)
        (tmp_path / f"checkpoint-{step}/text_encoder").mkdir()
        save_file(weights(1), tmp_path / f"checkpoint-{step}/text_encoder/model.safetensors")
    assert_refused(tmp_path, r"checkpoint-\d+/text_encoder, \.\.\., or as checkpoint-\d+/unet")


def test_the_directories_of_a_clash_are_told_apart(tmp_path):
    for name, step in (("epoch_1/step_10", 1), ("epoch_2/step_10", 2), ("epoch_2/step_20", 3)):
        (tmp_path / name).mkdir(parents=True)
        save_file(weights(step), tmp_path / name / "model.safetensors")
    run = dy.open_run(tmp_path)
    assert_problem(run, 10, "epoch_1/step_10 and epoch_2/step_10, both of step 10")
    assert dict(run.passed_over) == {}


def test_shards_without_their_index_are_named_as_such(tmp_path):
    hugging_face(tmp_path, 5)
    (tmp_path / "step_10").mkdir()
    save_file(weights(1), tmp_path / "step_10/model-00001-of-00002.safetensors")
    assert_problem(dy.open_run(tmp_path), 10, "a part of a model, but not the index")


def test_an_adapter_that_was_saved_empty_is_no_adapter_that_does_nothing(tmp_path):
    """As FSDP and ZeRO 3 leave it where nobody gathers the state."""
    for step in (5, 10):
        adapter(tmp_path, step)
    save_file({}, tmp_path / "checkpoint-10/adapter_model.safetensors")
    (tmp_path / "base").mkdir()
    save_file(weights(1), tmp_path / "base/model.safetensors")
    assert_problem(dy.open_run(tmp_path), 10, "an adapter without tensors")


# A model that changes its shape --------------------------------------------------------------


@pytest.fixture
def resized(tmp_path):
    """An embedding that got more rows between steps 5 and 10."""
    for step, rows in ((5, 9), (10, 12), (15, 12)):
        (tmp_path / f"step_{step}").mkdir()
        generator = torch.Generator().manual_seed(step)
        embedding = {"lm_head.weight": torch.randn(rows, 4, generator=generator)}
        save_file(weights(step) | embedding, tmp_path / f"step_{step}/model.safetensors")
    return tmp_path


def test_a_difference_of_two_shapes_is_a_problem_and_the_rest_is_measured(resized):
    result = dy.analyze(resized, metrics=["effective_rank"])
    status = result.status.sel(matrix="lm_head.weight")
    measured, unreadable = int(Status.MEASURED), int(Status.UNREADABLE)
    assert status.sel(kind="weight").values.tolist() == [measured] * 3
    assert status.sel(kind="update").values.tolist()[1:] == [unreadable, measured]
    assert status.sel(kind="displacement").values.tolist()[1:] == [unreadable] * 2
    other = result.effective_rank.sel(matrix=NAME, kind="update").values
    assert np.isfinite(other[1:]).all()
    problems = json.loads(str(result.attrs["problems"]))
    assert all("\n" not in each for each in problems)
    assert "in shape (9, 4) at step 5 and in shape (12, 4) at step 10" in problems[0]


def test_its_audit_ends_with_verdicts(resized):
    report = dy.audit(resized)
    assert not report.failed
