"""PEFT LoRA checkpoints: checkpoint-N/ with adapter_config.json, and the base model beside them.

The effective weight is W_base + s·B·A with s = alpha/r, alpha/sqrt(r) for rsLoRA. PEFT writes the
adapter only; `peft_base` says where the base model is looked for, and `peft_config` which adapters
are refused because they are more than s·B·A.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.checkpoints import checkpoint_directories, logged
from dynamics.formats.peft.base_model import Bases, base_tensors
from dynamics.formats.peft.config import (
    CONFIG,
    adapter_directory,
    check_is_plain,
    has_adapter,
    scaling,
)
from dynamics.formats.shared.adapted_checkpoints import AdaptedCheckpoint, AdaptedRun
from dynamics.formats.shared.full_checkpoints import cleaned
from dynamics.formats.shared.lora_factors import Adapter, check_fits, paired
from dynamics.formats.storage.files import contained, read_json, root_of
from dynamics.formats.storage.model_files import ADAPTER, has_model, model_tensors
from dynamics.formats.storage.tensors import Tensor

_PART = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<part>[AB])(?:\.weight)?")
_MERGES = "num_lora_restarts"  # as axolotl's ReLoRA logs it
_EMBEDDING = ".lora_embedding_A"


class PeftAdaptersRun(AdaptedRun):
    """A directory of PEFT LoRA checkpoints, or a single one."""

    format = "peft"
    description = "checkpoint-N/ with adapter_config.json (PEFT LoRA), base model beside it"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a checkpoint below (or at) `path` has an adapter_config.json."""
        return any(map(has_adapter, checkpoint_directories(path, has_adapter).values()))

    def __init__(self, path: Path, base: Path | None = None, adapter: str | None = None):
        directories = checkpoint_directories(path, has_adapter)
        bases = Bases(path, directories, base)
        super().__init__(
            path,
            {
                step: partial(_open, step, directory, root_of(path), bases, adapter)
                for step, directory in directories.items()
            },
        )


def _open(
    step: int, directory: Path, root: Path, bases: Bases, adapter: str | None
) -> AdaptedCheckpoint:
    at = adapter_directory(directory, adapter)
    config = read_json(contained(at / CONFIG, root))
    check_is_plain(config, at)
    if not has_model(at, ADAPTER):
        raise FormatError(f"{at} has {CONFIG} but no adapter_model.safetensors.")
    adapters, saved = _adapters(at, root, config)
    scalars = logged(directory, root, step)
    merges = scalars.get(_MERGES, 0)
    found = bases.of(step, config, merges)
    model_config = bases.model_config(step, found, config)
    attrs: dict[str, Any] = {"adapter_config": config}
    tensors: dict[str, Tensor] | None = None
    if model_config:
        attrs["config"] = model_config
    if found is not None:
        needed = set(adapters) - set(saved)
        tensors = base_tensors(found, bases.root(found.directory), needed, model_config)
        tensors |= saved  # modules that PEFT trained in full, and embeddings that it saved along
        check_fits(adapters, tensors, found.directory, at)
    return AdaptedCheckpoint(
        at,
        adapters,
        tensors,
        is_merged=found is not None and found.is_merged,
        no_base="" if found else bases.why_none(step, config, merges),
        attrs=attrs,
        scalars=scalars,
    )


def _adapters(
    directory: Path, root: Path, config: dict[str, Any]
) -> tuple[dict[str, Adapter], dict[str, Tensor]]:
    """(Clean name -> adapter, clean name -> module that was trained in full)."""
    tensors = cleaned(model_tensors(directory, root, ADAPTER), directory)
    parts, saved = paired(tensors, _PART, directory)
    adapters: dict[str, Adapter] = {}
    for name, each in parts.items():
        # Embeddings and GPT-2's Conv1D store (in, out).
        embedding = name.removesuffix(".weight") + _EMBEDDING in tensors
        transposed = embedding or bool(config.get("fan_in_fan_out"))
        scale = scaling(config, name.removesuffix(".weight"), rank=each["A"].shape[0])
        adapters[name] = Adapter(each["A"], each["B"], scale, transposed)
    if not adapters:
        raise FormatError(f"{directory} holds no LoRA factors of matrices.")
    return adapters, saved
