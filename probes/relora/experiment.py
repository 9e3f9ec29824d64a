"""A run of the reference experiment: its data, recording and training, in one folder."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dynamics.errors import DynamicsError, MissingError
from probes.frameworks.hf_trainer import RecorderCallback
from probes.model.provenance import settings
from probes.relora.config import TrainConfig
from probes.relora.data.text import (
    TextData,
    TrainingData,
    folder_text,
    prepare_data,
    standard_library_text,
)
from probes.relora.data.token_datasets import open_tokens
from probes.relora.evaluation.callback import EvaluationCallback
from probes.relora.evaluation.evaluations import Evaluation
from probes.relora.evaluation.trained_models import as_transformers
from probes.relora.model import parameter_counts
from probes.relora.training.run_directory import (
    CONFIG_NAME,
    RECORDING_NAME,
    check_identity,
    checkpoints_in,
    newest_checkpoint,
    read_identity,
    run_identity,
    step_of,
)
from probes.relora.training.trainer import train

# Enough for one epoch of the micro preset.
BUILT_IN_BYTES = 8_000_000


def load_data(config: TrainConfig, text: Path | None = None) -> TrainingData:
    """Load the data of a run: a folder of .txt files, the dataset of the config, or built-in text.

    Raises:
        DynamicsError: there is no such data, or too little of it.
    """
    if text is not None:
        return prepare_data(folder_text(text), config)
    if config.dataset is not None:
        return open_tokens(config)
    return prepare_data(standard_library_text(BUILT_IN_BYTES), config)


def read_config_and_data(
    run_dir: str | os.PathLike[str], text: Path | None = None
) -> tuple[TrainConfig, TrainingData]:
    """The config and the data that a run was trained with.

    Args:
        run_dir: its folder.
        text: the folder of .txt files that it was trained on; None if it was another dataset.

    Raises:
        MissingError: the folder has no train_config.json.
        DynamicsError: the run was trained on other data.
    """
    run = Path(run_dir)
    path = run / CONFIG_NAME
    if not path.is_file():
        raise MissingError(
            f"No {path}, which says how the run was trained; give the folder of a run."
        )
    stored = read_identity(path)
    values: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value := stored[field.name], list) else value
        for field in dataclasses.fields(TrainConfig)
    }
    config = TrainConfig(**values)
    data = load_data(config, text)
    if run_identity(config, data) != stored:
        raise DynamicsError(
            f"{run} was not trained on {text or 'what its config names'}; give the folder of .txt "
            "files that it was trained on (--trained-on)."
        )
    return config, data


def run_experiment(
    config: TrainConfig,
    output: Path,
    *,
    text: Path | None = None,
    resume: bool = False,
    record: bool = True,
    evaluations: Sequence[Evaluation] = (),
    report_to: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Train one run into `output`, recorded into `output`/run.zarr.

    Args:
        config: the run.
        output: gets train_config.json, tokenizer.json, checkpoint-N/ and run.zarr.
        text: a folder of .txt files to train on, instead of the dataset of the config.
        resume: continue from the newest complete checkpoint, or start again if there is none.
        record: whether to record.
        evaluations: evaluations to make every `evaluate_every` steps, besides the validation
            loss.
        report_to: see `train`.
        say: gets a few lines about what happens, in the first process only.

    Raises:
        DynamicsError: see `train` and `load_data`; or there is no tokenizer for the texts of
            `evaluations`.
    """
    first = os.environ.get("RANK", "0") == "0"
    announce = say if first else lambda line: None
    trainable, total = parameter_counts(config)
    announce(
        f"{config.method}: {total:,} parameters, {trainable:,} of them trainable; "
        f"{config.max_steps} steps of {config.sequences_per_step} × {config.sequence_length} tokens"
    )
    data = load_data(config, text)
    source = str(text or config.dataset or "the sources of Python's standard library")
    size = f", {data.train.blocks.numel():,} tokens" if isinstance(data, TextData) else ""
    announce(f"Data: {source}{size}; {len(data.validation)} sequences held out")
    checkpoint = newest_checkpoint(output) if resume else None
    if resume and checkpoint is None:
        if not (output / CONFIG_NAME).is_file():
            raise MissingError(f"No run in {output} to resume; start it without --resume.")
        check_identity(output, run_identity(config, data))
        # The run was killed before its first checkpoint was complete.
        for unfinished in checkpoints_in(output) if first else ():
            shutil.rmtree(unfinished)
        announce("No complete checkpoint yet: starting again")
    elif checkpoint is not None:
        announce(f"Resuming after step {step_of(checkpoint)}")
    recorder = None
    if record:
        options: dict[str, Any] = {"if_exists": "refuse"}
        if resume and checkpoint is None:
            options["resume_at"] = 0
        recorder = RecorderCallback(
            output / RECORDING_NAME,
            every=config.record_every,
            # Without the digest of the data, which follows from the seed.
            attrs={"train_config": settings(dataclasses.asdict(config))},
            **options,
        )
    callbacks: list[TrainerCallback] = [recorder] if recorder else []
    if evaluations:
        tokenizer = None if data.tokenizer is None else as_transformers(data.tokenizer)
        if tokenizer is None and any(each.needs_tokenizer for each in evaluations):
            raise MissingError(
                f"{source} has tokens but no tokenizer, and evaluating texts needs it; name it "
                "(--set tokenizer=NAME)."
            )
        callbacks.append(
            EvaluationCallback(
                evaluations, tokenizer, every=config.evaluate_every, recorder=recorder
            )
        )
    trainer = train(
        config,
        data,
        output,
        callbacks=callbacks,
        on_event=recorder.event if recorder else None,
        resume=checkpoint is not None,
        report_to=report_to,
    )
    history = trainer.state.log_history
    for name, label in (("loss", "training loss"), ("eval_loss", "validation loss")):
        losses = [entry[name] for entry in history if name in entry]
        if losses:
            announce(f"{label} {losses[0]:.4f} → {losses[-1]:.4f}")
    announce(f"Wrote {output}")
