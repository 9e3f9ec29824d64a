"""Forgetting the optimizer's state of the adapters: whole, pruned, and of nothing else."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from dynamics.errors import DynamicsError
from probes.relora import TrainConfig, merge_and_reset, reset_optimizer
from probes.relora.training.restart import adapter_parameters, named_adapter_parameters
from tests.probes.relora.conftest import TOKENS, trained_adapters


def adam_after_three_steps(model: nn.Module) -> torch.optim.AdamW:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_only_the_adapters_lose_their_optimizer_state(config: TrainConfig) -> None:
    model = trained_adapters(config)
    optimizer = adam_after_three_steps(model)
    adapters = adapter_parameters(model)
    others = {
        p: dict(optimizer.state[p]) for p in optimizer.state if all(p is not a for a in adapters)
    }
    assert reset_optimizer(optimizer, adapters) == 28
    assert set(optimizer.state) == set(others)
    assert len(others) == 2 + 2 * 2 + 1  # embedding and head, two norms a layer, the last norm
    for parameter, state in others.items():
        assert state["step"] == 3
        assert all(optimizer.state[parameter][key] is state[key] for key in state)
    assert reset_optimizer(optimizer, adapters) == 0


def test_the_first_adam_step_after_a_reset_is_that_of_a_fresh_adam(config: TrainConfig) -> None:
    model = trained_adapters(config)
    optimizer = adam_after_three_steps(model)
    merge_and_reset(model, seed=0, step=3)
    reset_optimizer(optimizer, adapter_parameters(model))
    adapters = adapter_parameters(model)
    copies = [nn.Parameter(p.detach().clone()) for p in adapters]
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for parameter, copy in zip(adapters, copies, strict=True):
        assert parameter.grad is not None
        copy.grad = parameter.grad.clone()
    optimizer.step()
    torch.optim.AdamW(copies, lr=1e-2).step()
    assert all(torch.equal(p, copy) for p, copy in zip(adapters, copies, strict=True))


@pytest.mark.parametrize("mode", ["zero", "random_prune", "magnitude_prune"])
def test_partial_resets_empty_the_same_entries_of_both_moments(
    config: TrainConfig, mode: str
) -> None:
    model = trained_adapters(config)
    optimizer = adam_after_three_steps(model)
    named = named_adapter_parameters(model)
    before = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    assert reset_optimizer(optimizer, named.values(), mode=mode, ratio=0.75) == 28
    for parameter, old in before.items():
        state = optimizer.state[parameter]
        assert state["step"] == old["step"]
        if all(parameter is not each for each in named.values()):
            assert all(torch.equal(state[key], old[key]) for key in old)
            continue
        empty = state["exp_avg"] == 0
        assert torch.equal(empty, state["exp_avg_sq"] == 0)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key][~empty], old[key][~empty])
        share = 1.0 if mode == "zero" else 0.75
        assert empty.sum() == math.ceil(share * parameter.numel())
        if mode == "magnitude_prune":
            size = old["exp_avg"].abs()
            assert size[empty].max() <= size[~empty].min()


@pytest.mark.slow
def test_a_random_prune_depends_on_its_generator_alone(config: TrainConfig) -> None:
    def kept(seed: int) -> torch.Tensor:
        model = trained_adapters(config)
        optimizer = adam_after_three_steps(model)
        torch_state = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        reset_optimizer(
            optimizer, adapter_parameters(model), mode="random_prune", generator=generator
        )
        assert torch.equal(torch.get_rng_state(), torch_state)
        moments = [optimizer.state[each]["exp_avg"] for each in adapter_parameters(model)]
        return torch.cat([each.flatten() for each in moments]) != 0

    assert torch.equal(kept(1), kept(1))
    assert not torch.equal(kept(1), kept(2))


@pytest.mark.parametrize("mode", ["random_prune", "magnitude_prune"])
def test_with_masks_of_their_own_the_moments_keep_different_entries(
    config: TrainConfig, mode: str
) -> None:
    def kept(shared: bool) -> list[torch.Tensor]:
        model = trained_adapters(config)
        optimizer = adam_after_three_steps(model)
        reset_optimizer(
            optimizer,
            adapter_parameters(model),
            mode=mode,
            ratio=0.5,
            shared_mask=shared,
            generator=torch.Generator().manual_seed(0),
        )
        states = [optimizer.state[each] for each in adapter_parameters(model)]
        return [
            torch.cat([state[name].flatten() for state in states]) != 0
            for name in ("exp_avg", "exp_avg_sq")
        ]

    first, second = kept(shared=True)
    assert torch.equal(first, second)
    first, second = kept(shared=False)
    assert not torch.equal(first, second)
    for each in (first, second):
        assert each.double().mean() == pytest.approx(0.5, abs=0.01)


def test_an_unknown_reset_is_refused() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    with pytest.raises(DynamicsError, match="No optimizer reset 'forget'; known: drop, zero"):
        reset_optimizer(optimizer, [], mode="forget")
    with pytest.raises(DynamicsError, match=r"ratio is 1\.5; it must be between 0 and 1"):
        reset_optimizer(optimizer, [], mode="random_prune", ratio=1.5)


def test_accelerates_wrapped_optimizer_is_reset_too(config: TrainConfig) -> None:
    model = trained_adapters(config)
    optimizer = Accelerator(cpu=True).prepare(adam_after_three_steps(model))
    assert reset_optimizer(optimizer, adapter_parameters(model)) == 28
    assert len(optimizer.optimizer.state) == 7
