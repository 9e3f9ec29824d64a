"""Runs of pico-train and relora-pico: checkpoints/step_N/ with a model, weights and gradients.

`src/checkpointing/training.py` of pico-lm/pico-train saves the model in transformers' form after N
optimizer steps. `learning_dynamics.py` there saves
`learning_dynamics/{train,val}_{weights,gradients,activations}.pt` after the backward pass and
before the optimizer step of the same N. These are dicts by module name, made from a copy of the
same model: the weights in train and val are those of the checkpoint, for some modules only. They
are read where there is no model.

Yu-val-weiss/relora-pico (`src/model/relora.py`) stores A_lora and B_lora beside each weight that
has an adapter. s is lora_alpha/r or, with `trainable_scaling`, the tanh of the stored `s`. With
`lora_only` the stored weight is not used, and W is s·B·A.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.format import OpenOptions
from dynamics.formats.quantised.dequantise import floats_of
from dynamics.formats.shared.checkpoints import Checkpoint
from dynamics.formats.shared.found import CheckpointsFormat, Found, OpenedBy, found_in_series
from dynamics.formats.shared.full_checkpoints import with_clean_names, without_tied_names
from dynamics.formats.shared.look import Look, Series
from dynamics.formats.shared.lora_factors import adapters_of, check_fits, pair_factors
from dynamics.formats.shared.model_config import model_attrs
from dynamics.formats.shared.series import find_series
from dynamics.formats.shared.steps import named_step
from dynamics.formats.storage.files import contained, one_line, read_range, root_of, size_of
from dynamics.formats.storage.model_files import has_model, model_tensors, pickled_tensors
from dynamics.formats.storage.tensors import Tensor
from dynamics.runs.account import LeftOut
from dynamics.runs.parameter_names import clean_name

_CHECKPOINTS, _CONFIG, _DYNAMICS = "checkpoints", "training_config.yaml", "learning_dynamics"
# The batches that gradients are taken on; that of the training data is preferred.
_SPLITS = ("train", "val")
_MODEL = re.compile(r"^(?:pico_decoder|pico)\.")
_PART = re.compile(r"(?P<path>.+)\.(?:(?P<part>[AB])_lora\.weight|s)")
_LONGEST_CONFIG = 2**20
_GRADIENT = (
    "dL/dW at the weights of this step, on the {split} batch of learning_dynamics/: "
    "one backward pass per sub-batch of its mean loss, summed; neither clipped nor averaged"
)


class PicoFormat(CheckpointsFormat):
    """A run of pico-train, its checkpoints/, or one step_N/."""

    name = "pico"
    description = "checkpoints/step_N/ with a model or learning_dynamics/ (pico-train, relora-pico)"

    def recognises(self, path: Path) -> bool:
        """Whether there are step_N/, and what only pico-train puts in or beside them."""
        return self.series(path) is not None

    def series(self, path: Path) -> Series | None:
        """See `CheckpointsFormat.series`."""
        return find_series(path, _look(path))

    def found(self, path: Path, options: OpenOptions) -> Found:
        """See `CheckpointsFormat.found`."""
        series = self.series(path)
        if series is None:
            raise FormatError(f"{path} holds neither step_N/ nor a {_CHECKPOINTS}/ with step_N/.")
        config, unread = _config_of(path)
        with_gradients = (
            split
            for split in _SPLITS
            for directory in series.steps.values()
            if (directory / _DYNAMICS / f"{split}_gradients.pt").is_file()
        )
        split, root, why = next(with_gradients, None), root_of(path), unread.get(_CONFIG)
        found = found_in_series(
            series, lambda _, at: OpenedBy(at, partial(_open, at, root, config, split, why))
        )
        return replace(found, passed_over={**found.passed_over, **unread})


def _look(path: Path) -> Look:
    """What only pico-train puts into a checkpoint; a model, where its config lies beside."""
    beside = path.is_dir() and _config_file(path) is not None

    def holds(directory: Path) -> bool:
        own = any((directory / each).is_dir() for each in (_DYNAMICS, "fabric_state"))
        return own or (beside and has_model(directory))

    return Look(holds)


def _config_file(path: Path) -> Path | None:
    """training_config.yaml of the run; `path` is the run, its checkpoints/, or a step_N/."""
    candidates = [path]
    if path.name == _CHECKPOINTS:
        candidates.append(path.parent)
    elif named_step(path.name):
        candidates += [path.parent, path.parent.parent]
    return next((each / _CONFIG for each in candidates if (each / _CONFIG).is_file()), None)


def _config_of(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(The section `model` of the config, name -> reason of a config that cannot be read)."""
    try:
        return _model_section(path), {}
    except FormatError as problem:
        return {}, {_CONFIG: str(problem)}


def _model_section(path: Path) -> dict[str, Any]:
    """Numbers, texts and lists in the section `model` of training_config.yaml.

    Raises:
        FormatError: the file is damaged, or far larger than pico-train's are.
    """
    file = _config_file(path)
    if file is None:
        return {}
    import yaml

    size = size_of(contained(file, file.parent))
    if size > _LONGEST_CONFIG:
        raise FormatError(f"{file} has {size} bytes, too many for a training config.")
    try:
        config = yaml.safe_load(read_range(file, 0, size).decode("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not readable YAML: {one_line(error)}.") from error
    section = config.get("model") if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise FormatError(f"{file} has no section 'model'; it is not a config of pico-train.")
    plain = _plain_entries(section)
    if isinstance(section.get("relora"), dict):
        plain["relora"] = _plain_entries(section["relora"])
    return plain


def _plain_entries(section: Mapping[Any, Any]) -> dict[str, Any]:
    # Nothing nested deeper: a few lines of YAML can expand to more than fits into memory.
    scalar = (str, int, float, bool, type(None))
    return {
        str(key): value
        for key, value in section.items()
        if isinstance(value, scalar)
        or (isinstance(value, list) and all(isinstance(each, scalar) for each in value))
    }


def _open(
    directory: Path,
    root: Path,
    config: Mapping[str, Any],
    split: str | None,
    unread: str | None,
) -> Checkpoint:
    attrs: dict[str, Any] = {"config": dict(config)} if config else model_attrs(directory, root)
    stored, left_out = _weights(directory, root)
    parts, weights, no_pairs = pair_factors(stored, _PART, directory)
    relora = attrs.get("config", {}).get("relora")
    if parts and not isinstance(relora, Mapping):
        raise FormatError(
            unread
            or f"{directory} holds LoRA factors, but neither {_CONFIG} nor its config.json has a "
            "section 'relora' with their lora_alpha; copy the config there."
        )
    relora = relora or {}
    scaled = all("s" in each for each in parts.values())
    if relora.get("trainable_scaling") and not scaled:
        raise FormatError(
            f"{directory} holds LoRA factors without the scaling that was trained with them. Only "
            "the model's own files have it, and they are missing; copy them there."
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
            found, others = floats_of(pickled_tensors(file, root))
            gradients = _by_parameter(found, file)
            left_out += [
                LeftOut(f"{each.name}.weight", each.shape, f"gradients that are {each.reason}")
                for each in others
            ]
    return Checkpoint(
        without_tied_names(weights, attrs),
        adapters,
        gradients=gradients,
        left_out=(*left_out, *no_pairs),
        attrs=attrs,
    )


def _weights(directory: Path, root: Path) -> tuple[dict[str, Tensor], list[LeftOut]]:
    """(Name -> weight, what else the files hold) of a checkpoint."""
    if has_model(directory):
        found, others = floats_of(model_tensors(directory, root))
        named = [replace(each, name=_MODEL.sub("", clean_name(each.name))) for each in others]
        return _without_wrapper(with_clean_names(found, directory)), named
    for split in _SPLITS:
        file = directory / _DYNAMICS / f"{split}_weights.pt"
        if file.is_file():
            found, others = floats_of(pickled_tensors(file, root))
            return _by_parameter(found, file), list(others)
    raise FormatError(f"{directory} holds neither a model nor {_DYNAMICS}/*_weights.pt.")


def _by_parameter(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Name of a module's weight -> tensor, for tensors by the name of their module."""
    return _without_wrapper(
        with_clean_names({f"{name}.weight": each for name, each in tensors.items()}, file)
    )


def _without_wrapper(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as learning_dynamics/ spells them: without the attribute of the Hugging Face model."""
    return {_MODEL.sub("", name): each for name, each in tensors.items()}
