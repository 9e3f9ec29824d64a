"""Evaluation while a model trains."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dynamics.errors import DynamicsError
from probes.frameworks.hf_trainer import RecorderCallback
from probes.relora.evaluation.evaluations import Evaluation


class EvaluationCallback(TrainerCallback):
    """Evaluates the model every few steps, without changing a bit of the training.

    The scalars go into the log of the Trainer, and so into the trainer_state.json of every
    checkpoint. If a recorder is given and the step is recorded, they also go into its record. With
    bfloat16 autocast the model is evaluated in autocast, as the Trainer evaluates it. With several
    processes, the first one evaluates its whole model while the others wait.

    Args:
        evaluations: what to evaluate.
        tokenizer: the tokenizer of the model, as a transformers tokenizer; see `as_transformers`.
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
        """Evaluate after the optimizer step, which the Trainer has not counted yet.

        This is before `on_step_end`, in which a recorder may write its record.
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
