"""One training run of the experiment, with the Trainer of Hugging Face."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from dynamics.errors import DynamicsError, one_line
from probes.relora.config import PROJECTED, TrainConfig
from probes.relora.data.sequences import TokenBlocks
from probes.relora.data.text import StreamedData, TrainingData
from probes.relora.data.token_datasets import StreamPosition, position_in
from probes.relora.layers.of_method import with_layers_of
from probes.relora.model import add_adapters, build_model
from probes.relora.optimizers.of_method import ProjectionCallback, optimizer_of
from probes.relora.seeding import DROPOUT, stream_seed
from probes.relora.training import base_checkpoint
from probes.relora.training.progress import no_file_progress
from probes.relora.training.restart import ReLoRACallback
from probes.relora.training.run_directory import (
    CONFIG_NAME,
    TOKENIZER_NAME,
    checkpoint_to_resume,
    refuse_checkpoints,
    run_identity,
    step_of,
)
from probes.relora.training.schedule import schedule_of


def train(
    config: TrainConfig,
    data: TrainingData,
    output_dir: str | os.PathLike[str],
    *,
    callbacks: Sequence[TrainerCallback] = (),
    on_event: Callable[[str, int, dict[str, Any]], None] | None = None,
    resume: bool = False,
    report_to: Sequence[str] = (),
) -> Trainer:
    """Train one run into `output_dir`.

    The optimizer of the method (`optimizer_of`) trains all trainable parameters, with its published
    schedule: linear warm-up and decay without adapters, the jagged cosine for ReLoRA. Sequences
    come in the order of `data.train`, again from the start when all are used, so twins see the same
    batches. Every `evaluate_every` steps the loss on `data.validation` is computed. Every
    `save_every` steps `checkpoint-N` is written, for adapted models with the base weights.

    Under torchrun, each process takes its share of every batch (DDP), and the first one writes.
    The run equals that of one process up to rounding, except that each process draws its own
    dropout.

    Args:
        config: the run.
        data: its sequences, of length `config.sequence_length`.
        output_dir: gets the checkpoints, train_config.json and tokenizer.json.
        callbacks: further callbacks, such as a recorder; they are called after those of ReLoRA.
        on_event: called with the merges and optimizer resets of ReLoRA (`ReLoRACallback`), and with
            the new projectors of GaLore, Fira and APOLLO (`ProjectionCallback`).
        resume: continue from the newest complete checkpoint of `output_dir`. On a CPU the run then
            computes the same bits as without the interruption.
        report_to: installed trackers that the Trainer logs to: "tensorboard", "wandb", "trackio".

    Returns:
        The Trainer; its model is the trained one.

    Raises:
        OutputExistsError: `output_dir` holds checkpoints and `resume` is False.
        MissingError: `resume` is True and there is no complete checkpoint.
        DynamicsError: the data does not fill one step or does not fit the config; the run to
            resume is finished or was started with another config; or the devices cannot share a
            batch.

    Example:
        >>> from dataclasses import replace
        >>> from probes.relora import TextData, TokenBlocks, micro, train
        >>> config = replace(
        ...     micro("full_rank"), num_layers=1, hidden_size=16, intermediate_size=16,
        ...     vocab_size=32, sequence_length=8, batch_size=2, max_steps=2, warmup_steps=1,
        ... )
        >>> blocks = torch.arange(32).view(4, 8)
        >>> data = TextData(train=TokenBlocks(blocks), validation=TokenBlocks(blocks[:0]))
        >>> trainer = train(config, data, "trained")  # doctest: +SKIP
        >>> trainer.state.global_step  # doctest: +SKIP
        2
    """
    _check_trackers(report_to)
    output = Path(output_dir)
    sequences = _train_sequences(config, data)
    identity = run_identity(config, data)
    checkpoint = checkpoint_to_resume(output, identity) if resume else None
    if not resume and os.environ.get("RANK", "0") == "0":
        refuse_checkpoints(output)

    model = build_model(config)
    own_callbacks: list[TrainerCallback] = []
    with_layers_of(config, model)
    if config.adapted:
        model = add_adapters(model, config)
        own_callbacks.append(
            ReLoRACallback(
                reset_every=config.reset_every if config.method == "relora" else None,
                seed=config.seed,
                optimizer_reset=config.optimizer_reset,
                prune_ratio=config.prune_ratio,
                shared_prune_mask=config.shared_prune_mask,
                merge_with_scaling=config.merge_with_scaling,
                on_event=on_event,
            )
        )
        if checkpoint is not None:
            base_checkpoint.load_base(model, checkpoint)  # the Trainer will load the adapter
    if isinstance(data, StreamedData):
        own_callbacks.append(StreamPosition(data.train, config.sequences_per_step))
        if checkpoint is not None:
            seen = step_of(checkpoint) * config.sequences_per_step
            data.train.start_at(position_in(checkpoint, seen))

    optimizer = optimizer_of(config, model)
    if config.method in PROJECTED and on_event is not None:
        own_callbacks.append(ProjectionCallback(on_event))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_of(config))
    arguments = _training_arguments(
        config,
        output,
        evaluate=len(data.validation) > 0,
        streamed=isinstance(data, StreamedData),
        report_to=report_to,
    )
    trainer_class = _StreamTrainer if isinstance(data, StreamedData) else Trainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=sequences,
        eval_dataset=data.validation,
        callbacks=[*own_callbacks, *callbacks],
        optimizers=(optimizer, schedule),
    )
    # Do not print losses: they are in the state of the Trainer and in each checkpoint.
    trainer.remove_callback(PrinterCallback)
    if arguments.process_index:
        # The Trainer gives every process the same seed, but each must draw its own dropout masks.
        torch.manual_seed(stream_seed(config.seed, DROPOUT, arguments.process_index))

    if checkpoint is None and trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        (output / CONFIG_NAME).write_text(json.dumps(identity, indent=2) + "\n")
        if data.tokenizer is not None:
            data.tokenizer.save(str(output / TOKENIZER_NAME))
    with no_file_progress():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


class _StreamTrainer(Trainer):
    """A Trainer whose processes each take their share of the batches of a `TokenStream`.

    The loaders of accelerate are not used: one of them draws a seed from the random state that a
    resumed run has just restored.
    """

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of this process."""
        stream, share = self.train_dataset, self.args.train_batch_size
        stream.share(self.args.process_index, self.args.world_size, share)
        return DataLoader(
            stream,
            batch_size=share,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),
        )


def _check_trackers(names: Sequence[str]) -> None:
    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ImportError, RuntimeError, ValueError) as error:
            raise DynamicsError(f"Cannot report to {name!r}: {one_line(error)}.") from error


def _train_sequences(config: TrainConfig, data: TrainingData) -> Dataset[Any]:
    """The training sequences; if their number is known, cut to a whole number of steps.

    A last, smaller batch of an epoch would give its sequences more weight.
    """
    if data.train.sequence_length != config.sequence_length:
        raise DynamicsError(
            f"The data has sequences of {data.train.sequence_length} tokens and sequence_length is "
            f"{config.sequence_length}; prepare it with the same config."
        )
    if isinstance(data, StreamedData):
        return data.train
    if len(data.train) < config.sequences_per_step:
        raise DynamicsError(
            f"The data has {len(data.train)} training sequences and one step takes "
            f"{config.sequences_per_step}; give more text or a smaller batch_size."
        )
    highest = int(data.train.blocks.max())
    if highest >= config.vocab_size:
        raise DynamicsError(
            f"The data has token {highest} and vocab_size is {config.vocab_size}; "
            "prepare it with the same config."
        )
    whole = len(data.train) - len(data.train) % config.sequences_per_step
    return TokenBlocks(data.train.blocks[:whole], config.sequence_length)


def _training_arguments(
    config: TrainConfig, output: Path, *, evaluate: bool, streamed: bool, report_to: Sequence[str]
) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % processes:
        raise DynamicsError(
            f"{processes} processes cannot share batch_size = {config.batch_size} sequences "
            "evenly; set a multiple of their number."
        )
    arguments = TrainingArguments(
        output_dir=str(output),
        seed=config.seed,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size // processes,
        per_device_eval_batch_size=config.batch_size // processes,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        bf16=config.precision == "bfloat16",
        train_sampling_strategy="sequential",
        # A stream goes to its position itself; the Trainer would read everything before it.
        ignore_data_skip=streamed,
        remove_unused_columns=False,  # the model takes shift_labels without naming it
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # show a loss that diverged
        include_num_input_tokens_seen="all",
        eval_strategy="steps" if evaluate else "no",
        eval_steps=config.evaluate_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=config.save_every,
        report_to=list(report_to) or "none",
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=not cuda,
        ddp_backend=None if cuda or processes == 1 else "gloo",
        ddp_find_unused_parameters=False if processes > 1 else None,
        dataloader_num_workers=0,
        dataloader_pin_memory=cuda,
    )
    if arguments.n_gpu > 1:
        raise DynamicsError(
            f"{arguments.n_gpu} devices would each take batch_size = {config.batch_size} "
            "sequences; run on one (CUDA_VISIBLE_DEVICES=0), or on all by torchrun."
        )
    return arguments
