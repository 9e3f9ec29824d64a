"""The recorder: streams weights, gradients and adapters of a training run to Zarr."""

import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self, SupportsFloat

from torch import nn

from dynamics.errors import DynamicsError
from dynamics.recordings import Compression, StoreLike, name_of
from dynamics.runs.run import Event
from probes.contexts import outside_of_contexts
from probes.gradients.of_step import StepGradients
from probes.gradients.stepped import warn_of_no_optimizer
from probes.live.metrics import LiveMetrics
from probes.live.settings import Live, live_settings
from probes.model.account import announce
from probes.model.parameters import Selection, track
from probes.model.provenance import adapter_config, model_config, package_versions
from probes.model.sharding import is_rank_0, refuse_unreadable, wait_for_ranks
from probes.optimizers.nesting import given_optimizers, optimizers_of
from probes.records import process_end
from probes.records.background_writer import BLOCK, check_policy
from probes.records.contents import DEFAULT_CONTENTS, check_contents, recorded_kinds
from probes.records.matrices import MatrixContents
from probes.records.opening import (
    REFUSE,
    Destination,
    NewRecordingWarning,
    checked_attrs,
    checked_step,
)
from probes.records.rounding import StorageRounding
from probes.records.scalars import event_facts, scalar, token_count
from probes.records.session import Session
from probes.records.spectra import SpectrumContents
from probes.records.step_records import StepRecords
from probes.schedule import Schedule, whole_number
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
        live: a `probes.Live`: metrics that reach your tracker while the model trains.

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
        live: Live | bool | None = None,
    ):
        check_contents(record, spectra_only)
        shown = live_settings(live)
        if spectra_only and (storage_dtype is not None or when_full != BLOCK):
            raise DynamicsError(
                "spectra_only=True stores no matrices that storage_dtype could round, and its "
                f"records are too small to drop; found storage_dtype={storage_dtype!r} and "
                f"when_full={when_full!r}: leave both out."
            )
        given = given_optimizers(optimizer)
        refuse_unreadable(model, given)
        optimizers = optimizers_of(model, given)
        scalers = (getattr(each, "scaler", None) for each in given)
        with outside_of_contexts():  # weights that adapters or parametrisations make are computed
            tracked, self.account = track(model, select)
        due: Schedule = every if callable(every) else every_n(every)
        self._writes = is_rank_0() if write is None else write
        words = frozenset(record)
        contents = SpectrumContents if spectra_only else MatrixContents
        self._contents = contents(tracked, words, self._writes)
        self._gradients = StepGradients(
            model,
            tracked,
            optimizers,
            words,
            process_group=process_group,
            grad_scaler=grad_scaler or next((each for each in scalers if each), None),
            writes=self._writes,
            keep=self._contents.keep,
        )
        check_policy(queue_size, when_full)
        self._queue_size, self._when_full = queue_size, when_full
        self._rounding = StorageRounding(storage_dtype)
        resumed = checked_step(resume_at)
        self._attrs = {
            "config": model_config(model),
            **adapter_config(model),
            "account": self.account.to_json(),
            "gradient": self._gradients.definition,
            "versions": package_versions(),
            **checked_attrs(attrs),
        }
        compressed = Compression(compression, level)
        self._destination = Destination(
            store, if_exists, resumed, self._attrs, compressed, take_over
        )
        self._live: LiveMetrics | None = None
        if shown is not None:
            measured = LiveMetrics(shown, recorded_kinds(words, spectra_only), spectra_only)
            self._live = measured if self._writes else None
        self._say_what_trains = partial(warn_of_no_optimizer, model, tracked, optimizers)
        self._records = StepRecords(
            model,
            given,
            optimizers,
            tracked,
            self._contents,
            self._gradients,
            due,
            resumed or 0,
        )

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
        records = self._records
        if records.attached or records.session is not None:
            raise DynamicsError("This recorder is already attached; close() it first.")
        try:
            self._begin(continuing)
        except BaseException:
            session = records.session
            self.forget()
            if session is not None:
                session.discard()
            raise
        return self

    def _begin(self, continuing: str | None) -> None:
        records, ranks = self._records, self._gradients.needed_ranks
        if self._writes:
            announce(self.account)
            self._say_what_trains()
        latest = records.latest_due(self._queue_size + 3)  # a killed writer can lose all but one
        if len(ranks) > 1:
            wait_for_ranks(ranks)
        if self._writes:
            continued = self._destination.choose(latest, continuing)
            if continued is not None:
                self._contents.resume(continued)
            if self._live is not None:
                self._live.begin(self._attrs if continued is None else continued.attrs, continued)
        first = records.begin()
        if self._writes:  # last, because all before can fail
            policy = self._queue_size, self._when_full
            records.session = Session.begin(
                self._destination, self._contents, self._rounding, *policy, self._live
            )
        records.keep(first)
        process_end.add(self)
        if self._destination.news:
            warnings.warn(self._destination.news, NewRecordingWarning, stacklevel=4)

    def hand_over(self) -> None:
        """Give the last record to the writer now; afterwards, its step can log nothing more.

        Raises:
            RuntimeError: the writer failed.
        """
        if self._records.session is not None:
            self._records.session.hand_over()

    def flush(self) -> None:
        """Wait until every record so far is written; afterwards, its step can log nothing more.

        Raises:
            RuntimeError: the writer failed.
        """
        if self._records.session is not None:
            self._records.session.flush()

    def close(self) -> None:
        """Remove the hooks and finish writing. Safe to call twice.

        A recorder that nobody closes is closed when the process ends.

        Raises:
            RuntimeError: the writer failed.
        """
        try:
            self._records.finish()
        finally:  # also where a filter makes errors of warnings
            self._records.remove_hooks()
            try:
                if self._records.session is not None:
                    self._records.session.close()
            except Exception:
                self.forget()
                raise
            self.forget()  # not before: after an interruption, another call of close goes on

    def forget(self) -> None:
        """Remove the hooks, and write nothing more: the end in a process that was forked."""
        self._records.remove_hooks()
        self._records.session = None
        process_end.remove(self)

    def __enter__(self) -> Self:
        return self if self._records.attached else self.attach()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self._records.step

    @property
    def thread(self) -> threading.Thread:
        """The thread that trains."""
        return self._records.thread

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
        step = self.step + 1 if at is None else whole_number(at)
        if step is None:
            raise DynamicsError(f"log() takes at=STEP, a whole number; found at={at!r}.")
        wanted = self._records.is_due(step)
        values = {name: scalar(name, value, wanted) for name, value in scalars.items()}
        self._records.log(step, values, None if tokens is None else token_count(tokens))

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
        step = self.step if at is None else whole_number(at)
        if step is None or step < 0:
            raise DynamicsError(f"event() takes at=STEP, a whole number; found at={at!r}.")
        happened = Event(step, kind, event_facts(kind, attrs))
        if not self._records.attached:
            raise DynamicsError("This recorder is not attached; call attach() or use 'with'.")
        self._records.may_change = True  # an event such as a merge changes weights
        if self._records.session is not None:
            self._records.session.event(happened)

    def skip_step(self) -> None:
        """Count a step that your training counts although no optimizer took it.

        A gradient scaler skips the step when it finds Inf. Plain loops do not count such a step,
        but the Trainer and Lightning do, and they name checkpoints after it. Its record has the
        unchanged weights and no gradient, and an event "skipped_step" says why.
        """
        self.event(SKIPPED_STEP, at=self.step + 1)
        self._records.skip()
