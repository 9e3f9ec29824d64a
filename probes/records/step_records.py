"""The records of a training's steps: when one is made, and what it is given."""

import threading
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, SupportsFloat, SupportsInt

import torch
from torch import nn

from dynamics.errors import UnmeasuredWarning
from probes.contexts import outside_of_contexts
from probes.gradients.of_step import StepGradients
from probes.gradients.stepped import watched_weights
from probes.model.parameters import Tracked
from probes.model.weights import weight_wrappers
from probes.optimizers.changes import WeightVersions, warn_of_changes, warn_of_no_step
from probes.optimizers.learning_rates import learning_rates
from probes.optimizers.steps import OptimizerSteps
from probes.records.contents import Contents
from probes.records.record import Record
from probes.records.scalars import real_number
from probes.records.session import Session
from probes.schedule import Schedule


class LateValuesWarning(UserWarning):
    """Values were logged for a step whose record has been written."""


class StepRecords:
    """Counts the steps of optimizers, and makes a record of each step that is due.

    Args:
        model: that is trained.
        given: optimizers with their wrappers, as the user gave them.
        optimizers: the torch optimizers in them; the last one counts the steps.
        tracked: the recorded weights.
        contents: fills the records.
        gradients: of each step.
        due: which steps are recorded.
        step: optimizer steps done.

    Attributes:
        step: optimizer steps done so far.
        thread: the one that made the last step.
        session: writes the records; None in a process that does not write.
    """

    def __init__(
        self,
        model: nn.Module,
        given: Sequence[Any],
        optimizers: Sequence[torch.optim.Optimizer],
        tracked: Sequence[Tracked],
        contents: Contents,
        gradients: StepGradients,
        due: Schedule,
        step: int,
    ):
        self._model, self._given, self._optimizers = model, given, optimizers
        self._contents, self._gradients, self._due = contents, gradients, due
        self._first_step = self.step = step
        self.thread = threading.current_thread()
        self.session: Session | None = None
        self._steps: OptimizerSteps | None = None
        self._wrappers = weight_wrappers(model)
        watched = watched_weights(model, tracked, optimizers)
        # Since the last record, and since attaching.
        self._since_record, self._since_attach = WeightVersions(watched), WeightVersions(watched)
        self._unchanged_step: int | None = None  # the record that weights are compared with
        self.may_change = False  # something of the training, such as a merge, changes weights
        self._told: set[str] = set()
        self._logged: dict[str, SupportsFloat] = {}
        self._tokens: SupportsInt | None = None

    @property
    def attached(self) -> bool:
        """Whether the hooks are registered."""
        return self._steps is not None

    def latest_due(self, count: int) -> list[int]:
        """The last steps up to now that are recorded, at most so many, the newest first."""
        return list(islice((s for s in range(self.step, -1, -1) if self._due(s)), count))

    def begin(self) -> Record | None:
        """Register the hooks; the record of the present step, if it is due."""
        self._steps = OptimizerSteps(
            self._given,
            self._optimizers,
            self._look_for_changes,
            self._step_begins,
            self._take_gradients,
            self._step_done,
        )
        self._since_attach.note()
        self.thread = threading.current_thread()
        # A resumed recording may hold this record already; only the writing process knows. All
        # take it nevertheless: other ranks may be gathering, and differences refer to it.
        first = self._filled_record() if self._due(self.step) else None
        self._arm_if_due()
        return first

    def keep(self, record: Record | None) -> None:
        """Give a record to the session, if there is one."""
        if record is None:
            return
        if self.session is None:
            self._contents.release(record)
        else:
            self.session.add(record)
            self._unchanged_step = record.step
            self._since_record.note()

    def is_due(self, step: int) -> bool:
        """Whether a step is recorded."""
        return bool(self._due(step))

    def log(
        self, step: int, values: Mapping[str, SupportsFloat], tokens: SupportsInt | None
    ) -> None:
        """Keep values for the next step, or for the last one while its record takes them."""
        if step == self.step + 1:
            self._logged.update(values)
            self._tokens = self._tokens if tokens is None else tokens
        elif self.session is None or self.session.log(step, values, tokens):
            return
        elif values and self._due(step) and "late" not in self._told:
            self._told.add("late")
            warnings.warn(
                f"Values for step {step} were logged after step {self.step} and are dropped: "
                "log() takes values of the next step, and of the last one until flush(), event() "
                "or the step after it.",
                LateValuesWarning,
                stacklevel=3,
            )

    def skip(self) -> None:
        """Count a step that no optimizer took."""
        self._gradients.pop()
        self._gradients.disarm()
        self._step_done()

    def finish(self) -> None:
        """Remove the hooks, and say what never came."""
        if self._steps is None:
            return
        self._steps.finish()
        self.remove_hooks()
        self._gradients.close()
        if self.session is not None and self.step == self._first_step:
            warn_of_no_step(self._given[-1], self._since_attach.changed())

    def remove_hooks(self) -> None:
        """Leave the model and the optimizers as they were. Safe to call twice."""
        if self._steps is not None:
            self._steps.remove()
            self._gradients.disarm()
            self._steps = None

    def _look_for_changes(self) -> None:
        step = self._unchanged_step
        if step is None or self.may_change or "changes" in self._told:
            return
        if names := self._since_record.changed():
            self._told.add("changes")
            warn_of_changes(step, names)

    def _step_begins(self) -> None:
        self._unchanged_step = None
        if self.session is not None:
            self.session.hand_over()
            self.session.report()

    @outside_of_contexts()
    def _take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if self._due(self.step + 1):
            self._gradients.take(optimizer)

    @outside_of_contexts()
    def _step_done(self) -> None:
        self.step += 1
        self.thread = threading.current_thread()
        if self._due(self.step):
            self._gradients.finish()
            record = self._filled_record()
            record.logged |= self._logged
            record.tokens = self._tokens
            self.keep(record)
        self._logged, self._tokens = {}, None
        self._arm_if_due()

    @outside_of_contexts()
    def _arm_if_due(self) -> None:
        if self._due(self.step + 1):
            self._gradients.arm()

    @outside_of_contexts()
    def _filled_record(self) -> Record:
        rates = {name: real_number(rate) for name, rate in learning_rates(self._optimizers).items()}
        record = Record(self.step, {name: rate for name, rate in rates.items() if rate is not None})
        self._contents.fill(record, self._gradients.pop())
        self.may_change = False
        self._warn_of_other_wrappers()
        return record

    def _warn_of_other_wrappers(self) -> None:
        """Say once that adapters came or went, so that weights are no longer what was attached."""
        if "wrappers" in self._told or weight_wrappers(self._model) == self._wrappers:
            return
        self._told.add("wrappers")
        warnings.warn(
            f"Step {self.step}: adapters or parametrisations of the model came or went since the "
            "recorder was made, and weights are recorded as it found them then. Close it, and "
            "continue the recording with a new Recorder(resume_at=step).",
            UnmeasuredWarning,
            stacklevel=2,
        )
