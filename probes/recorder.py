"""The recorder: streams weights, gradients and adapters of a training run to Zarr."""

import atexit
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn

from dynamics import schema
from dynamics.errors import DynamicsError
from dynamics.recordings import Compression, Recording, RecordingWriter, StoreLike
from dynamics.runs.run import Event
from probes.checks import FailedCheckWarning, record_defects
from probes.gradients.of_step import StepGradients
from probes.gradients.optimizer_hooks import OptimizerSteps
from probes.model.optimizers import innermost_optimizer
from probes.model.parameters import Selection, tracked_parameters
from probes.model.provenance import model_config, package_versions
from probes.model.sharding import meet, refuse_unreadable
from probes.records.background_writer import (
    BLOCK,
    BackgroundWriter,
    Record,
    SkippedRecordWarning,
    check_policy,
    dtype_to_store,
)
from probes.records.matrices import DEFAULT_RECORD, Matrices, Spectra, check_record
from probes.schedule import Schedule
from probes.schedule import every as every_n

SKIPPED_STEP = "skipped_step"


class Recorder:
    """Records a training run at chosen optimizer steps.

        with Recorder(model, optimizer, "run.zarr", every=100):
            train()

    A record at step t holds the weights after t optimizer steps, the gradient that the t-th step
    consumed, and what was logged. Step 0, the initial weights, is recorded on attaching and has
    no gradient. A record is handed to the writer when the next step begins, or on closing, so
    that what a Trainer logs after the step still belongs to it.

    Frozen weights have a gradient too, kept out of `parameter.grad`; see `ProbedGradients`.

    The model and the optimizer are left as they were: two hooks on each optimizer, and before a
    recorded step the frozen weights' flags and hooks, are the only trace. They are removed on
    closing, no random number is drawn and training computes the same bits as without it. Copies
    are taken in the training thread; the rest happens in a thread of its own.

    What a record alone shows to be wrong, NaN or Inf or a dead adapter, is a FailedCheckWarning
    as soon as it is written.

    With several processes, each attaches a recorder of the same arguments: they gather what is
    sharded, one matrix at a time, average the frozen weights' gradients, and rank 0 writes.
    Attach after DDP, `fully_shard` or `accelerator.prepare` have made the model and optimizer.

    Args:
        model: any torch module. Where PEFT put LoRA layers, `weight` is W_base + s·B·A.
        optimizer: the torch optimizer whose steps count, or a wrapper with an `optimizer`; or a
            list of them in the order in which they step: then the steps of the last one count.
        store: path of the recording, or any zarr Store.
        every: record each n-th step, or a function of the step (see `probes.schedule`).
        select: globs or a predicate over parameters; every two-dimensional one by default.
        record: which of "weight", "gradient", "adapter" and "probed_gradient" to write; the last
            are the gradients of frozen weights, among the other gradients. In place of "gradient",
            "gradient_before_clipping" takes it as the last backward pass left it.
        spectra_only: store singular values in place of matrices, for models whose matrices are too
            large to keep: they are measured in float64 on the device that trains, at the record
            step, while training waits. `record` then takes "update" and "displacement" too, each
            for a copy of the weights in CPU memory.
        resume_at: None starts a new recording at step 0. A number says that training goes on
            after that many steps: an existing recording is continued, its records after that
            step are dropped, and an event "resume" says so.
        queue_size: records that may wait to be written.
        when_full: what a further record does: "block" waits for the writer, "skip" drops it with a
            warning and an event "skipped".
        take_over: continue a recording whose writer died on another machine; see `RecordingWriter`.
        storage_dtype: round weights and gradients of more precision to "float32", "bfloat16" or
            "float16"; the noise floors know. They keep their own dtype by default.
        compression: "lz4", "zstd" (both over transposed bits) or "none".
        level: the compression's; see `dynamics.recordings.Compression`.
        attrs: further JSON-like attributes of a new recording.
        write: whether this process writes; by default rank 0 of torch.distributed does.
        process_group: the ranks that gradients are averaged over where the recorder has to do it,
            probed and before clipping; DDP's own by default.
        grad_scaler: what scales the loss, so that those gradients are unscaled; accelerate's
            optimizer knows its own.

    Raises:
        DynamicsError: nothing is selected, an unknown word in `record`, FSDP1 or DeepSpeed, or
            gradients must be averaged in several processes, the model is not in DDP and
            `process_group` is None.
        OutputExistsError: the store holds a recording and `resume_at` is None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        store: StoreLike,
        *,
        every: int | Schedule = 100,
        select: Selection = None,
        record: Sequence[str] = DEFAULT_RECORD,
        spectra_only: bool = False,
        resume_at: int | None = None,
        queue_size: int = 2,
        when_full: str = BLOCK,
        take_over: bool = False,
        storage_dtype: str | None = None,
        compression: str = Compression().name,
        level: int | None = None,
        attrs: Mapping[str, Any] | None = None,
        write: bool | None = None,
        process_group: Any = None,
        grad_scaler: Any = None,
    ):
        check_record(record, spectra_only)
        if spectra_only and (storage_dtype is not None or when_full != BLOCK):
            raise DynamicsError(
                "spectra_only stores no matrices that storage_dtype could round, and too little "
                f"to drop records for: leave out storage_dtype={storage_dtype!r} and "
                f"when_full={when_full!r}."
            )
        given = optimizer if isinstance(optimizer, Sequence) else (optimizer,)
        refuse_unreadable(model, given)
        self._optimizers: list[torch.optim.Optimizer] = [
            innermost_optimizer(each) for each in given
        ]
        scalers = (getattr(each, "scaler", None) for each in given)
        self._tracked = tracked_parameters(model, select)
        self._due: Schedule = every if callable(every) else every_n(every)
        self._writes = _is_rank_0() if write is None else write
        words = frozenset(record)
        self._contents = (Spectra if spectra_only else Matrices)(self._tracked, words, self._writes)
        self._gradients = StepGradients(
            model,
            self._tracked,
            self._optimizers,
            words,
            process_group=process_group,
            grad_scaler=grad_scaler or next((each for each in scalers if each), None),
            writes=self._writes,
            keep=self._contents.keep,
        )
        self._resume_at = resume_at
        self._store = store
        check_policy(queue_size, when_full)
        self._queue_size, self._when_full = queue_size, when_full
        self._take_over = take_over
        self._stored_as = dtype_to_store(storage_dtype)
        self._compression = Compression(compression, level)
        self._attrs = {
            "config": model_config(model),
            "gradient": self._gradients.definition,
            "versions": package_versions(),
            **(attrs or {}),
        }
        self._steps: OptimizerSteps | None = None
        self._writer: BackgroundWriter | None = None
        self._step = resume_at or 0
        self._pending: Record | None = None
        self._logged: dict[str, Any] = {}
        self._warned_of: set[str] = set()

    def attach(self) -> Self:
        """Open the store, register the hooks and record the first step if it is due."""
        if self._steps is not None:
            raise DynamicsError("This recorder is attached already.")
        if len(self._gradients.needed_ranks) > 1:
            meet(self._gradients.needed_ranks)
        if self._writes:
            self._open_store()
        self._steps = OptimizerSteps(
            self._optimizers, self._finish_record, self._take_gradients, self._step_done
        )
        atexit.register(self.close)
        if self._due(self._step):
            # Whether a resumed recording has this record already, its writer alone knows. It is
            # taken all the same: others may be gathering, and differences refer to it.
            self._take_record(keep=not (self._writes and self._step in self._recording.steps))
        self._arm_if_due()
        return self

    def _open_store(self) -> None:
        self._recording = RecordingWriter(
            self._store,
            self._attrs,
            resume=self._resume_at is not None,
            take_over=self._take_over,
            compression=self._compression,
        )
        if self._resume_at is not None:
            try:
                self._recording.rewind(self._resume_at, event=schema.RESUME)
                self._contents.resume(Recording(self._store))
            except BaseException:
                self._recording.release()
                raise
        self._writer = BackgroundWriter(self._recording, self._queue_size, self._when_full)

    def flush(self) -> None:
        """Wait until all that was recorded is written; raises what the writer met.

        Nothing more can be logged about the step just done.
        """
        self._finish_record(wait=True)
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Remove the hooks and finish writing; raises what the writer met. Twice is once."""
        if self._steps is None:
            return
        writer = self._writer
        try:
            self._finish_record(wait=True)
        finally:
            self._steps.remove()
            self._gradients.disarm()
            self._steps, self._writer = None, None
            atexit.unregister(self.close)
            if writer is not None:
                writer.close()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self._step

    def log(self, *, tokens: int | None = None, at: int | None = None, **scalars: Any) -> None:
        """Note values of a step; they are kept if the step is recorded.

        Args:
            tokens: tokens seen so far.
            at: the step that they belong to: the one just done, or by default the next one, so
                that a loop logs its loss before `optimizer.step()`.
            scalars: numbers or one-element tensors.
        """
        values = {name: _kept(value) for name, value in scalars.items()}
        if tokens is not None:
            values["tokens"] = tokens
        if at is None or at == self._step + 1:
            self._logged.update(values)
        elif self._pending is not None and self._pending.step == at:
            self._pending.logged.update(values)

    def event(self, kind: str, *, at: int | None = None, **attrs: Any) -> None:
        """Note that something happened after the step just done (or after step `at`)."""
        self._finish_record()
        happened = Event(self._step if at is None else at, kind, attrs)
        self._contents.note(happened)
        self._submit(lambda: self._recording.event(happened))

    def skip_step(self) -> None:
        """Count a step that the training counts although no optimizer took it.

        Where a gradient scaler meets Inf it leaves the step out; plain loops have not done a step
        then, but the Trainer and Lightning go on counting, and name checkpoints so. The weights
        stay as they are, the record has no gradient, and an event "skipped_step" says why.
        """
        self._gradients.taken()
        self._gradients.disarm()
        self.event(SKIPPED_STEP, at=self._step + 1)
        self._step_done()

    def _take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if self._due(self._step + 1):
            self._gradients.take(optimizer)

    def _step_done(self) -> None:
        self._step += 1
        if self._due(self._step):
            self._take_record()
        self._logged = {}
        self._arm_if_due()

    def _arm_if_due(self) -> None:
        if self._due(self._step + 1):
            self._gradients.arm()

    def _take_record(self, *, keep: bool = True) -> None:
        rate = self._optimizers[0].param_groups[0].get("lr")
        record = Record(self._step, {} if rate is None else {"learning_rate": _kept(rate)})
        record.logged |= self._logged
        self._contents.fill(record, self._gradients.taken())
        if self._writes and keep:
            self._pending = record
        else:
            self._contents.written(record)

    def _finish_record(self, *, wait: bool = False) -> None:
        if self._pending is not None:
            record, self._pending = self._pending, None
            assert self._writer is not None, "who does not write has no pending record"
            if not self._writer.submit_record(lambda: self._write(record), wait=wait):
                warnings.warn(
                    f"The record at step {record.step} was dropped: the storage is slower than "
                    "the training. Record less often, or with when_full='block'.",
                    SkippedRecordWarning,
                    stacklevel=2,
                )
                self.event(schema.SKIPPED, at=record.step)

    def _write(self, record: Record) -> None:
        written = record.write(self._recording, self._stored_as)
        for path, defect in (record.defects | record_defects(written)).items():
            if path not in self._warned_of:  # once for each array, when it happens
                self._warned_of.add(path)
                warnings.warn(f"Step {record.step}: {defect}.", FailedCheckWarning, stacklevel=2)
        self._contents.written(record)

    def _submit(self, job: Any) -> None:
        if self._steps is None:
            raise DynamicsError("This recorder is not attached; call attach() or use 'with'.")
        if self._writer is not None:
            self._writer.submit(job)


def _is_rank_0() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _kept(value: Any) -> Any:
    """A copy without its graph; its value is not asked for before the writer needs it."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
