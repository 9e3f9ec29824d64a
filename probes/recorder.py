"""The recorder: streams weights, gradients and adapters of a training run to Zarr."""

import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, Self, SupportsFloat, SupportsInt

import torch
from torch import nn

from dynamics.errors import DynamicsError, UnmeasuredWarning, one_line
from dynamics.recordings import Compression, StoreLike, name_of
from dynamics.runs.run import Event
from probes.contexts import outside_of_contexts
from probes.gradients.of_step import StepGradients
from probes.gradients.stepped import warn_of_no_optimizer, watched_weights
from probes.model.account import announce
from probes.model.parameters import Selection, Tracked, track
from probes.model.provenance import adapter_config, model_config, package_versions
from probes.model.sharding import is_rank_0, refuse_unreadable, wait_for_ranks
from probes.model.weights import weight_wrappers
from probes.optimizers.changes import WeightVersions, warn_of_changes, warn_of_no_step
from probes.optimizers.learning_rates import learning_rates
from probes.optimizers.nesting import given_optimizers, optimizers_of
from probes.optimizers.steps import OptimizerSteps
from probes.records import process_end
from probes.records.background_writer import BLOCK, check_policy
from probes.records.contents import DEFAULT_CONTENTS, check_contents
from probes.records.matrices import MatrixContents
from probes.records.opening import REFUSE, Destination, NewRecordingWarning
from probes.records.record import Record
from probes.records.rounding import StorageRounding
from probes.records.scalars import event_facts, real_number, scalar, token_count
from probes.records.session import Session
from probes.records.spectra import SpectrumContents
from probes.schedule import Schedule, whole_number
from probes.schedule import every as every_n

SKIPPED_STEP = "skipped_step"


class LateValuesWarning(UserWarning):
    """Values were logged for a step whose record has been written."""


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
        if_exists: what a new recording does where there is one already: "refuse" (the default),
            "overwrite" it, or go to the "next" free name beside it: run-2.zarr, run-3.zarr, ...
            With "next", a training that resumes continues the newest one that fits.
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
        attrs: further JSON-like attributes for a new recording, such as {"seed": 0}. Those in which
            runs differ are coordinates of `dynamics.compare`.
        write: whether this process writes; by default, rank 0 of torch.distributed does.
        process_group: the ranks over which the recorder averages gradients: those of frozen
            weights and those before clipping. By default, the group of DDP.
        grad_scaler: the scaler of the loss. The recorder needs it to unscale these same
            gradients. It finds the scaler of accelerate's optimizer by itself.

    Attributes:
        account: a `dynamics.runs.account.Account`: what of the model is recorded, and what is not.

    Raises:
        DynamicsError: no parameter is selected; an unknown word in `record`; FSDP1 or DeepSpeed;
            an optimizer of another model; an argument that cannot be meant, such as `every=1.5`;
            or several processes must average gradients, the model is not in DDP, and
            `process_group` is None.

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
        if_exists: str = REFUSE,
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
        _refuse_meta(self._tracked)
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
        # Since the last record, and since attaching.
        self._since_record, self._since_attach = WeightVersions(watched), WeightVersions(watched)
        self._unchanged_step: int | None = None  # the record that weights are compared with
        self._may_change = self._warned_of_changes = self._warned_of_wrappers = False
        check_policy(queue_size, when_full)
        self._queue_size, self._when_full = queue_size, when_full
        self._rounding = StorageRounding(storage_dtype)
        self._resume_at = _checked_step(resume_at)
        self._destination = Destination(
            store,
            if_exists,
            self._resume_at,
            {
                "config": model_config(model),
                **adapter_config(model),
                "account": self.account.to_json(),
                "gradient": self._gradients.definition,
                "versions": package_versions(),
                **_checked_attrs(attrs),
            },
            Compression(compression, level),
            take_over,
        )
        self.thread = threading.current_thread()
        self._steps: OptimizerSteps | None = None
        self._session: Session | None = None
        self._first_step = self._step = self._resume_at or 0
        self._logged: dict[str, SupportsFloat] = {}
        self._tokens: SupportsInt | None = None
        self._told_of_late_values = False

    def attach(self, *, continuing: str | None = None) -> Self:
        """Record the first step if it is due, open the store, and register the hooks.

        `with Recorder(...)` calls it. If it fails, it leaves nothing behind: no hook, no lock, and
        no new store.

        Args:
            continuing: with if_exists="next" and `resume_at`, the name of the store to continue,
                such as "run-2.zarr": `recorder.store_name` of the training that is resumed.

        Raises:
            OutputExistsError: the store holds a recording already, `resume_at` is None, and
                `if_exists` is "refuse".
            RecordingHeldError: another recorder is writing this recording.
            DynamicsError: the recorder is already attached, or the recorder of another rank that
                it needs is missing after 120 s.
        """
        if self._steps is not None or self._session is not None:
            raise DynamicsError("This recorder is already attached; close() it first.")
        try:
            self._begin(continuing)
        except BaseException:
            session, self._session = self._session, None
            self.forget()
            if session is not None:
                session.discard()
            raise
        return self

    def _begin(self, continuing: str | None) -> None:
        if self._writes:
            announce(self.account)
            warn_of_no_optimizer(self._model, self._tracked, self._optimizers)
        self._due(self._step)  # a function that fails does so here, before anything is begun
        if len(self._gradients.needed_ranks) > 1:
            wait_for_ranks(self._gradients.needed_ranks)
        if self._writes:
            continued = self._destination.choose(self._latest_due(), continuing)
            if continued is not None:
                self._contents.resume(continued)
        self._steps = OptimizerSteps(
            self._given,
            self._optimizers,
            self._look_for_changes,
            self._step_begins,
            self._take_gradients,
            self._step_done,
        )
        self._since_attach.note()
        # A resumed recording may hold this record already; only the writing process knows. All
        # take it nevertheless: other ranks may be gathering, and differences refer to it.
        first = self._filled_record() if self._due(self._step) else None
        self._arm_if_due()
        if self._writes:  # last, because all before can fail
            self._session = Session.begin(
                self._destination, self._contents, self._rounding, self._queue_size, self._when_full
            )
        self._keep(first)
        self.thread = threading.current_thread()
        process_end.add(self)
        if self._destination.news:
            warnings.warn(self._destination.news, NewRecordingWarning, stacklevel=4)

    def _latest_due(self) -> list[int]:
        """The last recorded steps, of which a killed writer can have lost all but one."""
        due = (step for step in range(self._step, -1, -1) if self._due(step))
        return list(islice(due, self._queue_size + 3))

    def hand_over(self) -> None:
        """Give the last record to the writer now; afterwards, its step can log nothing more.

        Raises:
            RuntimeError: the writer failed.
        """
        if self._session is not None:
            self._session.hand_over()

    def flush(self) -> None:
        """Wait until every record so far is written; afterwards, its step can log nothing more.

        Raises:
            RuntimeError: the writer failed.
        """
        if self._session is not None:
            self._session.flush()

    def close(self) -> None:
        """Remove the hooks and finish writing. Safe to call twice.

        A recorder that nobody closes is closed when the process ends.

        Raises:
            RuntimeError: the writer failed.
        """
        try:
            if self._steps is not None:
                self._steps.finish()
                self._remove_hooks()
                self._gradients.close()
                if self._writes and self._step == self._first_step:
                    warn_of_no_step(self._given[-1], self._since_attach.changed())
        finally:  # also where a filter makes errors of warnings
            self._remove_hooks()
            self._end_session()

    def _end_session(self) -> None:
        if self._session is not None:
            try:
                self._session.close()
            except Exception:
                self.forget()
                raise
        self.forget()  # not before: after an interruption, another call of close goes on

    def forget(self) -> None:
        """Remove the hooks, and write nothing more: the end in a process that was forked."""
        self._remove_hooks()
        self._session = None
        process_end.remove(self)

    def _remove_hooks(self) -> None:
        if self._steps is not None:
            self._steps.remove()
            self._gradients.disarm()
            self._steps = None

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self._step

    @property
    def store(self) -> StoreLike:
        """What is written: the given store, or with if_exists="next" maybe one beside it."""
        return self._destination.store

    @property
    def store_name(self) -> str:
        """The name of `store` in its folder, such as "run-2.zarr"; "" for stores without a name."""
        return name_of(self.store)

    def log(
        self, /, *, tokens: int | None = None, at: int | None = None, **scalars: SupportsFloat
    ) -> None:
        """Log values for a step; they are kept if the step is recorded.

        The record of a step takes values until the next step begins, and until `flush`, `event` or
        `close`. Values that come later are dropped, with a warning.

        Args:
            tokens: tokens seen so far.
            at: the step that the values belong to: the next step (the default, for a loop that
                logs its loss before `optimizer.step()`) or the step just done.
            scalars: name -> a real number of Python or NumPy, or a tensor of one element. Names may
                be any text: `log(**{"loss/ce": loss})`. NaN reads as not logged.

        Raises:
            DynamicsError: a name is empty, or a value is no single real number. None is refused,
                too: leave out what was not measured.
        """
        step = self._step + 1 if at is None else whole_number(at)
        if step is None:
            raise DynamicsError(f"log() takes at=STEP, a whole number; found at={at!r}.")
        wanted = self._due(step)
        values = {name: scalar(name, value, wanted) for name, value in scalars.items()}
        seen = None if tokens is None else token_count(tokens)
        if step == self._step + 1:
            self._logged.update(values)
            self._tokens = self._tokens if seen is None else seen
        elif self._session is not None and not self._session.log(step, values, seen) and wanted:
            self._warn_of_late_values(step)

    def _warn_of_late_values(self, step: int) -> None:
        if not self._told_of_late_values:
            self._told_of_late_values = True
            warnings.warn(
                f"Values for step {step} were logged after step {self._step} and are dropped: "
                "log() takes values of the next step, and of the last one until flush(), event() "
                "or the step after it.",
                LateValuesWarning,
                stacklevel=3,
            )

    def event(self, kind: str, *, at: int | None = None, **attrs: Any) -> None:
        """Record an event after the step just done, or after step `at`.

        Args:
            kind: e.g. "merge", "optimizer_reset", or a word of your own.
            at: optimizer steps done.
            attrs: JSON-like facts about it, as they are now.

        Raises:
            DynamicsError: the recorder is not attached, or a fact cannot be written as JSON.
            RuntimeError: the writer failed.
        """
        step = self._step if at is None else whole_number(at)
        if step is None or step < 0:
            raise DynamicsError(f"event() takes at=STEP, a whole number; found at={at!r}.")
        happened = Event(step, kind, event_facts(kind, attrs))
        if self._steps is None:
            raise DynamicsError("This recorder is not attached; call attach() or use 'with'.")
        self._may_change = True  # an event such as a merge changes weights
        if self._session is not None:
            self._session.event(happened)

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
        step = self._unchanged_step
        if step is None or self._may_change or self._warned_of_changes:
            return
        if names := self._since_record.changed():
            self._warned_of_changes = True
            warn_of_changes(step, names)

    def _step_begins(self) -> None:
        self._unchanged_step = None
        self.hand_over()

    @outside_of_contexts()
    def _take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if self._due(self._step + 1):
            self._gradients.take(optimizer)

    @outside_of_contexts()
    def _step_done(self) -> None:
        self._step += 1
        self.thread = threading.current_thread()
        if self._due(self._step):
            self._gradients.finish()
            record = self._filled_record()
            record.logged |= self._logged
            record.tokens = self._tokens
            self._keep(record)
        self._logged, self._tokens = {}, None
        self._arm_if_due()

    @outside_of_contexts()
    def _arm_if_due(self) -> None:
        if self._due(self._step + 1):
            self._gradients.arm()

    @outside_of_contexts()
    def _filled_record(self) -> Record:
        rates = {name: real_number(rate) for name, rate in learning_rates(self._optimizers).items()}
        record = Record(
            self._step, {name: rate for name, rate in rates.items() if rate is not None}
        )
        self._contents.fill(record, self._gradients.pop())
        self._may_change = False
        self._warn_of_other_wrappers()
        return record

    def _keep(self, record: Record | None) -> None:
        if record is None:
            return
        if self._session is None:
            self._contents.release(record)
        else:
            self._session.add(record)
            self._unchanged_step = record.step
            self._since_record.note()

    def _warn_of_other_wrappers(self) -> None:
        """Say once that adapters came or went, so that weights are no longer what was attached."""
        if self._warned_of_wrappers or weight_wrappers(self._model) == self._wrappers:
            return
        self._warned_of_wrappers = True
        warnings.warn(
            f"Step {self._step}: adapters or parametrisations of the model came or went since the "
            "recorder was made, and weights are recorded as it found them then. Close it, and "
            "continue the recording with a new Recorder(resume_at=step).",
            UnmeasuredWarning,
            stacklevel=2,
        )


def _refuse_meta(tracked: Sequence[Tracked]) -> None:
    without = [each.name for each in tracked if any(part.is_meta for part in each.weight.parts)]
    if without:
        raise DynamicsError(
            f"{len(without)} of {len(tracked)} selected weights, such as {without[0]}, are on the "
            "meta device and have no values: load the model, or move it with to_empty(), first."
        )


def _checked_step(resume_at: object) -> int | None:
    step = None if resume_at is None else whole_number(resume_at)
    if resume_at is not None and (step is None or step < 0):
        raise DynamicsError(
            f"resume_at takes the number of optimizer steps done, or None; found {resume_at!r}."
        )
    return step


def _checked_attrs(attrs: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(attrs or {})))
    except (TypeError, ValueError, RecursionError) as error:
        raise DynamicsError(
            f"attrs takes names and values that JSON can hold; found {attrs!r} ({one_line(error)})."
        ) from error
    if taken := {"format", "format_version"} & plain.keys():
        raise DynamicsError(f"attrs may not set {min(taken)!r}, which says what the store is.")
    return plain
