from dataclasses import replace

import pytest
import torch

from probes.relora import TrainConfig, add_adapters, build_model
from probes.relora.training.base_checkpoint import base_parameters
from probes.relora.training.restart import adapter_parameters, lora_layers


def test_equal_seeds_give_equal_models_and_other_seeds_other_ones(config: TrainConfig) -> None:
    first, again = (add_adapters(build_model(config), config) for _ in range(2))
    other = add_adapters(build_model(replace(config, seed=4)), replace(config, seed=4))
    for (name, a), b, c in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == ("norm" in name or "lora_B" in name)


def test_building_leaves_the_global_random_state_alone(config: TrainConfig) -> None:
    before = torch.get_rng_state()
    add_adapters(build_model(config), config)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_random_state_does_not_change_what_is_built(config: TrainConfig) -> None:
    torch.manual_seed(1)
    one = add_adapters(build_model(config), config)
    torch.manual_seed(2)
    two = add_adapters(build_model(config), config)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_twins_start_from_the_same_function_and_weights(config: TrainConfig) -> None:
    full_rank = build_model(config).eval()
    relora = add_adapters(build_model(config), config).eval()
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        assert torch.equal(full_rank(tokens).logits, relora(tokens).logits)
    weights = dict(full_rank.named_parameters())
    base = base_parameters(relora)
    assert weights.keys() == base.keys()
    assert all(torch.equal(weights[name], base[name]) for name in weights)
    for layer in lora_layers(relora).values():
        assert not layer.get_delta_weight("default").any()


def test_only_the_targeted_weights_are_frozen(config: TrainConfig) -> None:
    model = add_adapters(build_model(config), replace(config, target_modules=("q_proj", "up_proj")))
    frozen = {name for name, p in base_parameters(model).items() if not p.requires_grad}
    assert frozen == {
        f"model.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert all(parameter.requires_grad for parameter in adapter_parameters(model))


def test_the_model_is_the_llama_that_the_config_describes(config: TrainConfig) -> None:
    model = build_model(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (256, 32)
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (16, 32)
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (32, 48)
    assert not any("bias" in name for name in shapes)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.rms_norm_eps == 1e-6
    assert model.config.rope_parameters["rope_theta"] == 10000.0


def test_the_scaling_of_the_adapters_is_that_of_the_config(config: TrainConfig) -> None:
    model = add_adapters(build_model(config), config)
    assert [layer.scaling["default"] for layer in lora_layers(model).values()] == [3.0] * 14


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_drawing_for_a_model_on_a_gpu_leaves_its_random_state_alone(config: TrainConfig) -> None:
    before = torch.cuda.get_rng_state()
    model = add_adapters(build_model(config).cuda(), config)
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert torch.equal(torch.cuda.get_rng_state(), before)
