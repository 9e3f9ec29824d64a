"""Checkpoints of torch.distributed.checkpoint: .metadata and __R_N.distcp (FSDP2, torchtitan)."""

import re
from functools import partial
from pathlib import Path

from dynamics.formats.shared.full_checkpoints import FullCheckpoint, FullCheckpointsFormat
from dynamics.formats.shared.steps import by_step
from dynamics.formats.storage.dcp_tensors import METADATA, dcp_tensors, has_shards
from dynamics.formats.storage.files import children

_STEP = re.compile(r"(?:(?:global_?)?step|iter|iteration|checkpoint|ckpt)?[-_=]?(\d{1,15})")
# Accelerate, and with it the Trainer, puts the model's shards into this folder of a checkpoint-N.
_ACCELERATE = "pytorch_model_fsdp_0"


class DCPFormat(FullCheckpointsFormat):
    """A directory of distributed checkpoints, or one of them."""

    name = "dcp"
    description = (
        "step-N/ or one directory with .metadata and .distcp files (torch.distributed.checkpoint)"
    )

    def recognises(self, path: Path) -> bool:
        """Whether a checkpoint below (or at) `path` has its .metadata."""
        return any((each / METADATA).is_file() for _, each in _directories(path))

    def checkpoints(self, path: Path, root: Path) -> dict[int, FullCheckpoint]:
        """See `FullCheckpointsFormat.checkpoints`."""
        return {
            step: FullCheckpoint(directory, partial(dcp_tensors, directory, root))
            for step, directory in by_step(_directories(path), path).items()
        }


def _directories(path: Path) -> list[tuple[int, Path]]:
    """(step, directory) of each checkpoint at or below `path`."""
    if not path.is_dir():
        return []
    for own in (path, path / _ACCELERATE):
        if (own / METADATA).is_file():
            numbered = _STEP.fullmatch(path.name)
            return [(int(numbered[1]) if numbered else 0, own)]
    numbered_paths = []
    for child in children(path):
        numbered = _STEP.fullmatch(child.name)
        if numbered is None or not child.is_dir():
            continue
        for own in (child, child / _ACCELERATE):
            # A directory with shards but without .metadata counts: its save did not finish, and
            # that is a problem of its step.
            if own.is_dir() and has_shards(own):
                numbered_paths.append((int(numbered[1]), own))
    if not numbered_paths and (path / "checkpoint").is_dir():  # in torchtitan's dump_folder
        return _directories(path / "checkpoint")
    return numbered_paths
