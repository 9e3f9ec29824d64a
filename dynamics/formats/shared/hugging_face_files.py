"""What Hugging Face's libraries put on disk: checkpoint-N/, config.json, trainer_state.json."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.formats.shared.full_checkpoints import FullCheckpoint
from dynamics.formats.shared.steps import numbered_directories
from dynamics.formats.shared.trainer_state import STATE, global_step, last_logged, read_state
from dynamics.formats.storage.files import contained, read_json
from dynamics.formats.storage.model_files import MODEL, has_model, model_tensors

# Where tools describe how weights are quantised, if not in config.json -> its quant_method
_QUANTISED_BY = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoint_directories(
    path: Path, holds: Callable[[Path], bool] = has_model
) -> dict[int, Path]:
    """Step -> directory of each `checkpoint-N` below `path`, or of `path` itself if it is one.

    The Trainer saves the final model into `path` itself, beside the checkpoints. It belongs to the
    step in its trainer_state.json. It is left out where that file is missing, or where one of the
    checkpoints has the same step. A directory with a model but without such a name or file is one
    checkpoint at step 0.

    Args:
        path: where the run lies.
        holds: whether a directory holds what is looked for: a model, or an adapter.

    Raises:
        FormatError: two directories have the same step, or trainer_state.json is damaged.
    """
    steps = numbered_directories(path, _CHECKPOINT)
    if path in steps.values() or not holds(path):
        return steps or {0: path}
    final = global_step(read_state(path / STATE))
    if not steps:
        return {final or 0: path}
    if final is None or final in steps:
        return steps
    return dict(sorted((steps | {final: path}).items()))


def model_checkpoint(directory: Path, root: Path, step: int | None = None) -> FullCheckpoint:
    """The model in a directory as a checkpoint, with its config.json and what was logged."""
    return FullCheckpoint(
        directory,
        partial(model_tensors, directory, root, MODEL),
        partial(model_attrs, directory, root),
        partial(logged_scalars, directory, root, step),
    )


def model_attrs(directory: Path, root: Path) -> dict[str, Any]:
    """{"config": the content of config.json}; empty where the directory has none.

    What a file beside it says of quantised weights becomes the config's `quantization_config`.

    Raises:
        FormatError: config.json is damaged, or a link that leads out of `root`.
    """
    path = directory / "config.json"
    config = read_json(contained(path, root)) if path.is_file() else {}
    for file, method in _QUANTISED_BY.items():
        path = directory / file
        if "quantization_config" not in config and path.is_file():
            described = read_json(contained(path, root))
            described = {**described, **_mapping(described.get("quantization"))}
            config["quantization_config"] = {"quant_method": method, **described}
    return {"config": config} if config else {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def logged_scalars(directory: Path, root: Path, step: int | None) -> dict[str, float]:
    """Name -> the last value up to `step` in the trainer_state.json of a checkpoint.

    Raises:
        FormatError: trainer_state.json is damaged, or a link that leads out of `root`.
    """
    return last_logged(read_state(contained(directory / STATE, root)), step)
