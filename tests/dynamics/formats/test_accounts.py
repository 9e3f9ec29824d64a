"""Every tensor beside factors and gradients is measured too, or left out for a reason."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import dynamics as dy

peft = pytest.importorskip("peft")

UP = "model.layers.0.mlp.up_proj.weight"
PART = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """The directory of a run with base/ and checkpoint-3/ of LoRA on up_proj."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "checkpoint-3")
    return tmp_path


def change(directory, name="checkpoint-3/adapter_model.safetensors", **tensors):
    file = directory / name
    changed = load_file(file) | tensors
    save_file(changed, file)


@pytest.mark.parametrize("base", [True, False])
def test_integers_beside_an_adapter_are_in_the_account(saved, base):
    change(saved, **{"base_model.model.norm.num_batches_tracked": torch.arange(6).reshape(2, 3)})
    if not base:
        (saved / "base/model.safetensors").unlink()
    run = dy.open_run(saved)
    left_out = {each.name: each.reason for each in run.account.left_out}
    assert "integers" in left_out["norm.num_batches_tracked"]


def test_a_whole_module_beside_an_adapter_without_a_base_is_in_the_account(saved):
    change(saved, **{"base_model.model.lm_head.weight": torch.ones(5, 4)})
    (saved / "base/model.safetensors").unlink()
    left_out = {each.name: each.reason for each in dy.open_run(saved).account.left_out}
    assert "without the base model" in left_out["lm_head.weight"]


@pytest.mark.parametrize("letters", ["A", "AB"])
@pytest.mark.parametrize("base", [True, False])
def test_factors_of_integers_leave_their_layer_out_and_never_show_its_base(saved, base, letters):
    stored = load_file(saved / "checkpoint-3/adapter_model.safetensors")
    for letter in letters:
        name = PART.format(letter)
        change(saved, **{name: stored[name].mul(100).to(torch.int8)})
    if not base:
        (saved / "base/model.safetensors").unlink()
    run = dy.open_run(saved)
    assert UP not in run.matrices or run.read(UP, 3, "weight") is None
    left_out = {each.name: each.reason for each in run.account.left_out}
    assert "dtype int8" in left_out[UP]


def test_factors_of_a_dtype_that_is_not_known_likewise(saved):
    file = saved / "checkpoint-3/adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"F32"', b'"X32"', 1))  # of one factor, in the header
    run = dy.open_run(saved)
    for name in run.matrices:
        run.read(name, 3, "weight")
    assert any("X32" in each.reason for each in run.account.left_out)


@pytest.mark.parametrize("letters", ["A", "AB"])
def test_factors_of_integers_inside_a_model_likewise(tiny_llama, tmp_path, letters):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up_proj"])
    state = peft.get_peft_model(tiny_llama(), config).state_dict()
    for letter in letters:
        name = PART.format(f"{letter}.default")
        state[name] = state[name].mul(100).to(torch.int8)
    torch.save(state, tmp_path / "step_3.pt")
    run = dy.open_run(tmp_path, lora_alpha=4)
    assert UP not in run.matrices
    left_out = {each.name: each.reason for each in run.account.left_out}
    assert f"lora_{letters[0]}" in left_out[UP]
    assert {each.partition(".lora_")[0] for each in left_out if ".lora_" in each} == set()
    described = run.account.to_json()
    json.dumps(described)


def test_what_is_no_float_in_picos_files_is_in_the_account(tmp_path):
    """The buffers of a model, and gradients of what cannot be read."""
    step = tmp_path / "checkpoints/step_5"
    (step / "learning_dynamics").mkdir(parents=True)
    (tmp_path / "training_config.yaml").write_text("model:\n  d_model: 4\n")
    weights = {"pico_decoder.layers.0.swiglu.w_2.weight": torch.ones(4, 3)}
    masks = {"pico_decoder.mask": torch.ones(3, 3, dtype=torch.bool)}
    save_file({**weights, **masks}, step / "model.safetensors")
    gradients = {"layers.0.swiglu.w_2": torch.ones(4, 3), "mask": torch.ones(3, 3, dtype=torch.int)}
    torch.save(gradients, step / "learning_dynamics/train_gradients.pt")
    run = dy.open_run(tmp_path)
    assert run.format == "pico"
    left_out = {each.name: each.reason for each in run.account.left_out}
    assert "integers" in left_out["mask"]
    assert left_out["mask.weight"].startswith("gradients that are integers")
