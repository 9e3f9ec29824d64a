"""Runs of pico-train and relora-pico: checkpoints/step_N/ with a model, weights and gradients.

`src/checkpointing/training.py` of pico-lm/pico-train saves the model in transformers' form after N
optimizer steps. `learning_dynamics.py` there saves, after the backward pass and before the
optimizer step of the same N, `learning_dynamics/{train,val}_{weights,gradients,activations}.pt`:
dicts by module name, of a copy of the same model, so that the weights of train and val are those
of the checkpoint, for some modules only. They are read where there is no model.

Yu-val-weiss/relora-pico (`src/model/relora.py`) stores A_lora and B_lora beside each adapted
weight; s is lora_alpha/r, or, with `trainable_scaling`, the tanh of the stored `s`. With
`lora_only` the stored weight is not used, and W is s·B·A.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.checkpoints import model_attrs, numbered_directories
from dynamics.formats.shared.adapted_checkpoints import AdaptedCheckpoint, AdaptedRun
from dynamics.formats.shared.full_checkpoints import cleaned, untied
from dynamics.formats.shared.lora_factors import adapters_of, check_fits, paired
from dynamics.formats.storage.files import contained, one_line, read_range, root_of, size_of
from dynamics.formats.storage.model_files import has_model, model_tensors, pickled_tensors
from dynamics.formats.storage.tensors import Tensor

_NAME = re.compile(r"step_(\d+)")
_CHECKPOINTS, _CONFIG, _DYNAMICS = "checkpoints", "training_config.yaml", "learning_dynamics"
# Of the two batches that gradients are taken on, the one of the training data first.
_SPLITS = ("train", "val")
_MODEL = re.compile(r"^(?:pico_decoder|pico)\.")
_PART = re.compile(r"(?P<path>.+)\.(?:(?P<part>[AB])_lora\.weight|s)")
_LONGEST_CONFIG = 2**20
_GRADIENT = (
    "dL/dW at the weights of this step, on the {split} batch of learning_dynamics/: "
    "one backward pass per sub-batch of its mean loss, summed; neither clipped nor averaged"
)


class PicoRun(AdaptedRun):
    """A run of pico-train, its checkpoints/, or one step_N/."""

    format = "pico"
    description = "checkpoints/step_N/ with a model or learning_dynamics/ (pico-train, relora-pico)"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether there are step_N/, and what only pico-train puts in or beside them."""
        directories = _steps(path)
        if not directories:
            return False
        beside = _config_file(path)
        return beside is not None or any(
            (directory / own).is_dir()
            for directory in directories.values()
            for own in (_DYNAMICS, "fabric_state")
        )

    def __init__(self, path: Path):
        directories = _steps(path)
        if not directories:
            raise FormatError(f"{path} holds no step_N/ and no {_CHECKPOINTS}/ with them.")
        config = _model_section(path)
        gradients = {
            split
            for split in _SPLITS
            for directory in directories.values()
            if (directory / _DYNAMICS / f"{split}_gradients.pt").is_file()
        }
        split = next((each for each in _SPLITS if each in gradients), None)
        root = root_of(path)
        super().__init__(
            path,
            {
                step: partial(_open, directory, root, config, split)
                for step, directory in directories.items()
            },
        )


def _steps(path: Path) -> dict[int, Path]:
    if not path.is_dir():
        return {}
    found = numbered_directories(path, _NAME)
    if not found and (path / _CHECKPOINTS).is_dir():
        return numbered_directories(path / _CHECKPOINTS, _NAME)
    return found


def _config_file(path: Path) -> Path | None:
    """training_config.yaml of the run that `path` is, or is the checkpoints/ or a step_N/ of."""
    candidates = [path, path.parent]
    candidates += [path.parent.parent] if _NAME.fullmatch(path.name) else []
    return next((each / _CONFIG for each in candidates if (each / _CONFIG).is_file()), None)


def _model_section(path: Path) -> dict[str, Any]:
    """The section `model` of training_config.yaml, and of that what is a number, text or list.

    Raises:
        FormatError: the file is damaged, or far larger than pico-train's are.
    """
    file = _config_file(path)
    if file is None:
        return {}
    import yaml

    size = size_of(contained(file, file.parent))
    if size > _LONGEST_CONFIG:
        raise FormatError(f"{file} has {size} bytes, which is no training config.")
    try:
        config = yaml.safe_load(read_range(file, 0, size).decode("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} is no readable YAML: {one_line(error)}.") from error
    section = config.get("model") if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise FormatError(f"{file} has no section 'model'; it is no config of pico-train.")
    found = _plain(section)
    if isinstance(section.get("relora"), dict):
        found["relora"] = _plain(section["relora"])
    return found


def _plain(section: Mapping[Any, Any]) -> dict[str, Any]:
    # No deeper: a few lines of YAML can stand for more than fits into memory.
    scalar = (str, int, float, bool, type(None))
    return {
        str(key): value
        for key, value in section.items()
        if isinstance(value, scalar)
        or (isinstance(value, list) and all(isinstance(each, scalar) for each in value))
    }


def _open(
    directory: Path, root: Path, config: Mapping[str, Any], split: str | None
) -> AdaptedCheckpoint:
    attrs: dict[str, Any] = {"config": dict(config)} if config else model_attrs(directory, root)
    parts, weights = paired(_weights(directory, root), _PART, directory)
    relora = attrs.get("config", {}).get("relora")
    if parts and not isinstance(relora, Mapping):
        raise FormatError(
            f"{directory} holds LoRA factors, but neither {_CONFIG} nor its config.json has a "
            "section 'relora' with their lora_alpha; copy it there."
        )
    relora = relora or {}
    scaled = all("s" in each for each in parts.values())
    if relora.get("trainable_scaling") and not scaled:
        raise FormatError(
            f"{directory} holds LoRA factors without the scaling that was trained with them; it is "
            "in the model's own files only, which are missing."
        )
    adapters = adapters_of(parts, relora, directory)
    check_fits(adapters, weights, directory, directory)
    if relora.get("lora_only"):
        weights = {name: each for name, each in weights.items() if name not in adapters}
    gradients: dict[str, Tensor] = {}
    if split is not None:
        attrs["gradient"] = _GRADIENT.format(split=split)
        file = directory / _DYNAMICS / f"{split}_gradients.pt"
        if file.is_file():
            gradients = _by_parameter(pickled_tensors(file, root), file)
    return AdaptedCheckpoint(
        directory, adapters, untied(weights, attrs), gradients=gradients, attrs=attrs
    )


def _weights(directory: Path, root: Path) -> dict[str, Tensor]:
    if has_model(directory):
        return _named(cleaned(model_tensors(directory, root), directory))
    for split in _SPLITS:
        file = directory / _DYNAMICS / f"{split}_weights.pt"
        if file.is_file():
            return _by_parameter(pickled_tensors(file, root), file)
    raise FormatError(f"{directory} holds neither a model nor {_DYNAMICS}/*_weights.pt.")


def _by_parameter(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Of names of modules, those of their weights."""
    return _named(cleaned({f"{name}.weight": each for name, each in tensors.items()}, file))


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as learning_dynamics/ spells them: without the Hugging Face model around the model."""
    return {_MODEL.sub("", name): each for name, each in tensors.items()}
