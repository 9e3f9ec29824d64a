"""The recorder as a callback of Lightning's `Trainer`."""

from typing import Any

import torch

from dynamics.errors import require_extra
from dynamics.recordings import StoreLike
from probes.frameworks.attaching import AttachesRecorder
from probes.live.trackers import Loggers
from probes.model.provenance import settings

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise require_extra("lightning", error) from error


class RecorderCallback(AttachesRecorder, Callback):
    """Attaches a `Recorder` when fitting begins and closes it when fitting ends.

    Steps are the `global_step` of Lightning. With several optimizers (manual optimization), steps
    are counted by the last one. A fit that starts from a checkpoint continues the recording there.
    The scalar `loss` is what `training_step` returns, averaged over the micro-batches of a step on
    this rank. Log other values with `callback.recorder.log`. The recording keeps what the module
    and the datamodule saved with `save_hyperparameters()`.

    `if_exists` is "next" by default: a fit that starts at step 0 where there is a recording gets a
    store of its own, run-2.zarr, run-3.zarr, ... The checkpoints say which of them their training
    was recorded to, and a fit that starts from a checkpoint continues that one. Lightning's tuners
    (batch size, learning rate) take all callbacks off while they try, so trials are not recorded.

    Args:
        store: path or URL of the recording, or any zarr Store.
        options: the other arguments of `Recorder`. `live=True` shows live metrics in the loggers
            of the Trainer.

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
        super().__init__(store, **options)
        self._restored: dict[str, Any] = {}
        self._losses: list[torch.Tensor] = []
        self._seen_step = 0

    @property
    def state_key(self) -> str:
        """The key of this recorder in checkpoints; a Trainer may have several recorders."""
        return self._generate_state_key(store=str(self._store))

    def state_dict(self) -> dict[str, Any]:
        """The step and the store, for Lightning's checkpoint."""
        if self.recorder is None:
            return {}
        return {"step": self.recorder.step, "store": self.recorder.store_name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step and the store from the checkpoint from which a fit starts."""
        self._restored = dict(state_dict)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the recording; see `Recorder.attach`.

        Lightning calls this after the strategy has wrapped the model and restored the optimizers.
        """
        several = trainer.world_size > 1 and torch.distributed.is_initialized()
        one = len(trainer.optimizers) == 1
        step = trainer.global_step if one else self._restored.get("step")
        recorder = self._begin(
            trainer.strategy.model,  # with its wrappers, so that the recorder refuses some of them
            trainer.optimizers,
            self._restored.get("store"),
            lambda: Loggers(lambda: trainer.loggers),
            write=trainer.is_global_zero,
            process_group=torch.distributed.group.WORLD if several else None,
            grad_scaler=getattr(trainer.precision_plugin, "scaler", None),
            resume_at=step or None,
            attrs=_hyperparameters(pl_module, getattr(trainer, "datamodule", None)),
        )
        self._restored, self._losses = {}, []
        self._seen_step = 0 if recorder is None else recorder.step

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

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the records before the checkpoint: a fit that starts from it misses none."""
        if self.recorder is not None:
            self.recorder.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the recording."""
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Finish the recording and leave the model as it was."""
        self.close()


def _hyperparameters(*holders: Any) -> dict[str, Any]:
    """What a module and a datamodule saved with `save_hyperparameters()`."""
    given = {name: each for at in holders for name, each in getattr(at, "hparams", {}).items()}
    return {"hyperparameters": settings(given)} if given else {}
