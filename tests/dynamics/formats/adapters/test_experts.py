"""LoRA on the experts of a mixture, and on convolutions, against PEFT's own merge."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import dynamics as dy
from dynamics.runs.run import Factored
from dynamics.runs.stacks import parts_of

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tests.dynamics.formats.adapters.merging import (  # noqa: E402
    TOLERANCE,
    change_config,
    deviation,
    merged_weights,
    saved_run,
)

EXPERTS = 3
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "num_local_experts": EXPERTS, "num_experts": EXPERTS, "num_experts_per_tok": 1,
}  # fmt: skip


def mixture(family, **sizes):
    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")
    return made(made.config_class(**{**SIZES, **sizes}))


def parameters(family):
    if family == "GraniteMoe":
        return ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"]
    return ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def on_experts(targets, **settings):
    return peft.LoraConfig(
        **{"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": targets}
        | settings
    )


def merged_matrices(model):
    """From the live tensors of the merged model, by plain indexing."""
    config = model.config.to_dict()
    found = {}
    for name, tensor in merged_weights(model).items():
        parts = parts_of(name, tensor.shape, config)
        if not isinstance(parts, str):
            found |= {part.name: part.of(tensor) for part in parts}
    return found


def check(path, model, rank=2, **options):
    run = dy.open_run(path, split_fused=False, **options)
    assert dict(run.problems) == {}
    expected = merged_matrices(model)
    experts = [name for name, info in run.matrices.items() if info.expert is not None]
    assert len(experts) >= 2 * EXPERTS
    for name in run.matrices:
        if name in expected:  # Mixtral's router has another name in files
            assert deviation(run.read(name, 3, "weight").values, expected[name]) < TOLERANCE, name
    assert set(experts) <= set(expected)
    return run


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss", "GraniteMoe"])
@pytest.mark.parametrize("which", ["both", "turned", "down", "gate_up"])
def test_experts_are_those_of_merge_and_unload(tmp_path, family, which):
    both = parameters(family)
    targets = {"both": both, "turned": both[::-1], "down": both[1:], "gate_up": both[:1]}[which]
    model = saved_run(tmp_path, mixture(family), on_experts(targets))
    run = check(tmp_path, model)
    adapted = [name for name in run.matrices if run.read(name, 3, "adapter") is not None]
    wanted = {"both": 3, "turned": 3, "down": 1, "gate_up": 2}[which] * EXPERTS + 1
    assert len(adapted) == wanted
    for name in adapted:
        found = run.read(name, 3, "adapter")
        assert isinstance(found, Factored)
        assert found.rank_bound == 2
        change = run.read(name, 3, "weight").values - run.read(name, 3, "base").values
        np.testing.assert_allclose(found.product(), change, atol=1e-12)


def test_each_rank_and_scaling_is_that_of_its_parameter(tmp_path):
    gate_up, down = parameters("Mixtral")
    config = on_experts(
        [gate_up, down], use_rslora=True,
        rank_pattern={"experts.down_proj": 4}, alpha_pattern={"experts.down_proj": 9},
    )  # fmt: skip
    model = saved_run(tmp_path, mixture("Mixtral"), config)
    check(tmp_path, model)


def test_without_a_base_the_adapter_of_each_expert_is_measured(tmp_path):
    model = mixture("Mixtral")
    saved_run(tmp_path, model, on_experts(parameters("Mixtral")), base=False)
    run = dy.open_run(tmp_path)
    adapters = [run.read(name, 3, "adapter") for name in run.matrices]
    assert run.stored_kinds == ("adapter",)
    assert len(adapters) == 1 + 2 * EXPERTS  # without a config, gate and up stay together
    assert {each.rank_bound for each in adapters} == {2}


@pytest.mark.parametrize("intermediate", [24, 16, 8])  # 2 I = H at the last
@pytest.mark.parametrize("version", ["0.18.0", None, "0.21.2"])
def test_the_orientation_of_older_versions_is_told_by_shapes_or_by_the_version(
    tmp_path, version, intermediate
):
    """PEFT before 0.19.1 took (E, out, in) for (E, in, out)."""
    gate_up, down = parameters("Mixtral")
    model = mixture("Mixtral", intermediate_size=intermediate)
    adapted = saved_run(tmp_path, model, on_experts([gate_up, down]))
    is_old = version != "0.21.2"
    file = tmp_path / "checkpoint-3/adapter_model.safetensors"
    tensors = load_file(file)
    if is_old:  # the same product, written with the factors in each other's place
        for path in ("mlp.experts.base_layer", "mlp.experts"):
            names = [f"base_model.model.model.layers.0.{path}.lora_{x}.weight" for x in "AB"]
            a, b = (tensors[name] for name in names)
            a_each = a.reshape(EXPERTS, 2, -1)
            b_each = b.reshape(b.shape[0], 2, EXPERTS).permute(2, 1, 0)
            tensors[names[0]] = b_each.reshape(EXPERTS * 2, -1).contiguous()
            tensors[names[1]] = a_each.permute(2, 1, 0).reshape(a.shape[1], -1).contiguous()
        save_file(tensors, file)
        change_config(tmp_path, peft_version=version)
    check(tmp_path, adapted)


def test_factors_that_were_packed_by_experts_are_read_so_where_the_user_says_it(tmp_path):
    model = saved_run(tmp_path, mixture("Mixtral"), on_experts(parameters("Mixtral")))
    file = tmp_path / "checkpoint-3/adapter_model.safetensors"
    tensors = load_file(file)
    for name, b in tensors.items():
        if "experts" in name and "lora_B" in name:
            packed = b.reshape(b.shape[0], 2, EXPERTS).transpose(1, 2)
            tensors[name] = packed.reshape(b.shape).contiguous()
    save_file(tensors, file)
    check(tmp_path, model, expert_blocks=True)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    taken_wrongly = dy.open_run(tmp_path).read(name, 3, "weight").values
    assert deviation(taken_wrongly, merged_matrices(model)[name]) > 0.1


def test_factors_of_another_number_of_experts_are_left_out_by_name(tmp_path):
    saved_run(tmp_path, mixture("GptOss"), on_experts(parameters("GptOss")))
    other = mixture("GptOss", num_local_experts=4, num_experts=4)
    other.save_pretrained(tmp_path / "base")
    run = dy.open_run(tmp_path)
    left_out = {each.name: each.reason for each in run.account.left_out}
    assert "whose number is not that" in left_out["model.layers.0.mlp.experts.down_proj"]
    assert not any(info.expert is not None for info in run.matrices.values())


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_are_those_of_merge_and_unload(tmp_path, kernel, dora):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 6, kernel)
            self.conv_t = torch.nn.Conv1d(6, 5, kernel)
            self.up = torch.nn.Linear(5, 3)

    torch.manual_seed(0)
    net = Net()
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base/model.safetensors")
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=["conv", "conv_t", "up"], use_dora=dora
    )
    net.save_pretrained = lambda *_, **__: None
    model = saved_run(tmp_path, net, config)
    expected = merged_weights(model)
    run = dy.open_run(tmp_path)
    assert set(run.matrices) == {"conv.weight", "conv_t.weight", "up.weight"}
    for name in run.matrices:
        found = run.read(name, 3, "weight").values
        assert deviation(found, expected[name]) < TOLERANCE
        adapter = run.read(name, 3, "adapter")
        assert (adapter is None) == dora
        if not dora:
            assert adapter.rank_bound == 2
            assert adapter.shape == found.shape


def test_the_config_of_the_base_names_what_it_stores(tmp_path):
    saved_run(tmp_path, mixture("Mixtral"), on_experts(parameters("Mixtral")))
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert config["model_type"] == "mixtral"
    run = dy.open_run(tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in run.matrices


def test_a_matrix_that_is_named_as_a_parameter_is_one(tmp_path):
    """target_parameters may name the weight of any module, also that of a mixture's linear map."""
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"gate": torch.nn.Linear(6, 4), "moe": torch.nn.Module()})
    net["moe"].input_linear = torch.nn.Linear(6, 4)
    net["moe"].input_linear.weight = torch.nn.Parameter(torch.randn(3, 4, 6))
    net.save_pretrained = lambda *_, **__: None
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base/model.safetensors")
    targets = ["gate.weight", "input_linear.weight"]
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=targets)
    model = saved_run(tmp_path, net, config)
    expected = merged_weights(model)
    run = dy.open_run(tmp_path)
    assert dict(run.absent_kinds) == {}
    found = run.read("gate.weight", 3, "weight").values
    assert deviation(found, expected["gate.weight"]) < TOLERANCE
    experts = [name for name, info in run.matrices.items() if info.expert is not None]
    assert len(experts) == 3
    for name in experts:
        merged = expected["moe.input_linear.weight"][run.matrices[name].expert]
        assert deviation(run.read(name, 3, "weight").values, merged) < TOLERANCE
    (tmp_path / "base/model.safetensors").unlink()
    alone = dy.open_run(tmp_path)
    assert alone.read("gate.weight", 3, "adapter").rank_bound == 2
    assert len(alone.matrices) == 4


def test_factors_of_one_expert_or_of_no_rank_are_left_out(tiny_llama, tmp_path):
    saved_run(tmp_path, tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    change_config(tmp_path, target_parameters=["self_attn.q_proj.other"], r=2)
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(dy.DynamicsError, match="a parameter that holds no experts"):
        dy.open_run(tmp_path)
