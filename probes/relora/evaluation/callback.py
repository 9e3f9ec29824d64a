"""Evaluation while a model trains."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynamics.errors import DynamicsError
from probes.frameworks.hf_trainer import RecorderCallback
from probes.relora.evaluation.evaluations import Evaluation


class EvaluationCallback(TrainerCallback):
    """Evaluates the model every few steps; the training goes on as without it, to the last bit.

    The scalars go into the Trainer's log, and so into the trainer_state.json of every checkpoint,
    and into the record of the same step where a recorder is given and the step is recorded. With
    bfloat16 autocast the model is evaluated as the Trainer evaluates it, in autocast. In several
    processes the first one evaluates its whole model while the others wait.

    Args:
        evaluations: what to evaluate.
        tokenizer: the model's, as a transformers tokenizer; see `as_transformers`.
        every: optimizer steps between evaluations.
        recorder: the callback that records this training.
    """

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        tokenizer: Any,
        *,
        every: int,
        recorder: RecorderCallback | None = None,
    ):
        if every < 1:
            raise DynamicsError(f"An evaluation every {every} steps; give 1 or more.")
        self._evaluations = evaluations
        self._tokenizer = tokenizer
        self._every = every
        self._recorder = recorder

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        **_: Any,
    ) -> None:
        """Evaluate after the optimizer's step, which the Trainer has not counted yet.

        Before `on_step_end`, in which a recorder may write its record out.
        """
        step = state.global_step + 1
        if step % self._every or not state.is_world_process_zero:
            return
        scalars: dict[str, Any] = {}
        for evaluation in self._evaluations:
            scalars |= evaluation(model, self._tokenizer).scalars
        state.log_history.append({**scalars, "step": step})
        if self._recorder is not None and self._recorder.recorder is not None:
            self._recorder.recorder.log(at=step, **scalars)
