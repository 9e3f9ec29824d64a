"""What Hugging Face's libraries put into a checkpoint: a model, config.json, trainer_state.json."""

from functools import partial
from pathlib import Path

from dynamics.formats.shared.full_checkpoints import FullCheckpoint
from dynamics.formats.shared.model_config import model_attrs
from dynamics.formats.shared.trainer_state import STATE, global_step, last_logged, read_state
from dynamics.formats.storage.files import contained
from dynamics.formats.storage.model_files import MODEL, model_tensors


def trainer_step(directory: Path) -> int | None:
    """The global_step in the trainer_state.json of a directory; None where it tells none.

    Raises:
        FormatError: the file is damaged.
    """
    return global_step(read_state(directory / STATE))


def model_checkpoint(directory: Path, root: Path, step: int | None = None) -> FullCheckpoint:
    """The model in a directory as a checkpoint, with its config.json and what was logged."""
    return FullCheckpoint(
        directory,
        partial(model_tensors, directory, root, MODEL),
        partial(model_attrs, directory, root),
        partial(logged_scalars, directory, root, step),
    )


def logged_scalars(directory: Path, root: Path, step: int | None) -> dict[str, float]:
    """Name -> the last value up to `step` in the trainer_state.json of a checkpoint.

    Raises:
        FormatError: trainer_state.json is damaged, or a link that leads out of `root`.
    """
    return last_logged(read_state(contained(directory / STATE, root)), step)
