"""Which optimizer a method trains with, and what is recorded of its projectors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from dynamics import schema
from dynamics.runs.parameter_names import clean_name
from probes.optimizers.nesting import innermost_optimizer
from probes.relora.config import PROJECTED, TrainConfig
from probes.relora.optimizers.muon import MuonAndAdamW
from probes.relora.optimizers.projected import ProjectedAdamW


def optimizer_of(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a method, over the parameters of the model that train.

    `galore`, `fira`, `apollo` and `muon` treat the weights of `target_modules`, and leave the rest
    to AdamW. All other methods train everything by AdamW. The rest has `other_learning_rate`.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trained.items():
        targeted = any(f".{each}." in name for each in config.target_modules)
        (matrices if targeted else others).append(parameter)
    other_lr = config.other_learning_rate or config.learning_rate
    if config.method not in (*PROJECTED, "muon"):
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": others, "lr": other_lr},
        ]
        return torch.optim.AdamW(
            trained.values() if other_lr == config.learning_rate else groups,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
    if config.method == "muon":
        return MuonAndAdamW(
            matrices,
            others,
            lr=config.learning_rate,
            other_lr=other_lr,
            weight_decay=config.weight_decay,
        )
    projected = {
        "params": matrices,
        "projection": config.method,
        "rank": config.lora_rank,
        "gap": config.reset_every,
        "scale": config.projection_scale,
        "seed": config.seed,
    }
    return ProjectedAdamW(
        [projected, {"params": others, "lr": other_lr}],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )


class ProjectionCallback(TrainerCallback):
    """Records an event `projection` at each step after which a projector was taken anew.

    Its facts are `rank`, `bounded` (whether the weights move within the directions alone, as
    GaLore's do), `matrices` (the names of the weights) and, as means over them, `energy_inside` and
    `overlap_with_last`, see `ProjectedAdamW.refreshed`.

    Args:
        on_event: called as on_event("projection", N, facts), where step N + 1 took the projector.
    """

    def __init__(self, on_event: Callable[[str, int, dict[str, Any]], None]):
        self.on_event = on_event

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what the step that just ended has taken anew."""
        optimizer = innermost_optimizer(kwargs["optimizer"])
        assert isinstance(optimizer, ProjectedAdamW)
        refreshed = optimizer.refreshed()
        if not refreshed:
            return
        names = {parameter: name for name, parameter in kwargs["model"].named_parameters()}
        group = optimizer.param_groups[0]
        facts: dict[str, Any] = {
            "rank": group["rank"],
            "bounded": group["projection"] == "galore" and not group["weight_decay"],
            "matrices": sorted(clean_name(names[parameter]) for parameter in refreshed),
        }
        for fact in ("energy_inside", "overlap_with_last"):
            values = [each[fact] for each in refreshed.values() if fact in each]
            if values:
                facts[fact] = sum(values) / len(values)
        self.on_event(schema.PROJECTION, state.global_step - 1, facts)
