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

    Steps are the `global_step` of Lightning. With several optimizers (manual optimization), steps
    are counted by the last one. A fit that starts from a checkpoint continues the recording there.
    The scalar `loss` is what `training_step` returns, averaged over the micro-batches of a step on
    this rank. Log other values with `callback.recorder.log`.

    Args:
        store: path or URL of the recording, or any zarr Store.
        options: the other arguments of `Recorder`.

    Example:
        >>> import lightning.pytorch as pl
        >>> from probes.frameworks.lightning import RecorderCallback
        >>> class Module(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up_proj = torch.nn.Linear(4, 2)
        ...     def training_step(self, batch, index):
        ...         return self.up_proj(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> callback = RecorderCallback("lightning.zarr", every=2)
        >>> trainer = pl.Trainer(
        ...     max_steps=4, accelerator="cpu", callbacks=[callback], logger=False,
        ...     enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        ... )
        >>> trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2))
        >>> run = dy.open_run("lightning.zarr")
        >>> run.steps.tolist(), list(run.matrices)
        ([0, 2, 4], ['up_proj.weight'])
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
        """The key of this recorder in checkpoints; a Trainer may have several recorders."""
        return self._generate_state_key(store=str(self._store))

    def state_dict(self) -> dict[str, Any]:
        """The step, for Lightning's checkpoint."""
        return {} if self.recorder is None else {"step": self.recorder.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step from the checkpoint from which a fit starts."""
        self._restored_step = state_dict.get("step")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the recording; see `Recorder.attach`.

        Lightning calls this after the strategy has wrapped the model and restored the optimizers.
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
        # The model of the strategy, so that the recorder refuses wrappers it cannot record.
        model = trainer.strategy.model
        self.recorder = Recorder(model, trainer.optimizers, self._store, **options).attach()
        self._restored_step, self._losses, self._seen_step = None, [], self.recorder.step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step that a gradient scaler skipped; hand the loss to the record of the step."""
        if self.recorder is None:
            return
        if pl_module.automatic_optimization and isinstance(outputs, dict) and "loss" in outputs:
            self._losses.append(outputs["loss"])
        # With several optimizers, global_step is the sum of their steps and shows no skipped one.
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
        """Finish the recording and leave the model as it was."""
        self.close()

    def close(self) -> None:
        """Finish the recording and leave the model as it was. Safe to call twice."""
        if self.recorder is not None:
            recorder, self.recorder = self.recorder, None
            recorder.close()
