"""One function per defect; each plants it into the reference trainer through `patch`."""

import torch

from probes.relora.training import restart, trainer
from probes.relora.training.restart import lora_layers
from tests.dynamics.auditing.conftest import adapters_kept, factors

correct_merge = restart.merge_and_reset


def _bases(model):
    return [layer.get_base_layer().weight for layer in lora_layers(model).values()]


def merge_with_scale(factor):
    """The merge adds factor · s·B·A; the adapters are reset as they should be."""

    @torch.no_grad()
    def merge(model, *, seed, step, **_):
        before = [base.clone() for base in _bases(model)]
        merged = correct_merge(model, seed=seed, step=step)
        for base, old in zip(_bases(model), before, strict=True):
            base.copy_(old + factor * (base - old))
        return merged

    return lambda patch: patch.setattr(restart, "merge_and_reset", merge)


def merge_without_scale(patch):
    """The merge adds B·A without the scale, as the published code does."""

    @torch.no_grad()
    def merge(model, *, seed, step, **_):
        products = [b @ a for a, b in map(factors, lora_layers(model).values())]
        before = [base.clone() for base in _bases(model)]
        merged = correct_merge(model, seed=seed, step=step)
        for base, old, product in zip(_bases(model), before, products, strict=True):
            base.copy_(old + product)
        return merged

    patch.setattr(restart, "merge_and_reset", merge)


def reset_undone(which):
    """The adapters are merged, but these of their factors are not reset."""

    def merge(model, *, seed, step, **_):
        with adapters_kept(model, which):
            return correct_merge(model, seed=seed, step=step)

    return lambda patch: patch.setattr(restart, "merge_and_reset", merge)


def _prepared(patch, prepare):
    original = trainer.add_adapters

    def add_adapters(model, config):
        model = original(model, config)
        with torch.no_grad():
            prepare(model)
        return model

    patch.setattr(trainer, "add_adapters", add_adapters)


def zero_start(patch):
    """A = B = 0 before the first merge, as in the published runs."""
    _prepared(
        patch, lambda model: [factors(each)[0].zero_() for each in lora_layers(model).values()]
    )


def frozen(*fragments):
    """The adapters whose name has one of these fragments do not train."""

    def freeze(model):
        for name, layer in lora_layers(model).items():
            if any(fragment in name for fragment in fragments):
                for factor in factors(layer):
                    factor.requires_grad_(False)

    return lambda patch: _prepared(patch, freeze)


def trained_base(patch):
    """One base weight trains beside its adapter."""

    def thaw(model):
        layers = lora_layers(model)
        name = next(name for name in layers if name.endswith("layers.1.mlp.up_proj"))
        layers[name].get_base_layer().weight.requires_grad_(True)

    _prepared(patch, thaw)


def moments_pruned_apart(patch):
    """Random pruning with a mask of its own for each moment, as in the published code."""

    def reset(optimizer, parameters, *, ratio, generator, **_):
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        parameters = list(parameters)
        for parameter in parameters:
            for key in ("exp_avg", "exp_avg_sq"):
                moment = optimizer.state[parameter][key]
                lowest = torch.rand(moment.numel(), generator=generator).argsort()
                moment.view(-1)[lowest[: int(ratio * moment.numel()) + 1]] = 0
        return len(parameters)

    patch.setattr(restart, "reset_optimizer", reset)


def optimizer_not_reset(patch):
    """A reset that changes nothing and reports success."""
    patch.setattr(restart, "reset_optimizer", lambda *args, **options: 28)


def bfloat16_base(patch):
    """The whole model in bfloat16; PEFT keeps the adapters in float32."""
    original = trainer.build_model
    patch.setattr(trainer, "build_model", lambda config: original(config).to(torch.bfloat16))
