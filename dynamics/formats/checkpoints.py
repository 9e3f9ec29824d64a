"""Hugging Face checkpoints: checkpoint-N/ of the Trainer, or one directory with a model.

What the Trainer saves at the end, beside the checkpoints, is one more step where the
trainer_state.json beside it says which one; without that file nobody can tell, and it is left out.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.shared.full_checkpoints import Checkpoint, WeightsRun
from dynamics.formats.shared.trainer_state import STATE, global_step, last_logged, read_state
from dynamics.formats.storage.files import children, contained, read_json
from dynamics.formats.storage.model_files import MODEL, has_model, model_tensors

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


def checkpoint_directories(
    path: Path, holds: Callable[[Path], bool] = has_model
) -> dict[int, Path]:
    """Step -> directory of the `checkpoint-N` below `path`, or of `path` itself if it is one.

    What `path` itself holds beside them, the final model, belongs to the step that its
    trainer_state.json tells, unless one of them is of that step. A directory that holds a model
    without such a name or file is one checkpoint at step 0.

    Args:
        path: the run's.
        holds: whether a directory holds a model, or an adapter.

    Raises:
        FormatError: two directories have the same step, or trainer_state.json is damaged.
    """
    steps = numbered_directories(path, _STEP)
    if path in steps.values() or not holds(path):
        return steps or {0: path}
    final = global_step(read_state(path / STATE))
    if not steps:
        return {final or 0: path}
    if final is None or final in steps:
        return steps
    return dict(sorted((steps | {final: path}).items()))


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
        partial(model_attrs, directory, root),
        partial(logged, directory, root, step),
    )


def model_attrs(directory: Path, root: Path) -> dict[str, Any]:
    """{"config": config.json} of a directory, empty where it has none.

    Raises:
        FormatError: it is damaged, or a link that leads out of `root`.
    """
    config = directory / "config.json"
    return {"config": read_json(contained(config, root))} if config.is_file() else {}


def logged(directory: Path, root: Path, step: int | None) -> dict[str, float]:
    """What the trainer_state.json of a checkpoint says was logged last, up to `step`.

    Raises:
        FormatError: it is damaged, or a link that leads out of `root`.
    """
    return last_logged(read_state(contained(directory / STATE, root)), step)
