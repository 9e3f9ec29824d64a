"""The restart of ReLoRA: merge the adapters into the base, draw new ones, reset their Adam state.

Source: Lialin et al. 2023, "ReLoRA: High-Rank Training Through Low-Rank Updates",
arXiv 2307.05695, algorithm 1.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from transformers import TrainerCallback

from dynamics import schema
from dynamics.auditing import events
from dynamics.errors import DynamicsError
from probes.checks import merge_facts, optimizer_state_facts, warn_about, weights_before_merge
from probes.relora.seeding import ADAPTERS, OPTIMIZER_RESET, own_random_stream, stream_seed
from probes.relora.training.base_checkpoint import save_base
from probes.relora.training.optimizer_reset import reset_optimizer


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Name -> LoRA layer, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def named_adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> every A and B (and LoRA bias) of the model, in the model's order."""
    return {name: each for name, each in model.named_parameters() if LoraModel.prefix in name}


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every A and B (and LoRA bias) of the model, in the model's order."""
    return list(named_adapter_parameters(model).values())


@torch.no_grad()
def merge_and_reset(model: nn.Module, *, seed: int, step: int, with_scaling: bool = True) -> int:
    """Merge the adapter of every LoRA layer into its base weight and start a new one, in place.

    W <- W + s·B·A, then A <- Kaiming-uniform and B <- 0. The model computes the same function
    before and after, up to the rounding of W's dtype. PEFT itself merges, with its treatment of
    dtypes; only its mark "merged" is cleared, because the adapter goes on. The parameters stay the
    same objects. The new A is drawn from a random stream of (seed, step): dropout and the order of
    the data do not change, and a resumed run draws the same A.

    Args:
        model: a model with LoRA layers, between two optimizer steps.
        seed: the run's seed.
        step: optimizer steps done.
        with_scaling: False merges B·A without s, as the published code does. This changes the
            function wherever s ≠ 1.

    Returns:
        The number of merged layers.

    Raises:
        DynamicsError: there is no LoRA layer, or one that cannot be merged without changing the
            function or losing its base (DoRA, several active adapters, quantised weights, an
            adapter that is disabled or already merged). In this case no layer is merged.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from probes.relora import merge_and_reset
        >>> layers = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> model = get_peft_model(layers, config)
        >>> x = torch.ones(1, 6)
        >>> before = model(x)
        >>> merge_and_reset(model, seed=0, step=100)
        1
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
    """
    layers = lora_layers(model)
    if not layers:
        raise DynamicsError(
            f"{type(model).__name__} has no LoRA layer to merge; add adapters with PEFT first."
        )
    for name, layer in layers.items():
        _refuse_what_cannot_merge(name, layer)
    for layer in layers.values():
        _merge(layer, with_scaling)
    with own_random_stream(seed, ADAPTERS, step, module=model):
        for layer in layers.values():
            layer.reset_lora_parameters(layer.active_adapters[0], True)
    return len(layers)


OnEvent = Callable[[str, int, dict[str, Any]], None]


def restart(
    model: nn.Module,
    optimizer: Any,
    *,
    step: int,
    seed: int,
    optimizer_reset: str = "drop",
    prune_ratio: float = 0.99,
    shared_prune_mask: bool = True,
    merge_with_scaling: bool = True,
    on_event: OnEvent | None = None,
) -> None:
    """Merge the adapters, begin new ones and reset their optimizer state, checked and recorded.

    Call it at the beginning of step N + 1. A check that fails gives a `FailedCheckWarning`. This
    needs one copy of the adapted weights and factors on the CPU, for the duration of the merge.

    Args:
        model: a model with LoRA layers.
        optimizer: trains its adapters.
        step: N, optimizer steps done.
        seed: see `merge_and_reset`.
        optimizer_reset: the mode; see `reset_optimizer`.
        prune_ratio: for the modes that prune; see `reset_optimizer`.
        shared_prune_mask: for the modes that prune; see `reset_optimizer`.
        merge_with_scaling: see `merge_and_reset`.
        on_event: called as on_event("merge", N, {"merged_layers", "scaling", ...}) with
            `merge_facts`, and on_event("optimizer_reset", N, {"tensors", "mode", "reset_share",
            "learning_rate", ...}) with `optimizer_state_facts`; the learning rate is that of
            step N + 1.

    Raises:
        DynamicsError: see `merge_and_reset`, which changes nothing then.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from probes.relora import restart
        >>> config = LoraConfig(r=2, target_modules=["0"])
        >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), config)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> told = lambda kind, step, facts: print(kind, step)
        >>> restart(model, optimizer, step=100, seed=0, on_event=told)
        merge 100
        optimizer_reset 100
    """
    scalings = sorted({_scaling(layer) for layer in lora_layers(model).values()})
    before = weights_before_merge(model)
    merged = merge_and_reset(model, seed=seed, step=step, with_scaling=merge_with_scaling)
    scaling = scalings[0] if len(scalings) == 1 else scalings
    merge = {"merged_layers": merged, "scaling": scaling, **merge_facts(before)}

    parameters = named_adapter_parameters(model)
    tensors = reset_optimizer(
        optimizer,
        parameters.values(),
        mode=optimizer_reset,
        ratio=prune_ratio,
        shared_mask=shared_prune_mask,
        generator=torch.Generator().manual_seed(stream_seed(seed, OPTIMIZER_RESET, step)),
    )
    reset = {
        "tensors": tensors,
        "mode": optimizer_reset,
        events.RESET_SHARE: prune_ratio if "prune" in optimizer_reset else 1.0,
        events.RATE: float(optimizer.param_groups[0]["lr"]),
        **optimizer_state_facts(optimizer, parameters),
    }
    if on_event is not None:
        on_event(schema.MERGE, step, merge)
        on_event(schema.OPTIMIZER_RESET, step, reset)
    warn_about([events.merge_verdict(step, merge), *events.optimizer_verdicts(step, reset)])


class ReLoRACallback(TrainerCallback):
    """Restarts at every multiple of `reset_every`, and saves the base weights in checkpoints.

    The merge of step N happens when step N + 1 begins, not when step N ends. So everything that is
    recorded or saved after step N, `checkpoint-N` included, holds the state before the merge. A
    run that resumes from it merges first, as the uninterrupted run did. There is no merge at step
    0, and none after the last step.

    Args:
        reset_every: optimizer steps between merges; None never merges, which is plain LoRA.
        seed: the run's seed, for the new adapters.
        optimizer_reset, prune_ratio, shared_prune_mask, merge_with_scaling, on_event: of `restart`.

    Example:
        >>> from probes.frameworks.hf_trainer import RecorderCallback
        >>> from probes.relora import ReLoRACallback
        >>> recorder = RecorderCallback("run.zarr", every=100)
        >>> relora = ReLoRACallback(reset_every=1000, seed=0, on_event=recorder.event)
        >>> trainer = Trainer(model, arguments, callbacks=[relora, recorder])  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        reset_every: int | None,
        seed: int,
        optimizer_reset: str = "drop",
        prune_ratio: float = 0.99,
        shared_prune_mask: bool = True,
        merge_with_scaling: bool = True,
        on_event: OnEvent | None = None,
    ) -> None:
        self.reset_every = reset_every
        self.seed = seed
        self.optimizer_reset = optimizer_reset
        self.prune_ratio = prune_ratio
        self.shared_prune_mask = shared_prune_mask
        self.merge_with_scaling = merge_with_scaling
        self.on_event = on_event
        self._merged_at = 0  # no merge at step 0: the adapters are still empty

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the merges of an earlier training with this callback."""
        self._merged_at = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Merge and reset, if the number of steps done is a multiple of `reset_every`."""
        step = state.global_step
        if self.reset_every is None or step % self.reset_every:
            return
        if step >= state.max_steps or step == self._merged_at:
            return
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        restart(
            model,
            optimizer,
            step=step,
            seed=self.seed,
            optimizer_reset=self.optimizer_reset,
            prune_ratio=self.prune_ratio,
            shared_prune_mask=self.shared_prune_mask,
            merge_with_scaling=self.merge_with_scaling,
            on_event=self.on_event,
        )
        self._merged_at = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the base weights into the checkpoint that the trainer has just written."""
        model = kwargs["model"]
        if state.is_world_process_zero and isinstance(model, PeftModel):
            save_base(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _merge(layer: LoraLayer, with_scaling: bool) -> None:
    adapter = layer.active_adapters[0]
    scaling = layer.scaling[adapter]
    if not with_scaling:
        layer.scaling[adapter] = 1.0
    layer.merge()
    layer.scaling[adapter] = scaling
    layer.merged_adapters.clear()


def _scaling(layer: LoraLayer) -> float:
    return float(layer.scaling[layer.active_adapters[0]])


def _refuse_what_cannot_merge(name: str, layer: LoraLayer) -> None:
    def refuse(reason: str, instead: str) -> None:
        raise DynamicsError(f"Cannot merge {name}: {reason}; {instead}.")

    if len(layer.active_adapters) != 1:
        refuse(
            f"it has {len(layer.active_adapters)} active adapters ({layer.active_adapters})",
            "activate the one that ReLoRA trains with set_adapter",
        )
    adapter = layer.active_adapters[0]
    if layer.use_dora.get(adapter) or adapter in layer.lora_variant:
        variant = (
            "DoRA" if layer.use_dora.get(adapter) else type(layer.lora_variant[adapter]).__name__
        )
        refuse(
            f"its adapter is {variant}, whose update is not s·B·A",
            "ReLoRA needs plain LoRA layers",
        )
    if layer.merged:
        refuse(f"{layer.merged_adapters} is merged already", "call unmerge_adapter first")
    if layer.disable_adapters:
        refuse("its adapter is disabled", "call enable_adapter_layers first")
    weight = getattr(layer.get_base_layer(), "weight", None)
    if weight is None or not weight.is_floating_point() or hasattr(weight, "quant_state"):
        kind = "no weight" if weight is None else f"a weight of dtype {weight.dtype}"
        refuse(
            f"its base is quantised ({kind}), and would lose the update to rounding",
            "load the base model unquantised",
        )
