"""follow(): the analysis of a run in progress, measured anew whenever there is something new."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import xarray as xr

from dynamics import schema
from dynamics.analysis.analyze import StoppedError, UnmeasuredWarning, measure
from dynamics.analysis.selection import Selection, selected
from dynamics.errors import FormatError, MissingError
from dynamics.runs.run import Run
from dynamics.schema import Status
from dynamics.spectra.gpu_backend import CPU

_NAP = 0.1  # seconds between two looks at `stopped`


def follow(
    open_run: Callable[[], Run],
    *,
    stopped: Callable[[], bool],
    interval: float = 10.0,
    cache: str | Path | None = None,
    strict: bool = False,
    workers: int = 1,
    scheduler: str | None = None,
    device: str = CPU,
    waiting: Callable[[str | None], object] = lambda reason: None,
    before: Callable[[Selection], object] = lambda chosen: None,
    metrics: Iterable[str] | None = None,
    components: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    steps: Callable[[Run], Iterable[int] | None] = lambda run: None,
    select: str | Sequence[str] | None = None,
) -> Iterator[xr.Dataset]:
    """The analysis of a run, again each time that it has changed, until `stopped` says so.

    The run is opened anew at every look. Where its steps, events, scalars and the origins of its
    matrices are what they were, nothing is read; where a matrix has no origin (`Run.origin`), a
    change of it alone goes unseen until there is something else new. What cannot be measured yet
    (no run, no record, no matrix of a kind) is waited for; a checkpoint that cannot be read is
    tried again at each look, and once more before the end.

    Args:
        open_run: opens the run.
        stopped: whether to end; asked ten times a second, and between two matrices.
        interval: seconds between the end of an analysis and the next look.
        cache: see `analyze`; without it, whatever is new lets everything be measured again.
        strict: see `analyze`; a checkpoint that cannot be read is waited for here.
        workers: see `analyze`; processes start anew for each analysis.
        scheduler: see `analyze`.
        device: see `analyze`.
        waiting: called with why there is nothing to measure when that begins, with None when it
            ends.
        before: called with what is going to be measured; may raise.
        metrics: see `analyze`.
        components: see `analyze`.
        kinds: see `analyze`.
        steps: gives the steps to measure of what there is; all by default.
        select: see `analyze`.

    Yields:
        What `analyze` returns. `attrs["problems"]` is no warning: a file may just be half written.
        Of two analyses that differ in these texts alone only one comes before the end.

    Raises:
        MissingError: an unknown metric, component or kind, or no matrix is selected.
        DynamicsError: what `open_run`, `before` and `analyze` raise besides FormatErrors.
    """
    metrics, components, kinds = (_listed(each) for each in (metrics, components, kinds))
    state: object = None
    last: xr.Dataset | None = None
    unreadable = is_waiting = False
    while True:
        ending = stopped()
        if ending and not unreadable:
            return
        try:
            run = open_run()
            chosen = _selected(run, metrics, components, kinds, steps(run), select)
            found = _state(chosen)
            if found != state or unreadable:
                before(chosen)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UnmeasuredWarning)
                    result = measure(
                        chosen,
                        cache=cache,
                        strict=strict,
                        workers=workers,
                        scheduler=scheduler,
                        device=device,
                        stopped=(lambda: False) if ending else stopped,
                    )
                if is_waiting:
                    waiting(None)
                state, is_waiting = found, False
                unreadable = bool((result[schema.STATUS] == Status.UNREADABLE).any())
                if not _same(result, last, but_for_problems=not ending):
                    last = result
                    yield result
        except StoppedError:
            return
        except (FormatError, _NotYetError) as reason:
            if not is_waiting:
                waiting(str(reason))
            is_waiting, state = True, None
        if ending:
            return
        _sleep(interval, stopped)


class _NotYetError(MissingError):
    """What was asked for is not there, but may come."""


def _selected(
    run: Run,
    metrics: list[str] | None,
    components: list[str] | None,
    kinds: list[str] | None,
    steps: Iterable[int] | None,
    select: str | Sequence[str] | None,
) -> Selection:
    if not run.steps.size or (steps is not None and not (steps := list(steps))):
        raise _NotYetError(f"{run.path} has no records to measure yet.")
    for kind in kinds or ():
        if kind in schema.KINDS and kind not in (*run.kinds, *run.absent_kinds):
            raise _NotYetError(f"{run.path} has no {kind} matrices yet.")
    return selected(
        run, metrics=metrics, components=components, kinds=kinds, steps=steps, select=select
    )


def _state(chosen: Selection) -> tuple[object, ...]:
    """All that tells, without reading matrices, whether a run is what it was."""
    run = chosen.run
    return (
        chosen.steps,
        chosen.kinds,
        run.steps.tolist(),
        list(run.matrices),
        dict(run.attrs),
        run.events,
        dict(run.problems),
        {name: series.tobytes() for name, series in run.scalars.items()},
        [
            run.origin(name, step, kind)
            for name in run.matrices
            for step in chosen.steps
            for kind in run.stored_kinds
        ],
    )


def _same(result: xr.Dataset, last: xr.Dataset | None, *, but_for_problems: bool) -> bool:
    if last is None:
        return False
    if but_for_problems:
        result, last = (each.assign_attrs(problems="") for each in (result, last))
    return result.identical(last)


def _listed(items: Iterable[str] | None) -> list[str] | None:
    return None if items is None else list(items)


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    # In naps: a signal handler interrupts none of Python's sleeps and waits.
    end = time.monotonic() + seconds
    while not stopped() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _NAP))
