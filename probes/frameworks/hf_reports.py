"""Live values through what the Hugging Face Trainer reports to."""

import copy
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from dynamics.errors import DynamicsError
from probes.live.trackers import Values, WandB


class TrainerReports:
    """The trackers of `TrainingArguments.report_to`, through callbacks of our own.

    Those of the Trainer cannot be used: `Trainer.log` would suppress the Trainer's own loss of that
    step, and fill the console. Instances of our own write to the same runs and folders, when the
    first values come.

    Args:
        args: of the training.
        state: of the training; the callbacks get a copy with the step of the values.
        control: of the training.
        model: the one that trains.

    Raises:
        DynamicsError: the training reports to nobody.
    """

    def __init__(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any
    ):
        if not args.report_to:
            raise DynamicsError(
                "live=True shows its values where the Trainer reports to, and that is nowhere: "
                "give TrainingArguments(report_to='tensorboard'), 'wandb', ..., or Live(to=...)."
            )
        self._args, self._state, self._control, self._model = args, state, control, model
        self._callbacks: list[Any] | None = None

    def log(self, values: Values, step: int) -> None:
        """See `Tracker`."""
        if self._callbacks is None:
            self._callbacks = [
                kind() for kind in get_reporting_integration_callbacks(self._args.report_to)
            ]
            for each in self._callbacks:
                self._join(each)
        state = copy.copy(self._state)
        state.global_step = step
        for each in self._callbacks:
            each.on_log(self._args, state, self._control, logs=dict(values), model=self._model)

    def alarm(self, text: str, step: int) -> None:
        """An alert of W&B."""
        if "wandb" in self._args.report_to:
            WandB().alarm(text, step)

    def _join(self, callback: Any) -> None:
        """Let a callback write where the Trainer's own one of this kind already writes."""
        name = type(callback).__name__
        if name == "TensorBoardCallback" and callback.logging_dir is None:
            # Its folder is named after the second in which it began.
            files = Path(self._args.output_dir).rglob("events.out.tfevents.*")
            newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
            callback.logging_dir = None if newest is None else str(newest.parent)
        elif name in ("WandbCallback", "TrackioCallback"):
            callback._initialized = True  # or the model would be logged again
