"""What Hugging Face's libraries put into a checkpoint: a model, config.json, trainer_state.json."""

from functools import partial
from pathlib import Path
from typing import Any

from dynamics.formats.shared.full_checkpoints import FullCheckpoint
from dynamics.formats.shared.trainer_state import STATE, global_step, last_logged, read_state
from dynamics.formats.storage.files import contained, read_json
from dynamics.formats.storage.model_files import MODEL, model_tensors

# Where tools describe how weights are quantised, if not in config.json -> its quant_method
_QUANTISED_BY = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}


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
