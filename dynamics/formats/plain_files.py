"""Models in single files: .pt, .pth, .bin, .safetensors, .npz or .gguf, and directories with one.

nanochat saves model_N.pt, litgpt step-N/lit_model.pth, OLMo stepN-unsharded/model.pt, Megatron
iter_N/mp_rank_00/model_optim_rng.pt. The step is in the name, else in the file.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.quantised.gguf import gguf_tensors
from dynamics.formats.shared.found import Found
from dynamics.formats.shared.full_checkpoints import FullCheckpoint, SeriesFormat
from dynamics.formats.shared.look import Look, Series, places_of
from dynamics.formats.shared.series import find_series
from dynamics.formats.shared.steps import step_in_name, step_inside
from dynamics.formats.storage.files import entries, is_directory
from dynamics.formats.storage.model_files import ADAPTER, MODEL, has_model
from dynamics.formats.storage.npz_files import npz_tensors
from dynamics.formats.storage.safetensors_files import safetensors_tensors
from dynamics.formats.storage.tensors import StoredTensor, Tensor, UnreadTensor
from dynamics.formats.storage.torch_files import tensors_of, torch_file
from dynamics.formats.storage.unpickling import Inert

_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
_SUFFIXES = (*_PICKLED, ".safetensors", ".npz", ".gguf")
# Trainers save these files beside a model.
_NO_MODEL = re.compile(
    r"(?:^|[-_.])(?:optimizer|optim|opt|scheduler|sampler|scaler|rng|random_states|training_args"
    r"|dataloader|recipe_state|train(?:er|ing)?_state)(?:[-_.\d]|$)|^train(?:er)?$",
    re.IGNORECASE,
)
# What the file of the model is called, beside others; OLMo's state of its trainer; Megatron's file,
# one in the directory of each rank.
_USUAL = ("model", "lit_model", "weights", "state_dict", "model_state_dict", "checkpoint", "ckpt")
_TRAIN = "train.pt"
_RANK, _MEGATRON = re.compile(r"mp_rank_\d\d.*"), "model_optim_rng.pt"
_MOST_FILES = 1000
# Keys of the count of steps in a checkpoint, those that count optimizer steps first.
_STEPS = ("global_step", "step", "step_count", "iteration", "iter_num", "iter")
# Parts of one model: Hugging Face's shards, those of Llama as Meta released it, and the second and
# further models that Accelerate saves into one checkpoint.
_PART = re.compile(r".*-\d{5}-of-\d{5}|consolidated\.\d\d|pytorch_model_\d+")
_MODELS = ("model", "state_dict", "model_state_dict", "module")
_NESTED = "state"  # where Composer keeps all that trains


class PlainFilesFormat(SeriesFormat):
    """State dicts with a step in their names or in that of their directories, or one of them."""

    name = "files"
    description = (
        "files like model_step100.safetensors, .pt, .pth, .bin, .npz or .gguf with a model, or a "
        "directory with one of them for each step (litgpt, OLMo, Megatron)"
    )
    single_files = True
    suffixes = _SUFFIXES

    def look(self) -> Look:
        """See `SeriesFormat.look`. A lone file beside a series of files belongs to it."""
        return Look(self.holds, self.suffixes, self.own_step, beside=lambda _: False)

    def series(self, path: Path) -> Series | None:
        """See `CheckpointsFormat.series`. What is a checkpoint of Hugging Face counts last."""
        return self._own_series(path) or find_series(path, self.look())

    def places(self, path: Path) -> dict[Path, int | None]:
        """See `CheckpointsFormat.places`."""
        return places_of(self._own_series(path))

    def holds_one(self, path: Path) -> bool:
        """See `CheckpointsFormat.holds_one`."""
        return super().holds_one(path) and self._holds_no_other(path)

    def _own_series(self, path: Path) -> Series | None:
        return find_series(path, replace(self.look(), holds=self._holds_no_other))

    def _holds_no_other(self, path: Path) -> bool:
        if path.name in (*MODEL, *ADAPTER) or not self.holds(path):
            return False
        return not (is_directory(path) and (has_model(path) or has_model(path, ADAPTER)))

    def recognises(self, path: Path) -> bool:
        """Whether there are files whose names are those of state dicts."""
        return path.name.endswith(_SUFFIXES) if not path.is_dir() else super().recognises(path)

    def holds(self, path: Path) -> bool:
        """Whether a file has such a name, or a directory holds one model in such files."""
        if is_directory(path):
            return bool(_files(path))
        return _may_hold_a_model(path.name) and not _PART.fullmatch(path.stem)

    def checkpoints(self, path: Path, root: Path) -> Found:
        """See `FullCheckpointsFormat.checkpoints`."""
        if path.is_dir():
            return super().checkpoints(path, root)
        named = None if _PART.fullmatch(path.stem) else step_in_name(path.stem)
        step = self.own_step(path) if named is None else named
        checkpoint = self.checkpoint(path, root, step or 0)
        return Found({step or 0: checkpoint}, is_guess=step is None)

    def checkpoint(self, path: Path, root: Path, step: int) -> FullCheckpoint:
        """See `SeriesFormat.checkpoint`."""
        return FullCheckpoint(path, partial(_tensors_at, path, root))

    def own_step(self, path: Path) -> int | None:
        """The step that stands beside the state dict, or in the trainer's state beside its file."""
        if path.is_dir():
            train = path / _TRAIN
            path = train if train.is_file() else _model_file(path)
        if not path.name.endswith(_PICKLED):
            return None
        saved = torch_file(path, path)
        steps = (
            [step_inside(saved.get(key)) for key in _STEPS] if isinstance(saved, Mapping) else []
        )
        return next((step for step in steps if step is not None), None)


def _may_hold_a_model(name: str) -> bool:
    suffix = next((each for each in _SUFFIXES if name.endswith(each)), name)
    stem = name.removesuffix(suffix)
    return bool(stem) and not _NO_MODEL.search(stem)


def _files(directory: Path) -> list[Path]:
    """The files of a directory that may hold its model, or a part of it."""
    listed = [each for each in entries(directory) if not each.name.startswith(".")]
    named = [each for each in listed if not each.is_dir and _may_hold_a_model(each.name)]
    if len(named) > _MOST_FILES:  # a folder of many checkpoints
        return []
    files = [each.path for each in named]
    if not files:  # Megatron's ranks have directories of their own
        ranks = [each for each in listed if _RANK.fullmatch(each.name) and each.is_dir]
        files = [each.path / _MEGATRON for each in ranks if (each.path / _MEGATRON).is_file()]
    if len(files) > 1:
        usual = [each for each in files if each.stem in _USUAL]
        parts = [each for each in files if _PART.fullmatch(each.stem) or each.name == _MEGATRON]
        return usual if len(usual) == 1 else parts
    return files


def _model_file(directory: Path) -> Path:
    """The one file of a directory that holds its model.

    Raises:
        FormatError: there is none, or there are several.
    """
    files = _files(directory)
    if not files:
        raise FormatError(
            f"{directory} holds no file with a model; its name would end in {', '.join(_SUFFIXES)}."
        )
    if len(files) > 1 and files[0].name == _MEGATRON:
        raise FormatError(
            f"{directory} holds the parts of a model that was spread over {len(files)} ranks "
            f"({files[0].parent.name}, ...); such parts are not put together here. Convert them to "
            "one model first."
        )
    if len(files) > 1:
        raise FormatError(
            f"{directory} holds {files[0].name}, a part of a model, but not the index that puts "
            "the parts together; copy the index there, or save the model in one file."
        )
    return files[0]


def _tensors_at(path: Path, root: Path) -> Mapping[str, Tensor]:
    return file_tensors(_model_file(path) if path.is_dir() else path, root)


def file_tensors(path: Path, root: Path) -> Mapping[str, Tensor]:
    """Name -> tensor of the state dict in a file.

    Raises:
        FormatError: it is damaged, or it is not clear which of its entries is the model.
        DynamicsError: it needs a package that is not installed.
    """
    if path.suffix == ".npz":
        return npz_tensors(path, root)
    if path.suffix == ".gguf":
        return gguf_tensors(path, root)
    if path.suffix == ".safetensors":
        return safetensors_tensors(path, root)
    saved = torch_file(path, root)
    if not isinstance(saved, Mapping):
        return tensors_of(saved, str(path))
    nested = saved.get(_NESTED)
    if isinstance(nested, Mapping) and isinstance(nested.get("model"), Mapping):
        saved = nested
    at_top = {
        str(name): value
        for name, value in saved.items()
        if isinstance(value, StoredTensor | UnreadTensor) and value.shape
    }
    named = [name for name in _MODELS if isinstance(saved.get(name), Mapping | Inert)]
    if len(named) > 1:
        listed = " and ".join(map(repr, named))
        raise FormatError(f"{path} has tensors in {listed}; save the model's state dict alone.")
    if named:
        model = tensors_of(saved[named[0]], f"{path}: {named[0]!r}")
        others = {
            name: UnreadTensor(each.shape, f"beside the state dict {named[0]!r}")
            for name, each in at_top.items()
        }
        return {**others, **_copies(saved, named[0], model), **model}
    if not at_top:
        listed = ", ".join(repr(str(key)[:40]) for key in list(saved)[:8]) or "nothing"
        raise FormatError(
            f"{path} has no tensors at its top and no state dict under {', '.join(_MODELS)}; it "
            f"has {listed}. Save the model's state dict alone."
        )
    return tensors_of(_top(saved), str(path))


def _copies(
    saved: Mapping[Any, Any], chosen: str, model: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of other state dicts of the same model, such as its moving average: not read."""
    found: dict[str, Tensor] = {}
    for key, value in saved.items():
        if key == chosen or not isinstance(value, Mapping):
            continue
        alike = {name: each for name, each in value.items() if name in model}
        if 2 * len(alike) > len(model):
            reason = f"of a second state dict of the model, {str(key)[:40]!r}"
            tensors = {n: each for n, each in alike.items() if isinstance(each, StoredTensor)}
            found |= {f"{key}.{n}": UnreadTensor(each.shape, reason) for n, each in tensors.items()}
    return found


def _top(saved: Mapping[Any, Any]) -> dict[Any, Any]:
    """The entries that are not nested: without the optimizer's state beside a model's tensors."""
    return {key: value for key, value in saved.items() if not isinstance(value, Mapping)}
