"""DeepSpeed checkpoints: global_stepN/ with model states, and with ZeRO the float32 masters."""

import re
from functools import partial
from pathlib import Path

from dynamics.errors import FormatError
from dynamics.formats.shared.full_checkpoints import FullCheckpoint, FullCheckpointsFormat
from dynamics.formats.shared.hugging_face_files import logged_scalars, model_attrs
from dynamics.formats.shared.steps import by_step, step_inside
from dynamics.formats.storage.deepspeed_tensors import (
    deepspeed_tensors,
    has_model_states,
    model_states,
)
from dynamics.formats.storage.files import children

_STEP = re.compile(r"global_step(\d{1,15})")
_TRAINER = re.compile(r"checkpoint-(\d{1,15})")


class DeepSpeedFormat(FullCheckpointsFormat):
    """A directory of global_stepN/, one of them, or a Trainer's checkpoint-N/ that hold one."""

    name = "deepspeed"
    description = "global_stepN/ with mp_rank_00_model_states.pt or ZeRO partitions (DeepSpeed)"

    def recognises(self, path: Path) -> bool:
        """Whether there is a directory with model states at or below `path`."""
        return bool(_directories(path))

    def checkpoints(self, path: Path, root: Path) -> dict[int, FullCheckpoint]:
        """See `FullCheckpointsFormat.checkpoints`."""
        numbered = [
            (_step_inside(directory, root) if step is None else step, directory)
            for step, directory in _directories(path)
        ]
        return {
            step: _checkpoint(step, directory, root, is_run=directory == path)
            for step, directory in by_step(numbered, path).items()
        }


def _checkpoint(step: int, directory: Path, root: Path, is_run: bool) -> FullCheckpoint:
    tensors = partial(deepspeed_tensors, directory, root)
    if is_run:  # what lies beside the opened directory is not part of the run
        return FullCheckpoint(directory, tensors)
    above = directory.parent
    return FullCheckpoint(
        directory,
        tensors,
        partial(model_attrs, above, root),
        partial(logged_scalars, above, root, step),
    )


def _directories(path: Path) -> list[tuple[int | None, Path]]:
    """(step, directory with model states) at or below `path`; step None: only the files know it."""
    if not path.is_dir():
        return []
    if has_model_states(path):
        numbered = _STEP.fullmatch(path.name)
        return [(int(numbered[1]) if numbered else None, path)]
    if numbered := _TRAINER.fullmatch(path.name):
        inside = _latest(path)
        return [] if inside is None else [(int(numbered[1]), inside)]
    directories: list[tuple[int | None, Path]] = []
    for child in children(path):
        if (numbered := _STEP.fullmatch(child.name)) and has_model_states(child):
            directories.append((int(numbered[1]), child))
        elif (numbered := _TRAINER.fullmatch(child.name)) and child.is_dir():
            inside = _latest(child)
            directories += [] if inside is None else [(int(numbered[1]), inside)]
    latest = None if directories else _latest(path)  # the user chose another tag
    return [(None, latest)] if latest is not None else directories


def _latest(path: Path) -> Path | None:
    """The directory with model states that the file `latest` names, or else the only one."""
    named = path / "latest"
    if named.is_file():
        tag = named.read_bytes()[:256].decode("utf-8", "replace").strip()
        if tag and not set(tag) & set("/\\\0") and tag not in (".", ".."):
            return path / tag if has_model_states(path / tag) else None
    inside = [each for each in children(path) if _STEP.fullmatch(each.name)]
    inside = [each for each in inside if has_model_states(each)]
    return inside[0] if len(inside) == 1 else None


def _step_inside(directory: Path, root: Path) -> int:
    file, states = model_states(directory, root)
    step = step_inside(states.get("global_steps"))
    if step is None:
        raise FormatError(f"{file} has no number global_steps; name its directory global_stepN.")
    return step
