"""Checkpoints of torch.distributed.checkpoint: .metadata and __R_N.distcp (FSDP2, torchtitan)."""

from functools import partial
from pathlib import Path

from dynamics.formats.shared.full_checkpoints import FullCheckpoint, SeriesFormat
from dynamics.formats.storage.dcp_tensors import dcp_tensors, has_shards
from dynamics.formats.storage.files import is_directory

# Accelerate, and with it the Trainer, puts the model's shards into this folder of a checkpoint-N.
_ACCELERATE = "pytorch_model_fsdp_0"


class DCPFormat(SeriesFormat):
    """A directory of distributed checkpoints, or one of them."""

    name = "dcp"
    description = (
        "a directory with .metadata and .distcp files for each step (torch.distributed.checkpoint)"
    )

    def holds(self, path: Path) -> bool:
        """Whether a directory holds shards. Without .metadata their save did not finish."""
        return is_directory(path) and has_shards(_shards_of(path))

    def checkpoint(self, path: Path, root: Path, step: int) -> FullCheckpoint:
        """See `SeriesFormat.checkpoint`."""
        at = _shards_of(path)
        return FullCheckpoint(at, partial(dcp_tensors, at, root))


def _shards_of(path: Path) -> Path:
    """The directory of the model's shards in a checkpoint."""
    own = path / _ACCELERATE
    return own if own.is_dir() else path
