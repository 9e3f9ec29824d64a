"""The recorder as a callback of Lightning's `Trainer`."""

from typing import Any

import torch

from dynamics.errors import require_extra
from dynamics.recordings import StoreLike
from probes.recorder import Recorder

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise require_extra("lightning", error) from error


class RecorderCallback(Callback):
    """Attaches a `Recorder` when fitting begins and closes it when fitting ends.

    Steps are Lightning's `global_step`; with several optimizers (manual optimization) they are
    the steps of the last one. A fit that starts from a checkpoint continues the recording there.
    The loss that `training_step` returns, averaged over the micro-batches of a step on this rank,
    is the scalar `loss`; `callback.recorder.log` takes others.

    Args:
        store: path of the recording, or any zarr Store.
        options: the other arguments of `Recorder`.
    """

    def __init__(self, store: StoreLike, **options: Any):
        self._store = store
        self._options = options
        self._restored_step: int | None = None
        self._losses: list[torch.Tensor] = []
        self._seen_step = 0
        self.recorder: Recorder | None = None

    @property
    def state_key(self) -> str:
        """Tells several recorders of one Trainer apart in its checkpoints."""
        return self._generate_state_key(store=str(self._store))

    def state_dict(self) -> dict[str, Any]:
        """The step, for Lightning's checkpoint."""
        return {} if self.recorder is None else {"step": self.recorder.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step from the checkpoint that a fit starts from."""
        self._restored_step = state_dict.get("step")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the recording, once the strategy has wrapped the model and restored the optimizers.

        See `Recorder.attach`.
        """
        self.close()
        several = trainer.world_size > 1 and torch.distributed.is_initialized()
        one = len(trainer.optimizers) == 1
        step = trainer.global_step if one else self._restored_step
        options: dict[str, Any] = {
            "write": trainer.is_global_zero,
            "process_group": torch.distributed.group.WORLD if several else None,
            "grad_scaler": getattr(trainer.precision_plugin, "scaler", None),
            "resume_at": step or None,
            **self._options,
        }
        # The strategy's model, so that wrappers that cannot be recorded are seen.
        model = trainer.strategy.model
        self.recorder = Recorder(model, trainer.optimizers, self._store, **options).attach()
        self._restored_step, self._losses, self._seen_step = None, [], self.recorder.step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what a gradient scaler skipped, and hand the loss to the record of the step."""
        if self.recorder is None:
            return
        if pl_module.automatic_optimization and isinstance(outputs, dict) and "loss" in outputs:
            self._losses.append(outputs["loss"])
        # With several optimizers global_step is the sum of their steps, which says nothing here.
        if len(trainer.optimizers) == 1 and trainer.global_step > self.recorder.step:
            self.recorder.skip_step()
        if self.recorder.step == self._seen_step:
            return  # more micro-batches follow
        if self._losses:
            # Lightning has divided each by the number of micro-batches.
            self.recorder.log(at=self.recorder.step, loss=torch.stack(self._losses).sum())
        self._losses, self._seen_step = [], self.recorder.step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the recording."""
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Finish the recording, and leave the model as it was found."""
        self.close()

    def close(self) -> None:
        """Finish the recording and leave the model as it was found. Twice is once."""
        if self.recorder is not None:
            recorder, self.recorder = self.recorder, None
            recorder.close()
