"""Effective weights and factors of PEFT's LoRA layers, against PEFT's own merge."""

import copy

import numpy as np
import peft
import pytest
import torch
import zarr
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import dynamics as dy
from dynamics.runs.parameter_names import clean_name
from probes import Recorder
from probes.model.parameters import track

LLAMA = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
GPT2 = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)


def _adapted(model, dtype=torch.float32, **options):
    """A LoRA model with both factors random, as after some training."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 12, **options})
    adapted = peft.get_peft_model(model.to(dtype), config, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


CASES = {
    "linear": lambda: _adapted(LlamaForCausalLM(LLAMA), target_modules=["q_proj", "down_proj"]),
    "bfloat16": lambda: _adapted(
        LlamaForCausalLM(LLAMA), torch.bfloat16, target_modules=["q_proj", "down_proj"]
    ),
    "rslora": lambda: _adapted(LlamaForCausalLM(LLAMA), target_modules=["v_proj"], use_rslora=True),
    "fan_in_fan_out": lambda: _adapted(
        GPT2LMHeadModel(GPT2), target_modules=["c_attn"], fan_in_fan_out=True
    ),
    "embedding": lambda: _adapted(LlamaForCausalLM(LLAMA), target_modules=["embed_tokens"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_recorded_effective_weight_is_what_merging_gives_bit_for_bit(tmp_path, case):
    model = CASES[case]()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run.zarr"):
        pass
    run = dy.open_run(tmp_path / "run.zarr")
    merged = copy.deepcopy(model).merge_and_unload()
    adapted = 0
    for name, parameter in merged.named_parameters():
        if parameter.ndim == 2:
            recorded = run.read(name, 0, "weight")
            np.testing.assert_array_equal(recorded.values, parameter.detach().float().numpy())
            adapted += run.read(name, 0, "adapter") is not None
    assert adapted > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_base_and_adapter_add_up_to_the_weight(tmp_path, case):
    model = CASES[case]()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run.zarr"):
        pass
    run = dy.open_run(tmp_path / "run.zarr", split_fused=False)
    bases = {
        clean_name(name): parameter.detach().double().numpy()
        for name, parameter in model.named_parameters()
        if "lora_" not in name and parameter.ndim == 2
    }
    assert set(bases) == set(run.matrices)
    for name, expected in bases.items():
        base, adapter = run.read(name, 0, "base"), run.read(name, 0, "adapter")
        if adapter is None:
            np.testing.assert_array_equal(base.values, expected)
            continue
        assert adapter.shape == expected.shape
        assert adapter.rank_bound == 3
        # Equal to the rounding of the addition in the stored dtype, which is the weight's noise.
        error = np.linalg.norm(base.values - expected, 2)
        floor = dy.spectrum(run.read(name, 0, "weight")).noise_floor
        assert error <= 1.5 * floor


@pytest.mark.slow
def test_the_adapter_is_measured_with_its_rank_and_the_gradient_of_the_base_with_its_own(tmp_path):
    model = CASES["linear"]()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(32).reshape(2, 16)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    ds = dy.analyze(tmp_path / "run.zarr")
    assert {"weight", "base", "adapter", "update", "displacement"} <= set(ds["kind"].values)
    gradients = ds.sel(kind="gradient", step=1).where(ds["layer"] >= 0, drop=True)
    assert (gradients["status"] == dy.Status.MEASURED).all()
    assert (gradients["rank_bound"] == np.minimum(ds["rows"], ds["cols"])).all()
    adapters = ds.sel(kind="adapter").where(ds["module"].isin(["q_proj", "down_proj"]), drop=True)
    assert (adapters["effective_rank"] <= 3).all()
    assert (adapters["numerical_rank"] == 3).all()
    assert (adapters["rank_bound"] == 3).all()


def test_a_disabled_or_merged_adapter_adds_nothing():
    model = CASES["linear"]()
    name = "model.layers.0.self_attn.q_proj.weight"

    def effective():
        weight = {each.name: each.weight for each in track(model)[0]}[name]
        return weight.read(), weight.factors()

    with_adapter, factors = effective()
    assert factors is not None
    with model.disable_adapter():
        base, none = effective()
        assert none is None
    assert not torch.equal(base, with_adapter)
    model.merge_adapter()
    merged, none = effective()
    assert none is None
    assert torch.equal(merged, with_adapter)


@pytest.mark.parametrize("what", ["modules_to_save", "dora"])
def test_a_base_that_is_not_weight_minus_adapter_is_recorded_itself(tmp_path, what):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    options = {"modules_to_save": ["1"]} if what == "modules_to_save" else {"use_dora": True}
    targets = ["0"] if what == "modules_to_save" else ["1"]
    bases = [each.weight.detach().clone() for each in model]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    with Recorder(model, optimizer, tmp_path / "run.zarr", every=1) as recorder:
        for step in range(3):
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:  # as a training that merges by its own means does
                frozen = {id(each) for each in trained}
                (original,) = [
                    each for name, each in model.named_parameters()
                    if id(each) not in frozen and ("original_module" in name or "1.base" in name)
                    and name.endswith("weight")
                ]  # fmt: skip
                with torch.no_grad():
                    original.add_(1)
                recorder.event("changed")
    run = dy.open_run(tmp_path / "run.zarr")
    for step, offset in ((0, 0), (1, 0), (2, 0), (3, 1)):
        found = run.read("1.weight", step, "base")
        assert torch.equal(torch.from_numpy(found.values), bases[1] + offset)
    assert not torch.equal(torch.from_numpy(run.read("1.weight", 3, "weight").values), bases[1])
    stored = zarr.open_group(tmp_path / "run.zarr", mode="r")["base/1.weight"]
    chunks = list((tmp_path / "run.zarr/base/1.weight/c").iterdir())
    assert (len(chunks), stored.shape[0]) == (2, 4)
    assert not run.verify().damaged
