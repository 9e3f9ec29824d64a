"""Hugging Face checkpoints: a directory with model.safetensors or pytorch_model.bin for each step.

At the end, the Trainer saves one more model beside the checkpoints. Only a trainer_state.json
beside it says which step it belongs to. Without that file the final model is passed over.
"""

from pathlib import Path

from dynamics.formats.shared.full_checkpoints import FullCheckpoint, SeriesFormat
from dynamics.formats.shared.hugging_face_files import model_checkpoint, trainer_step
from dynamics.formats.storage.model_files import has_model


class HuggingFaceFormat(SeriesFormat):
    """The output directory of a `Trainer` or of another script, or a directory with one model."""

    name = "checkpoints"
    description = (
        "a directory with model.safetensors or pytorch_model.bin, sharded or not, for each step "
        "(Hugging Face: checkpoint-N/)"
    )

    def holds(self, path: Path) -> bool:
        """Whether a directory holds a model."""
        return has_model(path)

    def checkpoint(self, path: Path, root: Path, step: int) -> FullCheckpoint:
        """See `SeriesFormat.checkpoint`."""
        return model_checkpoint(path, root, step)

    def own_step(self, path: Path) -> int | None:
        """The global_step in trainer_state.json."""
        return trainer_step(path)
