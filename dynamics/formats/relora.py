"""Checkpoints of the original ReLoRA (Guitaricet/relora): model_N/ with base and factors.

`torchrun_main.py` saves `model_{update_step}/` after that many optimizer steps, and before a merge
of the same step. It holds transformers' save_pretrained of the model, with lora_A and lora_B beside
each weight that has an adapter (`peft_pretraining/relora.py`), relora_config.json,
training_state.json and optimizer.pt. The full-rank runs of the same script have neither
relora_config.json nor factors.

relora_config.json does not say whether the scaling is trained, nor whether there is a base weight:
its writer leaves both fields at their defaults. The stored tensors show both. A trained scaling is
stored as `scaling`, and s is its tanh. Without a base weight, W is s·B·A.
"""

import re
from functools import partial
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.format import OpenOptions
from dynamics.formats.quantised.dequantise import dequantised
from dynamics.formats.shared.checkpoints import Checkpoint, CheckpointsRun
from dynamics.formats.shared.found import CheckpointsFormat, Found, OpenedBy, found_in_series
from dynamics.formats.shared.full_checkpoints import (
    FullCheckpoint,
    with_clean_names,
    without_tied_names,
)
from dynamics.formats.shared.look import Look, Series
from dynamics.formats.shared.lora_factors import adapters_of, check_fits, pair_factors
from dynamics.formats.shared.model_config import model_attrs
from dynamics.formats.shared.series import find_series
from dynamics.formats.shared.sparse_low_rank import with_sparse_weights
from dynamics.formats.storage.files import contained, read_json, root_of
from dynamics.formats.storage.model_files import has_model, model_tensors

_CONFIG = "relora_config.json"
_STATE = "training_state.json"
_PART = re.compile(r"(?P<path>.+)\.(?:lora_(?P<part>[AB])\.weight|scaling)")
_RENAMED = {"tokens_seen": "tokens"}
_LOOK = Look(lambda directory: any((directory / each).is_file() for each in (_CONFIG, _STATE)))


class ReLoRARun(CheckpointsRun):
    """A run of the original ReLoRA, whose training_state.json counts the merges."""

    def merges_between(self, name: str, before: int, now: int) -> int:
        """The restarts that training_state.json counted, if the base changed at all.

        A resumed run may count from 0 again. Where the count does not grow, the changes of the base
        are counted, as in `CheckpointsRun`.
        """
        changed = super().merges_between(name, before, now)
        restarts = self.scalars.get("n_lora_restarts")
        if not changed or restarts is None:
            return changed
        counted = [restarts[self.steps == step].max(initial=0) for step in (before, now)]
        difference = counted[1] - counted[0]
        return max(changed, int(difference)) if difference > 0 else changed


class ReLoRAFormat(CheckpointsFormat):
    """A `--save_dir` of the original ReLoRA, or one of its model_N/."""

    name = "relora"
    description = "model_N/ with relora_config.json or training_state.json (Guitaricet/relora)"
    run_class = ReLoRARun
    options = ("lora_alpha",)

    def recognises(self, path: Path) -> bool:
        """Whether a checkpoint below (or at) `path` has what its trainer saves beside a model."""
        return self.series(path) is not None

    def series(self, path: Path) -> Series | None:
        """See `CheckpointsFormat.series`."""
        return find_series(path, _LOOK)

    def found(self, path: Path, options: OpenOptions) -> Found:
        """See `CheckpointsFormat.found`."""
        series = self.series(path)
        if series is None:
            raise FormatError(f"{path} holds no directory model_N/ of the original ReLoRA.")
        root = root_of(path)
        return found_in_series(
            series, lambda _, at: OpenedBy(at, partial(_open, at, root, options))
        )

    def run_of(self, path: Path, found: Found, options: OpenOptions) -> CheckpointsRun:
        """See `CheckpointsFormat.run_of`. Full-rank runs have no alpha."""
        run = super().run_of(path, found, options)
        if options.lora_alpha is not None and not run.has_adapters:
            raise self.takes_no("lora_alpha", path)
        return run


def _open(directory: Path, root: Path, options: OpenOptions) -> Checkpoint:
    if not has_model(directory):
        raise FormatError(f"{directory} holds no model.safetensors or pytorch_model.bin.")
    attrs = model_attrs(directory, root)
    found = model_tensors(directory, root)
    if with_sparse_weights(found, directory) is not found:  # the same script for SLTrain
        return FullCheckpoint(
            directory,
            lambda: found,
            lambda: attrs,
            partial(_scalars, directory / _STATE, root),
        ).open(root, options)
    stored, left_out = dequantised(found, attrs.get("config"))
    tensors = with_clean_names(stored, directory)
    parts, weights, no_pairs = pair_factors(tensors, _PART, directory)
    path = directory / _CONFIG
    config = read_json(contained(path, root)) if path.is_file() else {}
    if config.get("quantize"):
        raise FormatError(
            f"{directory} holds weights quantised to {config['quantize']!r}, which cannot be read; "
            "save them dequantised."
        )
    if options.lora_alpha is not None:
        config = {**config, "lora_alpha": options.lora_alpha}
    if parts and not config:
        raise FormatError(
            f"{directory} holds LoRA factors but no {_CONFIG} with their lora_alpha; copy it there."
        )
    adapters = adapters_of(parts, config, path)
    check_fits(adapters, weights, directory, directory)
    if config:
        attrs["relora_config"] = config
    return Checkpoint(
        without_tied_names(weights, attrs),
        adapters,
        left_out=(*left_out, *no_pairs),
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
