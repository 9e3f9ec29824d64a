"""The recorder as a callback of the Hugging Face `Trainer`."""

from functools import partial
from typing import Any

import torch

from dynamics.errors import require_extra
from dynamics.recordings import name_of
from probes.frameworks.attaching import AttachesRecorder
from probes.model.provenance import settings

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from probes.frameworks.hf_reports import TrainerReports
except ImportError as error:
    raise require_extra("relora", error) from error

# What the Trainer logs about one step; its other values are sums over the run.
_SCALARS = ("loss", "eval_loss", "grad_norm")
# Where checkpoints say which store their training was recorded to.
_NOTED = "learning-dynamics recordings"


class RecorderCallback(AttachesRecorder, TrainerCallback):
    """Attaches a `Recorder` when training begins and closes it when training ends.

    A training that starts from a checkpoint continues the recording at the step of the checkpoint.
    The loss, gradient norm and evaluation loss that the Trainer logs become scalars of the record
    of the same step, so choose `logging_steps` that divide `every`. All processes help to average
    the gradients of frozen weights; the main process records.

    `if_exists` is "next" by default: a second `train()`, a restart with a smaller batch
    (`auto_find_batch_size`) and each trial of a hyperparameter search get a store of their own,
    run-2.zarr, run-3.zarr, ... The checkpoints say (in trainer_state.json, under
    `stateful_callbacks`) which of them their training was recorded to, and a training that starts
    from a checkpoint continues that one.

    After an exception in training, the Trainer calls no callback. The recording is then closed when
    the next training begins, or when the process ends; call `close` yourself if you need the model
    or the recording before.

    The recording keeps the settings of the `TrainingArguments`, without tokens and output folders;
    `dynamics.compare` has those in which runs differ.

    Args:
        store: path or URL of the recording, or any zarr Store.
        options: the other arguments of `Recorder`. `live=True` shows live metrics in what
            `report_to` names.

    Example:
        >>> from probes.frameworks.hf_trainer import RecorderCallback
        >>> callback = RecorderCallback("run.zarr", every=100)
        >>> trainer = Trainer(model, arguments, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """Open the recording; see `Recorder.attach`."""
        several = args.world_size > 1 and torch.distributed.is_initialized()
        noted = state.stateful_callbacks.setdefault(_NOTED, {})
        recorder = self._begin(
            model,
            optimizer,
            noted.get(name_of(self._store)) if isinstance(noted, dict) else None,
            partial(TrainerReports, args, state, control, model),
            write=state.is_world_process_zero,
            process_group=torch.distributed.group.WORLD if several else None,
            resume_at=state.global_step or None,
            attrs={"training_arguments": settings(args.to_dict())},
        )
        if recorder is not None and isinstance(noted, dict):
            noted[name_of(self._store)] = recorder.store_name

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Hand over the last record, to which nothing is added any more.

        The Trainer tells no callback of an exception that comes before the next record.
        """
        if self.recorder is not None:
            self.recorder.hand_over()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count a step that the gradient scaler skipped, because the Trainer counts it too."""
        if self.recorder is not None and state.global_step > self.recorder.step:
            self.recorder.skip_step()
        if not control.should_log and not control.should_evaluate:
            self._write_before_saving(control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Hand the logged scalars to the record of this step."""
        if self.recorder is not None and logs is not None:
            scalars = {name: logs[name] for name in _SCALARS if name in logs}
            tokens = state.num_input_tokens_seen or None
            self.recorder.log(tokens=tokens, at=state.global_step, **scalars)
            # Only the last log of a training has a mean loss; then trackers end their runs.
            if "train_loss" in logs:
                self.recorder.flush()
        if not control.should_evaluate:
            self._write_before_saving(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The loss of the evaluation is the last value that is logged for this step."""
        self._write_before_saving(control)

    def event(self, kind: str, step: int, attrs: dict[str, Any]) -> None:
        """Record an event of the training, e.g. a merge after optimizer step `step`."""
        if self.recorder is not None:
            self.recorder.event(kind, at=step, **attrs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Finish the recording."""
        self.close()

    def _write_before_saving(self, control: TrainerControl) -> None:
        # No checkpoint may be ahead of the recording: a run that is killed and resumed from it
        # does not repeat the steps before it.
        if self.recorder is not None and control.should_save:
            self.recorder.flush()
