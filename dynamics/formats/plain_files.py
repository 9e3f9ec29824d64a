"""State dicts in single files: .pt, .pth, .bin, .safetensors or .npz, the step in their names."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.shared.full_checkpoints import FullCheckpoint, FullCheckpointsFormat
from dynamics.formats.shared.steps import by_step, step_in_name
from dynamics.formats.storage.files import children
from dynamics.formats.storage.npz_files import npz_tensors
from dynamics.formats.storage.safetensors_files import safetensors_tensors
from dynamics.formats.storage.tensors import StoredTensor, Tensor
from dynamics.formats.storage.torch_files import tensors_of, torch_file
from dynamics.formats.storage.unpickling import Inert

_PICKLED = (".pt", ".pth", ".bin")
_SUFFIXES = (*_PICKLED, ".safetensors", ".npz")
# Trainers save these files beside a model.
_NO_MODEL = re.compile(
    r"(?:^|[-_.])(?:optimizer|optim|scheduler|sampler|scaler|rng|random_states|training_args)"
    r"(?:[-_.\d]|$)",
    re.IGNORECASE,
)
# Parts of one model: Hugging Face's shards, and those of Llama as Meta released it.
_PART = re.compile(r".*-\d{5}-of-\d{5}|consolidated\.\d\d")
_MODELS = ("model", "state_dict", "model_state_dict", "module")


class PlainFilesFormat(FullCheckpointsFormat):
    """A directory of state dicts with a step in their names, or one of them."""

    name = "files"
    description = "files like model_step100.safetensors, .pt, .pth, .bin or .npz with a state dict"
    single_files = True

    def recognises(self, path: Path) -> bool:
        """Whether there are files whose names are those of state dicts."""
        return bool(_files(path))

    def checkpoints(self, path: Path, root: Path) -> dict[int, FullCheckpoint]:
        """See `FullCheckpointsFormat.checkpoints`."""
        files = _files(path)
        if not files:
            raise FormatError(
                f"{path} holds no file with a model; its name would end in {', '.join(_SUFFIXES)}."
            )
        parts = [file for file in files if _PART.fullmatch(file.stem)]
        if parts and len(files) > 1:
            raise FormatError(
                f"{path} holds {parts[0].name}, a part of a model, but not the index that puts "
                "the parts together; copy the index there, or save the model in one file."
            )
        steps = []
        for file in files:
            step = None if _PART.fullmatch(file.stem) else step_in_name(file.stem)
            if step is None and len(files) > 1:
                raise FormatError(
                    f"{path} holds {len(files)} files, and the name {file.name} contains no step; "
                    "rename it like model_step100, move it elsewhere, or give it alone."
                )
            steps.append((step or 0, file))
        return {
            step: FullCheckpoint(file, partial(file_tensors, file, root))
            for step, file in by_step(steps, path).items()
        }


def _files(path: Path) -> list[Path]:
    candidates = children(path) if path.is_dir() else [path]
    return [
        each
        for each in candidates
        if each.suffix in _SUFFIXES
        and not each.name.startswith(".")
        and (each == path or not _NO_MODEL.search(each.stem))
        and each.is_file()
    ]


def file_tensors(path: Path, root: Path) -> Mapping[str, Tensor]:
    """Name -> tensor of the state dict in a file.

    Raises:
        FormatError: it is damaged, or it is not clear which of its entries is the model.
    """
    if path.suffix == ".npz":
        return npz_tensors(path, root)
    if path.suffix == ".safetensors":
        return safetensors_tensors(path, root)
    saved = torch_file(path, root)
    if not isinstance(saved, Mapping):
        return tensors_of(saved, str(path))
    at_top = any(isinstance(value, StoredTensor) and value.shape for value in saved.values())
    named = [name for name in _MODELS if isinstance(saved.get(name), Mapping | Inert)]
    if len(named) + at_top > 1:
        listed = " and ".join([*["the top"] * at_top, *map(repr, named)])
        raise FormatError(f"{path} has tensors in {listed}; save the model's state dict alone.")
    if named:
        return tensors_of(saved[named[0]], f"{path}: {named[0]!r}")
    if not at_top:
        listed = ", ".join(repr(str(key)[:40]) for key in list(saved)[:8]) or "nothing"
        raise FormatError(
            f"{path} has no tensors at its top and no state dict under {', '.join(_MODELS)}; it "
            f"has {listed}. Save the model's state dict alone."
        )
    return tensors_of(_top(saved), str(path))


def _top(saved: Mapping[Any, Any]) -> dict[Any, Any]:
    """The entries that are not nested: without the optimizer's state beside a model's tensors."""
    return {key: value for key, value in saved.items() if not isinstance(value, Mapping)}
