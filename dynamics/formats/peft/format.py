"""PEFT LoRA checkpoints: checkpoint-N/ with adapter_config.json, and the base model beside them.

The effective weight is W_base + s·B·A with s = alpha/r, or alpha/sqrt(r) for rsLoRA. PEFT writes
the adapter only. `base_model` says where the base model is looked for. `config` says which adapters
cannot be read because they are more than s·B·A.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.format import Format, OpenOptions
from dynamics.formats.peft.base_model import BaseModels, base_tensors
from dynamics.formats.peft.config import (
    CONFIG,
    adapter_directory,
    check_is_plain,
    has_adapter,
    scaling,
)
from dynamics.formats.shared.checkpoints import Checkpoint, CheckpointsRun
from dynamics.formats.shared.full_checkpoints import with_clean_names
from dynamics.formats.shared.hugging_face_files import logged_scalars, trainer_step
from dynamics.formats.shared.lora_factors import Adapter, check_fits, pair_factors
from dynamics.formats.shared.series import Look, Series, find_series
from dynamics.formats.storage.files import contained, read_json, root_of
from dynamics.formats.storage.model_files import ADAPTER, has_model, model_tensors
from dynamics.formats.storage.tensors import Tensor, floats
from dynamics.runs.run import Run

_PART = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<part>[AB])(?:\.weight)?")
_MERGES = "num_lora_restarts"  # as axolotl's ReLoRA logs it
_EMBEDDING = ".lora_embedding_A"


class PeftFormat(Format):
    """A directory of PEFT LoRA checkpoints, or a single one."""

    name = "peft"
    description = "checkpoint-N/ with adapter_config.json (PEFT LoRA), base model beside it"
    options = ("base", "adapter")

    def recognises(self, path: Path) -> bool:
        """Whether a checkpoint below (or at) `path` has an adapter_config.json."""
        return _series(path) is not None

    def open(self, path: Path, options: OpenOptions) -> Run:
        """See `Format.open`."""
        series = _series(path) or Series({0: path})
        bases = BaseModels(path, series.steps, options.base)
        run = CheckpointsRun(
            path,
            self.name,
            {
                step: series.unless_claimed_twice(
                    step, partial(_open, step, directory, root_of(path), bases, options.adapter)
                )
                for step, directory in series.steps.items()
            },
        )
        run.places = {step: str(each) for step, each in series.steps.items()}
        run.passed_over = series.passed_over
        return run


def _series(path: Path) -> Series | None:
    look = Look(has_adapter, own_step=trainer_step, beside=lambda at: (at / CONFIG).is_file())
    return find_series(path, look)


def _open(
    step: int, directory: Path, root: Path, bases: BaseModels, adapter: str | None
) -> Checkpoint:
    at = adapter_directory(directory, adapter)
    config = read_json(contained(at / CONFIG, root))
    check_is_plain(config, at)
    if not has_model(at, ADAPTER):
        raise FormatError(f"{at} has {CONFIG} but no adapter_model.safetensors; copy it there.")
    adapters, full_modules = _adapters(at, root, config)
    scalars = logged_scalars(directory, root, step)
    merges = scalars.get(_MERGES, 0)
    base = bases.of(step, config, merges)
    model_config = bases.model_config(step, base, config)
    attrs: dict[str, Any] = {"adapter_config": config}
    tensors: dict[str, Tensor] | None = None
    if model_config:
        attrs["config"] = model_config
    if base is not None:
        needed = set(adapters) - set(full_modules)
        tensors = base_tensors(base, bases.root(base.directory), needed, model_config)
        tensors |= full_modules
        check_fits(adapters, tensors, base.directory, at)
    return Checkpoint(
        tensors,
        adapters,
        is_merged=base is not None and base.is_merged,
        no_base="" if base else bases.why_none(step, config, merges),
        attrs=attrs,
        scalars=scalars,
    )


def _adapters(
    directory: Path, root: Path, config: dict[str, Any]
) -> tuple[dict[str, Adapter], dict[str, Tensor]]:
    """(Clean name -> adapter, clean name -> full weight that was saved beside the adapters).

    PEFT saves the modules that it trained in full (`modules_to_save`), and some embeddings.
    """
    tensors = with_clean_names(floats(model_tensors(directory, root, ADAPTER)), directory)
    parts, full_modules = pair_factors(tensors, _PART, directory)
    adapters: dict[str, Adapter] = {}
    for name, each in parts.items():
        # Embeddings and GPT-2's Conv1D store (in, out).
        embedding = name.removesuffix(".weight") + _EMBEDDING in tensors
        transposed = embedding or bool(config.get("fan_in_fan_out"))
        scale = scaling(config, name.removesuffix(".weight"), rank=each["A"].shape[0])
        adapters[name] = Adapter(each["A"], each["B"], scale, transposed)
    if not adapters:
        raise FormatError(
            f"{directory} holds no LoRA factors of matrices; nothing can be measured."
        )
    return adapters, full_modules
