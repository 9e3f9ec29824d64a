"""Hugging Face checkpoints: checkpoint-N/ of the Trainer, or one directory with a model.

At the end, the Trainer saves one more model beside the checkpoints. Only a trainer_state.json
beside it says which step it belongs to. Without that file the final model is left out.
"""

from pathlib import Path

from dynamics.formats.shared.full_checkpoints import FullCheckpoint, FullCheckpointsFormat
from dynamics.formats.shared.hugging_face_files import checkpoint_directories, model_checkpoint
from dynamics.formats.storage.model_files import has_model


class HuggingFaceFormat(FullCheckpointsFormat):
    """The output directory of a `Trainer`, or a directory with one model."""

    name = "checkpoints"
    description = "checkpoint-N/ or one directory with model.safetensors or pytorch_model.bin, sharded or not (Hugging Face)"  # noqa: E501

    def recognises(self, path: Path) -> bool:
        """Whether a checkpoint below (or at) `path` holds a model."""
        return any(has_model(each) for each in checkpoint_directories(path).values())

    def checkpoints(self, path: Path, root: Path) -> dict[int, FullCheckpoint]:
        """See `FullCheckpointsFormat.checkpoints`."""
        return {
            step: model_checkpoint(directory, root, step)
            for step, directory in checkpoint_directories(path).items()
        }
