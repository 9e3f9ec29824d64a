"""config.json that lies beside a plain file says what it says beside a Hugging Face model."""

import json
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import save_file

import dynamics as dy
from tests.dynamics.formats.checking import assert_problem

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 3,
    "num_experts_per_tok": 1, "tie_word_embeddings": True,
}  # fmt: skip


def model_of(family="GptOss"):
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")
    return made(made.config_class(**SIZES))


def state(model):
    """The weights, tied ones twice."""
    return {name: each.clone() for name, each in model.state_dict().items()}


def plain(path, model):
    torch.save(state(model), path / "step_5.pt")
    return path


def nested(path, model):
    torch.save({"model": state(model), "step": 5}, path / "step_5.pth")
    return path


def safetensors(path, model):
    save_file(state(model), path / "step_5.safetensors")
    return path


def one_file(path, model):
    return plain(path, model) / "step_5.pt"


def directories(path, model):
    (path / "step_5").mkdir()
    torch.save(state(model), path / "step_5/model.pt")
    return path


def distributed(path, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state(model)}, checkpoint_id=path / "step_5")
    return path


def lightning(path, model):
    weights = {f"model.{name}": each for name, each in state(model).items()}
    saved = {"state_dict": weights, "global_step": 5, "epoch": 0, "hyper_parameters": {"lr": 0.1}}
    torch.save({**saved, "pytorch-lightning_version": "2.5"}, path / "step=5.ckpt")
    return path


LAYOUTS = [plain, nested, safetensors, one_file, directories, distributed, lightning]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_heads_and_tied_weights_are_those_of_the_model(layout, tmp_path):
    model = model_of()
    (tmp_path / "run").mkdir()
    path = layout(tmp_path / "run", model)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    without = dy.open_run(path)
    assert "lm_head.weight" in without.matrices
    assert not any(each.endswith(".0.gate_proj.weight") for each in without.matrices)
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    run, saved = dy.open_run(path), dy.open_run(tmp_path / "saved")
    assert run.steps.tolist() == [5]
    assert dict(run.matrices) == dict(saved.matrices)
    for name in saved.matrices:
        expected = saved.read(name, 0, "weight").values
        assert (run.read(name, 5, "weight").values == expected).all()
    circuits = dy.analyze(run, components=["ov_circuit"], metrics=["stable_rank"], kinds=["weight"])
    assert circuits["stable_rank"].notnull().any()


def test_the_config_of_a_checkpoint_comes_before_that_of_the_run(tmp_path):
    model = model_of("Mixtral")
    directories(tmp_path, model)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    model.config.save_pretrained(tmp_path / "step_5")
    run = dy.open_run(tmp_path)
    assert run.attrs["config"]["model_type"] == "mixtral"
    # the router has its name in files as well as the experts
    assert "model.layers.0.block_sparse_moe.gate.weight" in run.matrices
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in run.matrices


def test_a_damaged_config_of_the_run_is_named_and_the_weights_are_measured(tmp_path):
    plain(tmp_path, model_of())
    for content in ("{", "[]", ""):
        (tmp_path / "config.json").write_text(content)
        run = dy.open_run(tmp_path)
        assert (run.steps.tolist(), dict(run.problems)) == ([5], {})
        assert "JSON" in run.passed_over["config.json"]


def test_a_damaged_config_of_one_checkpoint_is_its_problem(tmp_path):
    for step in (5, 6):
        (tmp_path / f"step_{step}").mkdir()
        torch.save(state(model_of()), tmp_path / f"step_{step}/model.pt")
    (tmp_path / "step_6/config.json").write_text("{")
    assert_problem(dy.open_run(tmp_path), 6, "config.json is not readable JSON")
