"""Merging adapters and drawing new ones, at the steps at which a run does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from dynamics.errors import DynamicsError
from probes.relora import ReLoRACallback, TrainConfig, build_model, merge_and_reset
from probes.relora.training.restart import adapter_parameters, lora_layers
from tests.probes.relora.conftest import TOKENS, trained_adapters


def with_lora(**options: Any) -> PeftModel:
    layers = nn.ModuleDict({"first": nn.Linear(6, 8), "second": nn.Linear(8, 5)})
    return get_peft_model(layers, LoraConfig(target_modules=["first", "second"], **options))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merging_leaves_the_model_output_unchanged(
    config: TrainConfig, dtype: torch.dtype, tolerance: float
) -> None:
    assert config.scaling != 1
    model = trained_adapters(config, dtype)
    with torch.no_grad():
        before = model(TOKENS).logits
        with model.disable_adapter():
            without_adapters = model(TOKENS).logits
        assert merge_and_reset(model, seed=0, step=4) == 14
        after = model(TOKENS).logits
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance)
    # The adapters mattered: without them the output is another one.
    assert (without_adapters - before).abs().max() > 100 * tolerance


def test_the_base_changes_by_exactly_s_times_b_times_a(config: TrainConfig) -> None:
    model = trained_adapters(config)
    expected = {
        name: layer.get_base_layer().weight
        + 3.0 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
        for name, layer in lora_layers(model).items()
    }
    merge_and_reset(model, seed=0, step=4)
    for name, layer in lora_layers(model).items():
        torch.testing.assert_close(
            layer.get_base_layer().weight, expected[name], rtol=1e-15, atol=1e-16
        )


def test_merged_without_scaling_the_base_changes_by_b_times_a_and_the_layers_keep_their_scaling(
    config: TrainConfig,
) -> None:
    model = trained_adapters(config)
    layer = next(iter(lora_layers(model).values()))
    product = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    before = layer.get_base_layer().weight.detach().clone()
    merge_and_reset(model, seed=0, step=4, with_scaling=False)
    torch.testing.assert_close(layer.get_base_layer().weight - before, product)
    assert {each.scaling["default"] for each in lora_layers(model).values()} == {3.0}


def test_rank_stabilised_lora_merges_with_its_own_scaling() -> None:
    model = with_lora(r=4, lora_alpha=8, use_rslora=True).double()
    layer = lora_layers(model)["base_model.model.first"]
    nn.init.normal_(layer.lora_B["default"].weight)
    before = layer.get_base_layer().weight.detach().clone()
    update = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    merge_and_reset(model, seed=0, step=1)
    torch.testing.assert_close(layer.get_base_layer().weight - before, 8 / 4**0.5 * update)


def test_after_a_merge_b_is_zero_and_a_is_new(config: TrainConfig) -> None:
    model = trained_adapters(config)
    before = {
        name: layer.lora_A["default"].weight.clone() for name, layer in lora_layers(model).items()
    }
    merge_and_reset(model, seed=0, step=4)
    for name, layer in lora_layers(model).items():
        factor = layer.lora_A["default"].weight
        assert not layer.lora_B["default"].weight.any()
        assert factor.abs().min() > 0
        assert not torch.isin(factor, before[name]).any()
        # Kaiming-uniform with a = √5: bounded by 1/√(number of inputs).
        assert factor.abs().max() <= factor.shape[1] ** -0.5
        assert not layer.merged


def test_parameters_keep_their_identity_and_trainability(config: TrainConfig) -> None:
    model = trained_adapters(config)
    before = [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()]
    merge_and_reset(model, seed=0, step=4)
    after = [(name, id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()]
    assert after == before


def test_a_merge_leaves_the_global_random_state_alone(config: TrainConfig) -> None:
    model = trained_adapters(config)
    before = torch.get_rng_state()
    merge_and_reset(model, seed=0, step=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_new_a_depends_on_seed_and_step_alone(config: TrainConfig) -> None:
    def drawn(seed: int, step: int) -> torch.Tensor:
        model = trained_adapters(config)
        merge_and_reset(model, seed=seed, step=step)
        return torch.cat([p.detach().flatten() for p in adapter_parameters(model)])

    torch.manual_seed(0)
    first = drawn(0, 4)
    torch.manual_seed(1)
    assert torch.equal(drawn(0, 4), first)
    assert not torch.equal(drawn(0, 8), first)
    assert not torch.equal(drawn(1, 4), first)


def callback_events(steps: list[int], max_steps: int = 8) -> list[tuple[str, int]]:
    """The events of a callback that sees the beginnings of these steps."""
    events: list[tuple[str, int]] = []
    model = with_lora(r=2, lora_alpha=4)
    callback = ReLoRACallback(
        reset_every=2, seed=0, on_event=lambda kind, step, _: events.append((kind, step))
    )
    optimizer = torch.optim.AdamW(adapter_parameters(model))
    callback.on_train_begin(None, None, None)
    for step in steps:
        state = SimpleNamespace(global_step=step, max_steps=max_steps)
        callback.on_step_begin(None, state, None, model=model, optimizer=optimizer)
    return events


def test_the_callback_merges_once_after_each_multiple_but_the_first_and_last() -> None:
    merges = [
        step for kind, step in callback_events([0, 1, 2, 2, 3, 4, 5, 6, 7, 8]) if kind == "merge"
    ]
    assert merges == [2, 4, 6]


def test_a_resumed_callback_merges_first_where_the_run_would_have() -> None:
    assert callback_events([4, 5]) == [("merge", 4), ("optimizer_reset", 4)]
    assert callback_events([5]) == []


def test_a_second_training_with_one_callback_merges_again() -> None:
    model = with_lora(r=2)
    merges: list[int] = []
    callback = ReLoRACallback(
        reset_every=2, seed=0, on_event=lambda kind, step, _: merges.append(step)
    )
    state = SimpleNamespace(global_step=2, max_steps=8)
    for _ in range(2):
        callback.on_train_begin(None, state, None)
        callback.on_step_begin(
            None, state, None, model=model, optimizer=torch.optim.AdamW(adapter_parameters(model))
        )
    assert merges == [2, 2, 2, 2]


def test_adapters_that_are_not_plain_lora_are_refused() -> None:
    with pytest.raises(DynamicsError) as refused:
        merge_and_reset(with_lora(use_dora=True), seed=0, step=1)
    assert str(refused.value) == (
        "Cannot merge base_model.model.first: its adapter is DoRA, whose update is not s·B·A; "
        "ReLoRA needs plain LoRA layers."
    )


def test_several_active_adapters_are_refused() -> None:
    model = with_lora()
    model.add_adapter("other", LoraConfig(target_modules=["first", "second"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(DynamicsError, match=r"2 active adapters \(\['default', 'other'\]\)"):
        merge_and_reset(model, seed=0, step=1)


def test_a_quantised_base_is_refused_before_anything_is_merged() -> None:
    model = with_lora()
    layers = lora_layers(model)
    nn.init.normal_(layers["base_model.model.first"].lora_B["default"].weight)
    untouched = layers["base_model.model.first"].get_base_layer().weight.detach().clone()
    quantised = layers["base_model.model.second"].get_base_layer()
    quantised.weight = nn.Parameter(quantised.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(
        DynamicsError, match=r"second: its base is quantised \(a weight of dtype torch.int8\)"
    ):
        merge_and_reset(model, seed=0, step=1)
    assert torch.equal(layers["base_model.model.first"].get_base_layer().weight, untouched)


def test_merged_and_disabled_adapters_are_refused() -> None:
    model = with_lora()
    model.merge_adapter()
    with pytest.raises(
        DynamicsError, match=r"\['default'\] is merged already; call unmerge_adapter"
    ):
        merge_and_reset(model, seed=0, step=1)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(DynamicsError, match="its adapter is disabled"):
        merge_and_reset(model, seed=0, step=1)


def test_a_model_without_adapters_is_refused(config: TrainConfig) -> None:
    with pytest.raises(DynamicsError, match="LlamaForCausalLM has no LoRA layer to merge"):
        merge_and_reset(build_model(config), seed=0, step=1)
