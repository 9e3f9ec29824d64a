"""The recorder: streams weights, gradients and adapters of a training run to Zarr."""

import atexit
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from dynamics import schema
from dynamics.errors import DynamicsError, UnmeasuredWarning
from dynamics.recordings import Compression, Recording, RecordingWriter, StoreLike
from dynamics.runs.run import Event
from probes.checks import FailedCheckWarning, record_defects
from probes.contexts import outside_of_contexts
from probes.gradients.of_step import StepGradients
from probes.gradients.stepped import warn_of_no_optimizer, watched_weights
from probes.model.account import announce
from probes.model.parameters import Selection, track
from probes.model.provenance import model_config, package_versions
from probes.model.sharding import is_rank_0, refuse_unreadable, wait_for_ranks
from probes.model.weights import weight_wrappers
from probes.optimizers.changes import WeightVersions, warn_of_changes, warn_of_no_step
from probes.optimizers.learning_rates import learning_rates
from probes.optimizers.nesting import given_optimizers, optimizers_of
from probes.optimizers.steps import OptimizerSteps
from probes.records.background_writer import (
    BLOCK,
    BackgroundWriter,
    SkippedRecordWarning,
    check_policy,
)
from probes.records.contents import DEFAULT_CONTENTS, check_contents
from probes.records.matrices import MatrixContents
from probes.records.record import Record, dtype_to_store
from probes.records.spectra import SpectrumContents
from probes.schedule import Schedule
from probes.schedule import every as every_n

SKIPPED_STEP = "skipped_step"


class Recorder:
    """Records a training run at chosen optimizer steps.

    A record at step t holds the weights after t optimizer steps, the gradient that step t
    consumed, and the values that were logged for step t. Step 0 holds the initial weights, without
    a gradient; it is recorded on attaching. A record is handed to the writer when the next step
    begins, or on closing. So whatever a Trainer logs after the step still belongs to the record.

    Frozen weights have a recorded gradient too. It never appears in `parameter.grad`; see
    `probes.gradients.probed.ProbedGradients`.

    Training computes the same bits with and without a recorder: it draws no random number, and
    computes outside of the contexts around it, such as autocast. It leaves two hooks on each
    optimizer, and before a recorded step hooks on the modules and on recorded weights that train.
    Closing removes them. No flag (`requires_grad`) is changed: freeze and unfreeze weights as you
    like. The training thread only copies tensors; another thread converts, compresses and writes.

    Every parameter of the model is recorded, or left out for a reason that `account` tells. A line
    on attaching says how much of the model is recorded. `LeftOutWarning` says so where more than
    1 % of the numbers that train, in matrices, are left out by no choice of yours. The experts of
    a mixture are recorded as one matrix each, convolutions as out × (in·k).

    Each record is checked when it is written. NaN, Inf or a dead adapter (A and B both zero) give
    a `probes.checks.FailedCheckWarning`.

    With several processes, attach a recorder with the same arguments in each of them, after DDP,
    `fully_shard` or `accelerator.prepare` have made the model and the optimizer. The recorders
    gather sharded tensors one matrix at a time and average the gradients of frozen weights; rank 0
    writes.

    Args:
        model: any torch module. Where PEFT added LoRA layers, `weight` is W_base + s·B·A.
        optimizer: a torch optimizer, or a wrapper that holds some; then a step is over when the
            wrapper's is. Or a list or dict of them, in the order in which they step; steps are
            counted by the last one. Their order does not matter if they step within the backward
            pass, such as one for each parameter: then a step is over when this pass is.
        store: path or URL of the recording, any zarr Store, or an Icechunk repository.
        every: n, to record every n-th step; or a function of the step, see `probes.schedule`.
        select: globs over names, or a predicate of (name of a matrix, parameter); all matrices by
            default.
        record: what to write: some of "weight", "gradient", "adapter" and "probed_gradient" (all
            four by default). "probed_gradient" adds the gradients of frozen weights to the other
            gradients. "gradient_before_clipping" in place of "gradient" takes each gradient as the
            last backward pass left it.
        spectra_only: store singular values instead of matrices, for models whose matrices are too
            large to keep. They are measured in float64 at the record step, on the device that
            trains, while training waits. `record` then also takes "update" and "displacement";
            each of them keeps one copy of the weights in CPU memory.
        resume_at: None starts a new recording at step 0. A number says that training continues
            after that many steps. An existing recording is then continued: its records after that
            step are dropped, and an event "resume" is added.
        queue_size: how many records may wait to be written.
        when_full: what happens to one more record: "block" makes training wait for the writer;
            "skip" drops the record with a warning and an event "skipped".
        take_over: continue a recording whose writer died on another machine; see
            `RecordingWriter`.
        storage_dtype: "float32", "bfloat16" or "float16": round weights and gradients that have
            more precision. The noise floors account for it. By default they keep their own dtype.
        compression: "lz4", "zstd" (both over transposed bits) or "none".
        level: compression level; see `dynamics.recordings.Compression`.
        attrs: further JSON-like attributes for a new recording.
        write: whether this process writes; by default, rank 0 of torch.distributed does.
        process_group: the ranks over which the recorder averages gradients: those of frozen
            weights and those before clipping. By default, the group of DDP.
        grad_scaler: the scaler of the loss. The recorder needs it to unscale these same
            gradients. It finds the scaler of accelerate's optimizer by itself.

    Attributes:
        account: a `dynamics.runs.account.Account`: what of the model is recorded, and what is not.

    Raises:
        DynamicsError: no parameter is selected; an unknown word in `record`; FSDP1 or DeepSpeed;
            an optimizer of another model; or several processes must average gradients, the model
            is not in DDP, and `process_group` is None.
        OutputExistsError: the store already holds a recording and `resume_at` is None.

    Example:
        >>> from probes import Recorder
        >>> model = torch.nn.Linear(6, 4)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Recorder(model, optimizer, "linear.zarr", every=2) as recorder:
        ...     for step in range(1, 5):
        ...         loss = model(torch.ones(3, 6)).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         recorder.log(loss=loss)
        ...         optimizer.step()
        >>> run = dy.open_run("linear.zarr")
        >>> run.steps.tolist(), list(run.matrices)
        ([0, 2, 4], ['weight'])
        >>> run.read("weight", 4, "gradient").values.shape
        (4, 6)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        store: StoreLike,
        *,
        every: int | Schedule = 100,
        select: Selection = None,
        record: Sequence[str] = DEFAULT_CONTENTS,
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
        check_contents(record, spectra_only)
        if spectra_only and (storage_dtype is not None or when_full != BLOCK):
            raise DynamicsError(
                "spectra_only=True stores no matrices that storage_dtype could round, and its "
                f"records are too small to drop; found storage_dtype={storage_dtype!r} and "
                f"when_full={when_full!r}: leave both out."
            )
        given = self._given = given_optimizers(optimizer)
        refuse_unreadable(model, given)
        self._optimizers = optimizers_of(model, given)
        scalers = (getattr(each, "scaler", None) for each in given)
        with outside_of_contexts():  # weights that adapters or parametrisations make are computed
            self._tracked, self.account = track(model, select)
        self._model, self._wrappers = model, weight_wrappers(model)
        self._due: Schedule = every if callable(every) else every_n(every)
        self._writes = is_rank_0() if write is None else write
        words = frozenset(record)
        contents = SpectrumContents if spectra_only else MatrixContents
        self._contents = contents(self._tracked, words, self._writes)
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
        watched = watched_weights(model, self._tracked, self._optimizers)
        # Since the record that is pending, and since attaching.
        self._since_record, self._since_attach = WeightVersions(watched), WeightVersions(watched)
        self._model = model
        self._first_step = self._step = resume_at or 0
        self._may_change = self._warned_of_changes = False
        self._resume_at = resume_at
        self._store = store
        check_policy(queue_size, when_full)
        self._queue_size, self._when_full = queue_size, when_full
        self._take_over = take_over
        self._stored_as = dtype_to_store(storage_dtype)
        self._compression = Compression(compression, level)
        self._attrs = {
            "config": model_config(model),
            "account": self.account.to_json(),
            "gradient": self._gradients.definition,
            "versions": package_versions(),
            **(attrs or {}),
        }
        self._steps: OptimizerSteps | None = None
        self._writer: BackgroundWriter | None = None
        self._pending: Record | None = None
        self._logged: dict[str, Any] = {}
        self._warned_of: set[str] = set()

    def attach(self) -> Self:
        """Open the store, register the hooks, and record the first step if it is due.

        `with Recorder(...)` calls it.

        Raises:
            DynamicsError: the recorder is already attached, or the recorder of another rank that
                it needs is missing after 120 s.
        """
        if self._steps is not None:
            raise DynamicsError("This recorder is already attached; close() it first.")
        if self._writes:
            announce(self.account)
            warn_of_no_optimizer(self._model, self._tracked, self._optimizers)
        if len(self._gradients.needed_ranks) > 1:
            wait_for_ranks(self._gradients.needed_ranks)
        if self._writes:
            self._open_store()
        self._steps = OptimizerSteps(
            self._given,
            self._optimizers,
            self._look_for_changes,
            self._finish_record,
            self._take_gradients,
            self._step_done,
        )
        atexit.register(self.close)
        self._since_attach.note()
        if self._due(self._step):
            # A resumed recording may hold this record already; only the writing process knows. All
            # take it nevertheless: other ranks may be gathering, and differences refer to it.
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
        """Wait until every record so far is written; afterwards, its step can log nothing more.

        Raises:
            RuntimeError: the writer failed.
        """
        self._finish_record(wait=True)
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Remove the hooks and finish writing. Safe to call twice.

        Raises:
            RuntimeError: the writer failed.
        """
        if self._steps is None:
            return
        writer = self._writer
        self._steps.finish()
        if (
            self._writes
            and self._step == self._first_step
            and (names := self._since_attach.changed())
        ):
            warn_of_no_step(self._given[-1], names)
        try:
            self._finish_record(wait=True)
        finally:
            self._steps.remove()
            self._gradients.close()
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
        """Log values for a step; they are kept if the step is recorded.

        Args:
            tokens: tokens seen so far.
            at: the step that the values belong to: the next step (the default, for a loop that
                logs its loss before `optimizer.step()`) or the step just done.
            scalars: numbers or one-element tensors.
        """
        values = {name: _detached_copy(value) for name, value in scalars.items()}
        if tokens is not None:
            values["tokens"] = tokens
        if at is None or at == self._step + 1:
            self._logged.update(values)
        elif self._pending is not None and self._pending.step == at:
            self._pending.logged.update(values)

    def event(self, kind: str, *, at: int | None = None, **attrs: Any) -> None:
        """Record an event after the step just done, or after step `at`.

        Args:
            kind: e.g. "merge", "optimizer_reset", or a word of your own.
            at: optimizer steps done.
            attrs: JSON-like facts about it.
        """
        self._finish_record()
        self._may_change = True  # an event such as a merge changes weights
        happened = Event(self._step if at is None else at, kind, attrs)
        self._contents.note(happened)
        self._submit(lambda: self._recording.event(happened))

    def skip_step(self) -> None:
        """Count a step that your training counts although no optimizer took it.

        A gradient scaler skips the step when it finds Inf. Plain loops do not count such a step,
        but the Trainer and Lightning do, and they name checkpoints after it. Its record has the
        unchanged weights and no gradient, and an event "skipped_step" says why.
        """
        self._gradients.pop()
        self._gradients.disarm()
        self.event(SKIPPED_STEP, at=self._step + 1)
        self._step_done()

    def _look_for_changes(self) -> None:
        if self._pending is not None and not self._may_change and not self._warned_of_changes:
            names = self._since_record.changed()
            if names:
                self._warned_of_changes = True
                warn_of_changes(self._pending.step, names)

    @outside_of_contexts()
    def _take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if self._due(self._step + 1):
            self._gradients.take(optimizer)

    @outside_of_contexts()
    def _step_done(self) -> None:
        self._step += 1
        if self._due(self._step):
            self._gradients.finish()
            self._take_record()
        self._logged = {}
        self._arm_if_due()

    @outside_of_contexts()
    def _arm_if_due(self) -> None:
        if self._due(self._step + 1):
            self._gradients.arm()

    @outside_of_contexts()
    def _take_record(self, *, keep: bool = True) -> None:
        rates = learning_rates(self._optimizers)
        record = Record(self._step, {name: _detached_copy(rate) for name, rate in rates.items()})
        record.logged |= self._logged
        self._contents.fill(record, self._gradients.pop())
        self._may_change = False
        self._warn_of_other_wrappers()
        if self._writes and keep:
            self._pending = record
            self._since_record.note()
        else:
            self._contents.release(record)

    def _warn_of_other_wrappers(self) -> None:
        """Say once that adapters came or went, so that weights are no longer what was attached."""
        if "wrappers" in self._warned_of or weight_wrappers(self._model) == self._wrappers:
            return
        self._warned_of.add("wrappers")
        warnings.warn(
            f"Step {self._step}: adapters or parametrisations of the model came or went since the "
            "recorder was made, and weights are recorded as it found them then. Close it, and "
            "continue the recording with a new Recorder(resume_at=step).",
            UnmeasuredWarning,
            stacklevel=2,
        )

    def _finish_record(self, *, wait: bool = False) -> None:
        if self._pending is not None:
            record, self._pending = self._pending, None
            assert self._writer is not None, "only the writing process has pending records"
            if not self._writer.submit_record(lambda: self._write(record), wait=wait):
                warnings.warn(
                    f"Dropped the record at step {record.step}: the storage is slower than the "
                    "training. Record less often, or pass when_full='block'.",
                    SkippedRecordWarning,
                    stacklevel=2,
                )
                self.event(schema.SKIPPED, at=record.step)

    def _write(self, record: Record) -> None:
        written = record.write(self._recording, self._stored_as)
        for path, defect in (record.defects | record_defects(written)).items():
            if path not in self._warned_of:  # once for each array
                self._warned_of.add(path)
                warnings.warn(f"Step {record.step}: {defect}.", FailedCheckWarning, stacklevel=2)
        self._contents.release(record)

    def _submit(self, job: Any) -> None:
        if self._steps is None:
            raise DynamicsError("This recorder is not attached; call attach() or use 'with'.")
        if self._writer is not None:
            self._writer.submit(job)


@outside_of_contexts()
def _detached_copy(value: Any) -> Any:
    """A copy without its graph. Reading the number would wait for the device: the writer does."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
