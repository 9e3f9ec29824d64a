"""Hugging Face checkpoints: checkpoint-N/ of the Trainer, or one directory with a model."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.files import children, read_json
from dynamics.formats.model_files import MODEL, has_model, model_tensors
from dynamics.formats.trainer_state import STATE, last_logged, read_state
from dynamics.formats.weights import Checkpoint, WeightsRun

_STEP = re.compile(r"checkpoint-(\d+)")


def numbered_directories(path: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Step -> directory of those below `path` whose name is `pattern`, or `path` if its own is.

    Raises:
        FormatError: two of them have the same number.
    """
    if found := pattern.fullmatch(path.name):
        return {int(found[1]): path}
    steps: dict[int, Path] = {}
    for child in children(path):
        found = pattern.fullmatch(child.name)
        if found is None or not child.is_dir():
            continue
        step = int(found[1])
        if step in steps:
            raise FormatError(
                f"{path} holds both {steps[step].name} and {child.name}; remove one of the two."
            )
        steps[step] = child
    return dict(sorted(steps.items()))


def checkpoint_directories(path: Path) -> dict[int, Path]:
    """Step -> directory of the `checkpoint-N` below `path`, or of `path` itself if it is one.

    A directory that holds a model without such a name is one checkpoint at step 0, or at the step
    that its trainer_state.json tells.
    """
    return numbered_directories(path, _STEP) or {0: path}


class CheckpointsRun(WeightsRun):
    """A `Trainer` output directory, or a single model directory."""

    format = "checkpoints"
    description = "checkpoint-N/ or one directory with model.safetensors or pytorch_model.bin, sharded or not (Hugging Face)"  # noqa: E501

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a checkpoint below (or at) `path` holds a model."""
        return any(has_model(each) for each in checkpoint_directories(path).values())

    @staticmethod
    def checkpoints(path: Path, root: Path) -> dict[int, Checkpoint]:
        """See `WeightsRun.checkpoints`."""
        return {
            step: model_checkpoint(directory, root, step)
            for step, directory in checkpoint_directories(path).items()
        }


def model_checkpoint(directory: Path, root: Path, step: int | None = None) -> Checkpoint:
    """The model of a directory as a checkpoint, with its config.json and what was logged."""
    return Checkpoint(
        directory,
        partial(model_tensors, directory, root, MODEL),
        partial(model_attrs, directory),
        lambda: last_logged(read_state(directory / STATE), step),
    )


def model_attrs(directory: Path) -> dict[str, Any]:
    """{"config": config.json} of a directory, empty where it has none."""
    config = directory / "config.json"
    return {"config": read_json(config)} if config.is_file() else {}
