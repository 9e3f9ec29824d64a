"""How each tracker is called: with single values, with a dict, and with which step."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dynamics.errors import DynamicsError

Values = dict[str, float]
STEP = "rank/step"
_ALARM = "rank/alarm"
_TITLE = "A check of the recorded training failed"


class Tracker(Protocol):
    """Who gets the values."""

    def log(self, values: Values, step: int) -> None:
        """Show these values at this step, which may lie before what was shown last."""

    def alarm(self, text: str, step: int) -> None:
        """Show that a check failed; nothing where there is no place for it."""


def tracker_of(to: Any) -> Tracker:
    """Who is meant by `Live(to=...)`."""
    if hasattr(to, "log") and hasattr(to, "alarm"):
        tracker: Tracker = to
        return tracker
    owner = getattr(to, "__self__", None)
    if getattr(to, "__name__", "") == "add_scalar":
        return OneByOne(to)
    if _is_of(owner, "wandb") or (owner is None and _package(to) == "wandb"):
        return WandB(owner)
    if _is_of(owner, "accelerate") and hasattr(owner, "trackers"):
        return Accelerate(owner)
    return Function(to)


class Function:
    """Any function of (values, step): trackio.log, mlflow.log_metrics, a logger of Lightning."""

    def __init__(self, function: Callable[[Values, int], Any]):
        self._function = function

    def log(self, values: Values, step: int) -> None:
        """See `Tracker`."""
        self._function(values, step)

    def alarm(self, text: str, step: int) -> None:
        """See `Tracker`; the warning says it."""


class OneByOne:
    """`SummaryWriter.add_scalar(key, value, step)` of TensorBoard."""

    def __init__(self, add_scalar: Callable[[str, float, int], Any]):
        self._add_scalar = add_scalar

    def log(self, values: Values, step: int) -> None:
        """See `Tracker`."""
        for key, value in values.items():
            self._add_scalar(key, value, step)

    def alarm(self, text: str, step: int) -> None:
        """A text beside the curves, where the writer takes texts."""
        add_text = getattr(getattr(self._add_scalar, "__self__", None), "add_text", None)
        if add_text is not None:
            add_text(_ALARM, text, step)


class WandB:
    """A run of W&B.

    W&B drops values with a step below its own, so the step is a value, `rank/step`, and the axis of
    the others. The values join the row that is not finished yet: a row of their own would move the
    step of the run on, and W&B would drop what you log with that step. Only where this row has
    values of an earlier record already is it finished first.

    Args:
        run: a `wandb.Run`, or None for the one that is active.
    """

    def __init__(self, run: Any = None):
        self._given, self._run = run, None
        self._row: int | None = None  # in which values of an earlier record may wait

    def log(self, values: Values, step: int) -> None:
        """See `Tracker`."""
        run = self._active()
        if run is not self._run:
            self._run, self._row = run, None
            run.define_metric(STEP)
            run.define_metric("rank/*", step_metric=STEP)
        if run.step == self._row:
            run.log({}, commit=True)
        run.log({**values, STEP: step}, commit=False)
        self._row = run.step

    def alarm(self, text: str, step: int) -> None:
        """An alert, which W&B also sends by mail if you like."""
        self._active().alert(title=_TITLE, text=text)

    def _active(self) -> Any:
        if self._given is not None:
            return self._given
        import wandb

        if wandb.run is None:
            raise DynamicsError("W&B has no active run: call wandb.init() first")
        return wandb.run


class Accelerate:
    """The trackers of an `Accelerator`, when `init_trackers` has made them."""

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator
        self._of_wandb: dict[int, WandB] = {}

    def log(self, values: Values, step: int) -> None:
        """See `Tracker`."""
        for each in self._accelerator.trackers:
            if each.name == "wandb":
                self._wandb(each).log(values, step)
            else:
                each.log(values, step=step)

    def alarm(self, text: str, step: int) -> None:
        """See `Tracker`."""
        for each in self._accelerator.trackers:
            if each.name == "wandb":
                self._wandb(each).alarm(text, step)

    def _wandb(self, tracker: Any) -> WandB:
        return self._of_wandb.setdefault(id(tracker), WandB(tracker.tracker))


class Loggers:
    """The loggers of Lightning: those that are there when values arrive."""

    def __init__(self, loggers: Callable[[], Sequence[Any]]):
        self._loggers = loggers

    def log(self, values: Values, step: int) -> None:
        """See `Tracker`."""
        for logger in self._loggers():
            logger.log_metrics(dict(values), step)

    def alarm(self, text: str, step: int) -> None:
        """See `Tracker`."""
        for logger in self._loggers():
            if _is_of(logger.experiment, "wandb"):
                WandB(logger.experiment).alarm(text, step)
            elif hasattr(logger.experiment, "add_text"):  # of TensorBoard
                logger.experiment.add_text(_ALARM, text, step)


def _is_of(owner: object, package: str) -> bool:
    return owner is not None and _package(type(owner)) == package


def _package(what: object) -> str:
    return str(getattr(what, "__module__", "") or "").partition(".")[0]
