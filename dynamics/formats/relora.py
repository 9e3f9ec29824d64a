"""Checkpoints of the original ReLoRA (Guitaricet/relora): model_N/ with base and factors.

`torchrun_main.py` saves `model_{update_step}/` after that many optimizer steps and before a merge
of the same step: transformers' save_pretrained of the model with lora_A and lora_B beside each
adapted weight (`peft_pretraining/relora.py`), relora_config.json, training_state.json and
optimizer.pt. The full-rank runs of the same script lack relora_config.json and the factors.

relora_config.json tells neither whether the scaling is trained nor whether there is a base weight
(its writer leaves both at their defaults), so both are told by the stored tensors: a trained
scaling is stored as `scaling`, and s is its tanh; without a base weight W is s·B·A.
"""

import re
from functools import partial
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.checkpoints import model_attrs, numbered_directories
from dynamics.formats.shared.adapted_checkpoints import AdaptedCheckpoint, AdaptedRun
from dynamics.formats.shared.full_checkpoints import cleaned, untied
from dynamics.formats.shared.lora_factors import adapters_of, check_fits, paired
from dynamics.formats.storage.files import contained, read_json, root_of
from dynamics.formats.storage.model_files import has_model, model_tensors

_CONFIG = "relora_config.json"
_STATE = "training_state.json"
_NAME = re.compile(r"model_(\d+)")
_PART = re.compile(r"(?P<path>.+)\.(?:lora_(?P<part>[AB])\.weight|scaling)")
_RENAMED = {"tokens_seen": "tokens"}


class ReLoRARun(AdaptedRun):
    """A `--save_dir` of the original ReLoRA, or one of its model_N/."""

    format = "relora"
    description = "model_N/ with relora_config.json or training_state.json (Guitaricet/relora)"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a model_N/ below (or at) `path` has what its trainer saves beside a model."""
        return any(
            (directory / file).is_file()
            for directory in numbered_directories(path, _NAME).values()
            for file in (_CONFIG, _STATE)
        )

    def __init__(self, path: Path):
        directories = numbered_directories(path, _NAME)
        if not directories:
            raise FormatError(f"{path} holds no model_N/ of the original ReLoRA.")
        root = root_of(path)
        super().__init__(path, {step: partial(_open, at, root) for step, at in directories.items()})
        self._restarts = self._scalars.get("n_lora_restarts")

    def merges_between(self, name: str, before: int, now: int) -> int:
        """The restarts that training_state.json counted, if the base changed at all.

        Where it counts none, as after a resumption that began to count anew, see `AdaptedRun`.
        """
        changed = super().merges_between(name, before, now)
        if not changed or self._restarts is None:
            return changed
        counted = [self._restarts[self.steps == step].max(initial=0) for step in (before, now)]
        difference = counted[1] - counted[0]
        return max(changed, int(difference)) if difference > 0 else changed


def _open(directory: Path, root: Path) -> AdaptedCheckpoint:
    if not has_model(directory):
        raise FormatError(f"{directory} holds no model.safetensors or pytorch_model.bin.")
    attrs = model_attrs(directory, root)
    tensors = cleaned(model_tensors(directory, root), directory)
    parts, weights = paired(tensors, _PART, directory)
    path = directory / _CONFIG
    config = read_json(contained(path, root)) if path.is_file() else {}
    if config.get("quantize"):
        raise FormatError(
            f"{directory} holds weights quantised to {config['quantize']!r}, which cannot be read; "
            "save it dequantised."
        )
    if parts and not config:
        raise FormatError(f"{directory} holds LoRA factors but no {_CONFIG} with their lora_alpha.")
    adapters = adapters_of(parts, config, path)
    check_fits(adapters, weights, directory, directory)
    if config:
        attrs["relora_config"] = config
    return AdaptedCheckpoint(
        directory,
        adapters,
        untied(weights, attrs),
        attrs=attrs,
        scalars=_scalars(directory / _STATE, root),
    )


def _scalars(path: Path, root: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    return {
        _RENAMED.get(name, name): float(value)
        for name, value in read_json(contained(path, root)).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1000
    }
