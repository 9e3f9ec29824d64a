"""Lightning checkpoints: .ckpt files, or .ckpt directories of its FSDP and DeepSpeed strategies.

Each holds `global_step` (optimizer steps done) and the state dict of the LightningModule. The
names in it begin with the attribute that holds the model. Source: lightning/pytorch/trainer/
connectors/checkpoint_connector.py and strategies/{fsdp,model_parallel,deepspeed}.py.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.errors import FormatError
from dynamics.formats.shared.found import Found
from dynamics.formats.shared.full_checkpoints import (
    FullCheckpoint,
    FullCheckpointsFormat,
    OtherKindError,
    found_in_files,
)
from dynamics.formats.shared.steps import step_in_name, step_inside
from dynamics.formats.storage.dcp_tensors import dcp_tensors, has_shards
from dynamics.formats.storage.deepspeed_tensors import deepspeed_tensors, has_model_states
from dynamics.formats.storage.files import Entry, children, entries, is_directory, is_remote
from dynamics.formats.storage.tensors import Tensor
from dynamics.formats.storage.torch_files import tensors_of, torch_file
from dynamics.formats.storage.unpickling import json_like

_SUFFIX = ".ckpt"
_VERSION = "pytorch-lightning_version"
# Beside shards, the strategies put the checkpoint without its weights and optimizer here.
_META = "meta.pt"
_DEEPSPEED = "checkpoint"
# lightning_logs/version_N/checkpoints, or project/run/checkpoints of its loggers.
_DEEPEST, _MOST_DIRECTORIES, _MOST_REMOTE = 3, 100, 2


class LightningFormat(FullCheckpointsFormat):
    """A directory of .ckpt, one .ckpt, or a directory with one such directory below."""

    name = "lightning"
    description = ".ckpt files, or lightning_logs/version_N/ with them (Lightning)"
    single_files = True

    def recognises(self, path: Path) -> bool:
        """Whether there are .ckpt, and the first is Lightning's or cannot be read."""
        holders = _holders(path)
        if not holders:
            return False
        first = _checkpoints_in(holders[0])[0]
        if first.is_dir():
            return (first / _META).is_file() or has_model_states(first / _DEEPSPEED)
        try:
            saved = torch_file(first, first)
        except FormatError:
            return True
        return isinstance(saved, Mapping) and "state_dict" in saved

    def places(self, path: Path) -> dict[Path, int | None]:
        """See `CheckpointsFormat.places`."""
        files = [each for holder in _holders(path) for each in _checkpoints_in(holder)]
        return {each: step_in_name(each.stem) for each in files}

    def holds_one(self, path: Path) -> bool:
        """See `CheckpointsFormat.holds_one`."""
        return _is_checkpoint(Entry(path.name, path.parent, is_directory(path)))

    def checkpoints(self, path: Path, root: Path) -> Found:
        """See `FullCheckpointsFormat.checkpoints`; the files are opened, as the step is in them."""
        holders = _holders(path)
        if len(holders) != 1:
            listed = ", ".join(str(each).removeprefix(str(path)).strip("/") for each in holders[:6])
            raise FormatError(
                f"{path} holds {len(holders)} directories with {_SUFFIX} files"
                + (f" ({listed}); give one of them." if holders else ".")
            )
        files = _checkpoints_in(holders[0])
        return found_in_files(files, partial(_opened, root=root), holders[0])


def _is_checkpoint(entry: Entry) -> bool:
    if not entry.name.endswith(_SUFFIX) or not entry.is_dir:
        return entry.name.endswith(_SUFFIX)
    # Shards without .metadata count too: their save did not finish, a problem of that step.
    return has_shards(entry.path) or has_model_states(entry.path / _DEEPSPEED)


def _checkpoints_in(path: Path) -> list[Path]:
    """The .ckpt in a directory, or the path itself if it is one."""
    is_dir = path.is_dir()
    if _is_checkpoint(Entry(path.name, path.parent, is_dir)):
        return [path]
    return [each.path for each in entries(path) if _is_checkpoint(each)] if is_dir else []


def _holders(path: Path) -> list[Path]:
    """The directories with .ckpt, at or below `path`; `path` itself where it is a .ckpt.

    The search goes no further below such a directory, and no deeper than loggers put them.
    """
    holders: list[Path] = []
    level = [path]
    for _ in range(1 + _DEEPEST):
        below: list[Path] = []
        for directory in level[: _MOST_REMOTE if is_remote(path) else _MOST_DIRECTORIES]:
            try:
                if _checkpoints_in(directory):
                    holders.append(directory)
                elif directory.is_dir():
                    inside = (e for e in entries(directory) if not e.name.startswith("."))
                    below += [each.path for each in inside if each.is_dir]
            except FormatError:  # a directory that may not be listed
                if directory == path:
                    raise
        level = below
    return holders


def _opened(path: Path, root: Path) -> tuple[int, FullCheckpoint]:
    tensors: Any
    if not path.is_dir():
        saved = torch_file(path, root)
        tensors = partial(_state_dict, saved, path)
    elif has_shards(path):
        saved = torch_file(path / _META, root)
        tensors = partial(dcp_tensors, path, root)
    else:
        states = (each for each in children(path / _DEEPSPEED) if "model_states" in each.name)
        saved = torch_file(next(states), root)
        tensors = partial(deepspeed_tensors, path / _DEEPSPEED, root)
    step = step_inside(saved.get("global_step")) if isinstance(saved, Mapping) else None
    if step is None:
        raise OtherKindError(
            f"{path} has no number global_step, so it is not a checkpoint of Lightning; move it "
            "elsewhere, or give its format (--format)."
        )
    epoch = step_inside(saved.get("epoch"))
    scalars = {} if epoch is None else {"epoch": float(epoch)}
    return step, FullCheckpoint(path, tensors, partial(_attrs, saved), scalars.copy)


def _state_dict(saved: Mapping[str, Any], path: Path) -> Mapping[str, Tensor]:
    return tensors_of(saved.get("state_dict"), f"{path}: 'state_dict'")


def _attrs(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters are the config: save_hyperparameters() stores the model's sizes there."""
    given = {"config": saved.get("hyper_parameters"), "lightning_version": saved.get(_VERSION)}
    return {key: json_like(value) for key, value in given.items() if json_like(value)}
