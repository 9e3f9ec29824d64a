"""Which part of a restart changes the loss: the merge, the optimizer reset, or the ramp.

The checkpoint of a merge step holds the state before the merge (see `ReLoRACallback`). So training
can continue from the same state with every combination of the three parts, over the same batches
with the same dropout.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from dynamics.errors import DynamicsError, MissingError
from probes.optimizers.nesting import optimizer_parameters
from probes.relora.config import TrainConfig
from probes.relora.data.sequences import TokenBlocks
from probes.relora.data.text import TextData
from probes.relora.evaluation.log_likelihood import log_likelihoods
from probes.relora.experiment import read_config_and_data
from probes.relora.model import add_adapters, build_model
from probes.relora.seeding import DROPOUT, stream_seed
from probes.relora.training.base_checkpoint import load_base
from probes.relora.training.optimizer_reset import reset_optimizer
from probes.relora.training.restart import adapter_parameters, merge_and_reset
from probes.relora.training.run_directory import complete_checkpoints, step_of
from probes.relora.training.schedule import schedule_of

HELD_OUT = 64  # sequences for the validation loss


@dataclass(frozen=True)
class Restart:
    """What happens at a merge step.

    Attributes:
        merge: the adapters are merged into the base and drawn anew.
        reset: the Adam state of the adapters is dropped.
        ramp: the learning rate ramps up from 0, as after a merge.
        with_scaling: the merge adds s·B·A; False adds B·A.
    """

    merge: bool
    reset: bool
    ramp: bool
    with_scaling: bool = True

    @property
    def name(self) -> str:
        """E.g. "merge + ramp", "nothing", "unscaled merge + reset + ramp"."""
        parts = [
            ("merge" if self.with_scaling else "unscaled merge") if self.merge else "",
            "reset" if self.reset else "",
            "ramp" if self.ramp else "",
        ]
        return " + ".join(part for part in parts if part) or "nothing"


ALL_RESTARTS = (
    *(Restart(*each) for each in itertools.product((False, True), repeat=3)),
    Restart(True, True, True, with_scaling=False),
)


def restart_losses(
    run_dir: str | os.PathLike[str],
    step: int,
    *,
    text: Path | None = None,
    restarts: Sequence[Restart] = ALL_RESTARTS,
    steps: int = 20,
) -> xr.DataArray:
    """Validation losses around a restart, for combinations of its parts.

    Args:
        run_dir: the folder of a ReLoRA run on text, trained on a CPU in float32 by
            `python -m probes.relora train`.
        step: a step at which the run merges; its checkpoint must exist.
        text: the folder of .txt files that it was trained on; None if it was the built-in text.
        restarts: the combinations to train; by default all eight, and the complete restart with an
            unscaled merge.
        steps: how many optimizer steps each combination continues.

    Returns:
        (restart, after) float64: the validation loss in nats per token, without dropout, over up
        to 64 held-out sequences. after = -1 is before the restart, 0 is right after it, n is after
        n further optimizer steps.

    Raises:
        MissingError: there is no such checkpoint.
        DynamicsError: the run does not merge at this step; or see `read_config_and_data`.

    Example:
        >>> from probes.relora.restart_ablation import restart_losses
        >>> losses = restart_losses("runs/relora", step=240)  # doctest: +SKIP
        >>> losses.sel(restart="merge + reset + ramp", after=20)  # doctest: +SKIP
    """
    config, data = read_config_and_data(run_dir, text)
    if config.method != "relora" or step % config.reset_every or not 0 < step < config.max_steps:
        raise DynamicsError(
            f"{run_dir} ({config.method}, {config.max_steps} steps) merges at multiples of "
            f"{config.reset_every}, and not at step {step}."
        )
    if not isinstance(data, TextData):
        raise DynamicsError(
            f"{run_dir} was trained on a stream of tokens; give a run that was trained on text."
        )
    folders = {step_of(path): path for path in complete_checkpoints(run_dir)}
    if step not in folders:
        raise MissingError(
            f"No complete checkpoint of step {step} in {run_dir}; it has those of {list(folders)}."
        )
    losses = [
        list(_branch(config, data, folders[step], restart, min(steps, config.max_steps - step)))
        for restart in restarts
    ]
    return xr.DataArray(
        losses,
        coords={
            "restart": [restart.name for restart in restarts],
            "after": np.arange(len(losses[0])) - 1,
        },
        dims=("restart", "after"),
        name="restart_loss",
        attrs={"long_name": "validation loss around a restart", "units": "nats per token"},
    )


def _branch(
    config: TrainConfig, data: TextData, checkpoint: Path, restart: Restart, steps: int
) -> Iterator[float]:
    """The validation loss before the restart, after it, and after each further step."""
    start = step_of(checkpoint)
    model, optimizer = _restored(config, checkpoint)
    # Without the ramp: the schedule of LoRA, which is the same cosine without ramps.
    rate = schedule_of(config if restart.ramp else replace(config, method="lora"))
    yield _loss(model, data.validation)
    if restart.merge:
        merge_and_reset(model, seed=config.seed, step=start, with_scaling=restart.with_scaling)
    if restart.reset:
        reset_optimizer(optimizer, adapter_parameters(model))
    yield _loss(model, data.validation)
    trainable = list(optimizer_parameters(optimizer))
    whole = len(data.train) - len(data.train) % config.sequences_per_step
    model.train()
    for done in range(start, start + steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * rate(done)
        torch.manual_seed(stream_seed(config.seed, DROPOUT, done))
        first = done * config.sequences_per_step % whole
        rows = data.train.blocks[first : first + config.sequences_per_step]
        for micro_batch in rows.split(config.batch_size):
            loss = model(input_ids=micro_batch, labels=micro_batch).loss
            (loss / config.gradient_accumulation_steps).backward()
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield _loss(model, data.validation)


def _restored(config: TrainConfig, checkpoint: Path) -> tuple[PeftModel, torch.optim.AdamW]:
    model = add_adapters(build_model(config), config)
    load_base(model, checkpoint)
    set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    return model, optimizer


def _loss(model: PeftModel, held_out: TokenBlocks) -> float:
    sequences = held_out.blocks[:HELD_OUT].tolist()
    scored = [len(each) - 1 for each in sequences]
    return float(-log_likelihoods(model, sequences, scored).sum() / sum(scored))
