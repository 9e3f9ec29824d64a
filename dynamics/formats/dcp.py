"""Checkpoints of torch.distributed.checkpoint: .metadata and __R_N.distcp (FSDP2, torchtitan)."""

import re
from functools import partial
from pathlib import Path

from dynamics.formats.shared.full_checkpoints import Checkpoint, WeightsRun
from dynamics.formats.shared.steps import by_step
from dynamics.formats.storage.dcp_tensors import METADATA, distributed_tensors
from dynamics.formats.storage.files import children

_STEP = re.compile(r"(?:(?:global_?)?step|iter|iteration|checkpoint|ckpt)?[-_=]?(\d{1,15})")
# Where Accelerate, and with it the Trainer, puts the model's shards into a checkpoint-N.
_ACCELERATE = "pytorch_model_fsdp_0"


class DistributedRun(WeightsRun):
    """A directory of distributed checkpoints, or one of them."""

    format = "dcp"
    description = (
        "step-N/ or one directory with .metadata and .distcp files (torch.distributed.checkpoint)"
    )

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether a checkpoint below (or at) `path` has its .metadata."""
        return any((each / METADATA).is_file() for _, each in _directories(path))

    @staticmethod
    def checkpoints(path: Path, root: Path) -> dict[int, Checkpoint]:
        """See `WeightsRun.checkpoints`."""
        return {
            step: Checkpoint(directory, partial(distributed_tensors, directory, root))
            for step, directory in by_step(_directories(path), path).items()
        }


def _directories(path: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the checkpoints at or below `path`."""
    if not path.is_dir():
        return []
    for own in (path, path / _ACCELERATE):
        if (own / METADATA).is_file():
            numbered = _STEP.fullmatch(path.name)
            return [(int(numbered[1]) if numbered else 0, own)]
    found = []
    for child in children(path):
        numbered = _STEP.fullmatch(child.name)
        if numbered is None or not child.is_dir():
            continue
        for own in (child, child / _ACCELERATE):
            # .metadata is written last: one without it was not finished, and is a problem.
            if own.is_dir() and any(
                each.name == METADATA or each.suffix == ".distcp" for each in children(own)
            ):
                found.append((int(numbered[1]), own))
    if not found and (path / "checkpoint").is_dir():  # torchtitan's folder in its dump_folder
        return _directories(path / "checkpoint")
    return found
