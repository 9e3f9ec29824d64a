"""nanoGPT checkpoints: ckpt.pt with the model, its sizes and the iteration (karpathy/nanoGPT).

train.py overwrites one ckpt.pt. To keep several, a user gives each its own name, so all `.pt` files
of a directory are read. A checkpoint is saved before the optimizer step of its iteration:
`iter_num` is the number of steps done.
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
from dynamics.formats.storage.files import entries
from dynamics.formats.storage.tensors import StoredTensor
from dynamics.formats.storage.torch_files import tensors_of, torch_file
from dynamics.formats.storage.unpickling import json_like

_OWN = "ckpt.pt"
_MOST_LOOKED_AT = 3
_KEYS = {"model", "model_args", "iter_num"}


class NanoGPTFormat(FullCheckpointsFormat):
    """A nanoGPT `out_dir`, or one of its files."""

    name = "nanogpt"
    description = "ckpt.pt, or several .pt of its kind (nanoGPT)"
    single_files = True

    def recognises(self, path: Path) -> bool:
        """Whether ckpt.pt, or the first .pt that can be read, has what nanoGPT's train.py saves."""
        for file in sorted(_files(path), key=lambda each: each.name != _OWN)[:_MOST_LOOKED_AT]:
            try:
                return _is_nanogpt(torch_file(file, file))
            except FormatError:
                continue
        return False

    def places(self, path: Path) -> dict[Path, int | None]:
        """See `CheckpointsFormat.places`."""
        return {each: step_in_name(each.stem) for each in _files(path)}

    def checkpoints(self, path: Path, root: Path) -> Found:
        """See `FullCheckpointsFormat.checkpoints`; the files are opened, as the step is in them."""
        return found_in_files(_files(path), partial(_opened, root=root), path)


def _opened(file: Path, root: Path) -> tuple[int, FullCheckpoint]:
    saved = torch_file(file, root)
    step = step_inside(saved["iter_num"]) if _is_nanogpt(saved) else None
    if step is None:
        raise OtherKindError(
            f"{file} is not a checkpoint of nanoGPT, which has the keys {sorted(_KEYS)}; move it "
            "elsewhere."
        )
    return step, FullCheckpoint(
        file,
        partial(tensors_of, saved["model"], f"{file}: 'model'"),
        partial(_attrs, saved),
        partial(_scalars, saved),
    )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.suffix == ".pt" else []
    files = [each for each in entries(path) if each.name.endswith(".pt") and not each.is_dir]
    return [each.path for each in files if not each.name.startswith(".")]


def _is_nanogpt(saved: Any) -> bool:
    return isinstance(saved, Mapping) and set(saved) >= _KEYS


def _attrs(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {"config": json_like(saved["model_args"]), "training": json_like(saved.get("config"))}


def _scalars(saved: Mapping[str, Any]) -> dict[str, float]:
    loss = saved.get("best_val_loss")
    if isinstance(loss, StoredTensor) and loss.shape == ():  # a tensor of one number
        loss = float(loss.read())
    if isinstance(loss, bool) or not isinstance(loss, int | float):
        return {}
    return {"best_val_loss": float(loss)}
