"""follow(): the analysis of a run in progress, again whenever there is something new."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Unpack

import xarray as xr

from dynamics import schema
from dynamics.analysis.analyze import StoppedError, measure
from dynamics.analysis.execution import Execution, ExecutionOptions, execution_with
from dynamics.analysis.selection import Selection, Steps, selection_of, steps_so_far
from dynamics.errors import FormatError, MissingError, UnmeasuredWarning
from dynamics.formats import open_run
from dynamics.runs.run import Run
from dynamics.schema import Status

_NAP = 0.1  # seconds between two looks at `stopped`


def follow(
    run: str | Path | Callable[[], Run],
    *,
    stopped: Callable[[], bool],
    interval: float = 10.0,
    waiting: Callable[[str | None], object] = lambda reason: None,
    before: Callable[[Selection], object] = lambda chosen: None,
    metrics: Iterable[str] | None = None,
    components: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    steps: Steps | None = None,
    select: str | Sequence[str] | None = None,
    lag: int | None = None,
    execution: Execution | None = None,
    **options: Unpack[ExecutionOptions],
) -> Iterator[xr.Dataset]:
    """The analysis of a run, again each time that the run has changed, until `stopped` says so.

    The run is opened anew at every look. Nothing is read where its steps, events, scalars and the
    origins of its matrices are the same as before. A matrix without an origin (`Run.origin`) can
    change unseen, until something else is new. What cannot be measured yet is waited for: a run
    that does not exist, a run without records, a run without matrices of a kind. A checkpoint that
    cannot be read is tried again at each look, and once more before the end.

    Args:
        run: the path of a run, or a function that opens it.
        stopped: whether to end; asked ten times a second, and between two matrices.
        interval: seconds between the end of an analysis and the next look.
        waiting: called with the reason when there is nothing to measure, and with None when there
            is something again.
        before: called with what is going to be measured; may raise.
        metrics: see `analyze`.
        components: see `analyze`.
        kinds: see `analyze`.
        steps: see `analyze`; those that the run has by now are measured.
        select: see `analyze`.
        lag: see `analyze`; two records that are so far apart are waited for.
        execution: see `analyze`. Without a cache, everything is measured again when anything is
            new. With `strict`, a checkpoint that cannot be read is still waited for. Processes
            start anew for each analysis.
        options: fields of `Execution`.

    Yields:
        What `analyze` returns. `attrs["problems"]` gives no warnings: a file may just be half
        written. Two analyses that differ in these texts alone are not both yielded before the end.

    Raises:
        MissingError: an unknown metric, component or kind, or no matrix is selected.
        DynamicsError: what opening, `before` and `analyze` raise, but for FormatErrors.

    Example:
        >>> results = dy.follow("run.zarr", stopped=lambda: False, kinds=["weight"])
        >>> next(results).sizes["kind"]  # the next one comes when the run has changed
        1
    """
    execution = execution_with(execution, options)
    opened = run if callable(run) else partial(open_run, run)
    metrics, components, kinds = (_listed(each) for each in (metrics, components, kinds))
    state: object = None
    last: xr.Dataset | None = None
    unreadable = is_waiting = False
    while True:
        ending = stopped()
        if ending and not unreadable:
            return
        try:
            chosen = _selection(opened(), metrics, components, kinds, steps, select, lag)
            present = _state(chosen)
            if present != state or unreadable:
                before(chosen)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UnmeasuredWarning)
                    result = measure(
                        chosen, execution, stopped=(lambda: False) if ending else stopped
                    )
                if is_waiting:
                    waiting(None)
                state, is_waiting = present, False
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


def _selection(
    run: Run,
    metrics: list[str] | None,
    components: list[str] | None,
    kinds: list[str] | None,
    steps: Steps | None,
    select: str | Sequence[str] | None,
    lag: int | None,
) -> Selection:
    present = steps_so_far(run, steps)
    if not run.steps.size or present == []:
        raise _NotYetError(f"{run.path} has no records to measure yet.")
    for kind in kinds or ():
        if kind in schema.KINDS and kind not in (*run.kinds, *run.absent_kinds):
            raise _NotYetError(f"{run.path} has no {kind} matrices yet.")
    if lag is not None and run.steps[-1] - run.steps[0] < lag:
        raise _NotYetError(f"{run.path} has no two records that are lag={lag} steps apart yet.")
    return selection_of(
        run,
        metrics=metrics,
        components=components,
        kinds=kinds,
        steps=present,
        select=select,
        lag=lag,
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
