"""ReLoRA in a `Trainer` of one's own: callback, schedule and events in one line."""

from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from dynamics.errors import DynamicsError
from probes.frameworks.hf_trainer import RecorderCallback
from probes.relora.training.restart import ReLoRACallback, lora_layers
from probes.relora.training.schedule import jagged_cosine


def add_relora(
    trainer: Trainer,
    *,
    reset_every: int,
    restart_warmup_steps: int,
    min_lr_ratio: float = 0.1,
    seed: int | None = None,
    **options: Any,
) -> ReLoRACallback:
    """Let a Trainer train its model by ReLoRA; call it before `trainer.train()`.

    It adds a `ReLoRACallback`, and the schedule `jagged_cosine` with the Trainer's own optimizer.
    `TrainingArguments` give the learning rate, `max_steps`, the warm-up and the weight decay. Each
    `RecorderCallback` of the Trainer gets the merges and resets as events, also one that is added
    later.

    Args:
        trainer: its model has LoRA layers; everything else that is to train requires gradients.
        reset_every: optimizer steps between merges.
        restart_warmup_steps: over which the learning rate returns after a merge.
        min_lr_ratio: of the last to the highest learning rate.
        seed: for the new adapters; that of the `TrainingArguments` by default.
        options: `optimizer_reset`, `prune_ratio`, `shared_prune_mask` and `merge_with_scaling` of
            `ReLoRACallback`.

    Returns:
        The callback that was added.

    Raises:
        DynamicsError: there is no LoRA layer, no `max_steps`, or a schedule already; or the Trainer
            makes its optimizer later (FSDP, DeepSpeed, `model_init`). Nothing is changed then.

    Example:
        >>> from probes.relora import add_relora
        >>> trainer = Trainer(model, arguments, callbacks=[recorder])  # doctest: +SKIP
        >>> add_relora(trainer, reset_every=2000, restart_warmup_steps=100)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    _refuse_what_cannot_train(trainer)
    arguments = trainer.args
    multiplier = partial(
        jagged_cosine,
        max_steps=arguments.max_steps,
        warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
        restart_warmup_steps=restart_warmup_steps,
        reset_every=reset_every,
        min_lr_ratio=min_lr_ratio,
    )

    def tell(kind: str, step: int, facts: dict[str, Any]) -> None:
        for recorder in _recorders(trainer):
            recorder.event(kind, step, facts)

    callback = ReLoRACallback(
        reset_every=reset_every,
        seed=arguments.seed if seed is None else seed,
        on_event=tell,
        **options,
    )
    trainer.lr_scheduler = LambdaLR(trainer.create_optimizer(), multiplier)
    recorders = _recorders(trainer)
    for each in recorders:
        trainer.remove_callback(each)
    # A recorder hands its last record over when a step begins; a merge comes before that.
    for one in (callback, *recorders):
        trainer.add_callback(one)
    return callback


def _recorders(trainer: Trainer) -> list[RecorderCallback]:
    return [
        each for each in trainer.callback_handler.callbacks if isinstance(each, RecorderCallback)
    ]


def _refuse_what_cannot_train(trainer: Trainer) -> None:
    if not lora_layers(trainer.model):
        raise DynamicsError(
            f"{type(trainer.model).__name__} has no LoRA layer to merge; add adapters with PEFT "
            "first."
        )
    if trainer.args.max_steps <= 0:
        raise DynamicsError(
            "The schedule ends at the last step, and TrainingArguments has max_steps = "
            f"{trainer.args.max_steps}; set the number of optimizer steps."
        )
    if trainer.lr_scheduler is not None:
        raise DynamicsError(
            f"The Trainer has a schedule already ({type(trainer.lr_scheduler).__name__}); leave it "
            "out, or use ReLoRACallback by itself."
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.model_init is not None:
        raise DynamicsError(
            "This Trainer makes its optimizer when training begins (FSDP, DeepSpeed or model_init),"
            " too late for the schedule; pass a model, and train with DDP or on one device."
        )
