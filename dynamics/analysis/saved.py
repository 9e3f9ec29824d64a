"""Results in files: an analysis that goes on from what is saved and never loses any of it."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.analysis.analyze import Agree, Progress, measure
from dynamics.analysis.comparison import compare
from dynamics.analysis.execution import Execution
from dynamics.analysis.following import follow
from dynamics.analysis.selection import Selection, SelectionOptions, selection_of
from dynamics.analysis.statistics import difference
from dynamics.analysis.storage import check_output, is_analysis, load, save
from dynamics.errors import DynamicsError, FormatError, MissingError, OutputExistsError, near
from dynamics.runs.run import Run
from dynamics.schema import Status


def analyze_and_save(
    run: Callable[[], Run],
    output: Path,
    execution: Execution,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    agree: Agree | None = None,
    command: str | None = None,
    **choice: Unpack[SelectionOptions],
) -> xr.Dataset:
    """Measure a run and save the result; whatever would be lost is refused beforehand.

    Args:
        run: opens the run.
        output: where the result goes. An earlier analysis of the same run may be there: it is
            replaced by one that has everything that it had.
        execution: how the run is measured.
        overwrite: whether the result may take the place of any other analysis, too.
        progress: see `analyze`.
        agree: see `analyze`.
        command: the command line, which the result keeps as an attribute.
        choice: what to measure, see `analyze`.

    Raises:
        OutputExistsError: something would be lost.
    """
    if not is_analysis(output):
        check_output(output, overwrite=overwrite)
    chosen = selection_of(run(), **choice)
    _check_update(output, chosen, overwrite=overwrite)
    result = _made_by(command, measure(chosen, execution, progress=progress, agree=agree))
    if not overwrite:
        _check_kept(output, result)
    save(result, output, overwrite=overwrite or output.exists())
    return result


def follow_and_save(
    run: Callable[[], Run],
    output: Path,
    execution: Execution,
    *,
    stopped: Callable[[], bool],
    say: Callable[[str], None],
    interval: float = 10.0,
    overwrite: bool = False,
    command: str | None = None,
    **choice: Unpack[SelectionOptions],
) -> list[str]:
    """Follow a run and save each analysis of it, until `stopped` says so.

    Args:
        run: opens the run.
        output: where the result goes, see `analyze_and_save`.
        execution: how the run is measured.
        stopped: see `follow`.
        say: prints a line: what was measured, or what is waited for.
        interval: see `follow`.
        overwrite: see `analyze_and_save`.
        command: see `analyze_and_save`.
        choice: what to measure, see `follow`.

    Returns:
        What is unmeasured in the end: the problems of the last analysis, or why there is none.
    """
    if not is_analysis(output):
        check_output(output, overwrite=overwrite)
    problems: list[str] = []
    missing: str | None = None
    saved = False

    def waiting(reason: str | None) -> None:
        nonlocal missing
        missing = reason
        if reason is not None:
            say(f"waiting: {reason}")

    def before(chosen: Selection) -> None:
        _check_update(output, chosen, overwrite=overwrite, rewound=saved)

    for result in follow(
        run,
        stopped=stopped,
        interval=interval,
        waiting=waiting,
        before=before,
        execution=execution,
        **choice,
    ):
        save(_made_by(command, result), output, overwrite=overwrite or output.exists())
        saved = True
        problems = json.loads(result.attrs["problems"])
        say(_progress_line(result))
    if missing is not None:
        return [*problems, missing]
    if not saved:
        return ["Stopped before the first analysis was done; run it again to go on."]
    say(f"Saved to {output}")
    return problems


def compare_and_save(
    runs: Mapping[str, xr.Dataset | Run | str | Path],
    output: Path,
    execution: Execution,
    *,
    baseline: str | None = None,
    pair: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    agree: Agree | None = None,
    command: str | None = None,
    **choice: Unpack[SelectionOptions],
) -> xr.Dataset:
    """Compare runs and save the comparison, or the differences from `baseline`.

    Args:
        runs: see `compare`.
        output: where the result goes.
        execution: how runs are measured.
        baseline: the run that is subtracted from the others; nothing is by default.
        pair: the setting whose value a run and the one that is subtracted have in common, see
            `difference`.
        overwrite: whether the result may replace another one.
        progress: see `analyze`.
        agree: see `compare`.
        command: see `analyze_and_save`.
        choice: what to measure, see `analyze`.

    Returns:
        The comparison itself, also where differences are saved.

    Raises:
        OutputExistsError: something would be lost.
        DynamicsError: there is a `pair` without a `baseline`; or runs are no pairs, one to one.
        MissingError: no run is called `baseline`, or there is no setting `pair`.
    """
    check_output(output, overwrite=overwrite)
    if pair is not None and baseline is None:
        raise DynamicsError(
            f"pair={pair!r} (--pair) pairs runs with those of a baseline; give one with baseline= "
            "(--baseline)."
        )
    if baseline is not None and pair is None and baseline not in runs:
        raise MissingError(
            f"The baseline {baseline!r}{near(baseline, runs)} is none of {', '.join(runs)}."
        )
    both = _made_by(
        command, compare(runs, progress=progress, agree=agree, execution=execution, **choice)
    )
    result = both if baseline is None else difference(both, baseline=baseline, pair=pair)
    save(result, output, overwrite=overwrite)
    return both


def _made_by(command: str | None, result: xr.Dataset) -> xr.Dataset:
    if command is None:
        return result
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return result.assign_attrs({schema.COMMAND: command, schema.MADE: made})


def _check_update(
    path: str | Path, planned: Selection, *, overwrite: bool, rewound: bool = False
) -> Path:
    """The path, if the analysis of `planned` may be saved there.

    As `check_output`, and it may also take the place of an analysis of the same source, as long as
    every kind, step, matrix and metric of that is measured again. With `rewound`, the run may have
    gone back since: only steps that it has passed by and no longer has count as lost.

    Raises:
        OutputExistsError: something would be lost, or see `check_output`.
    """
    path = Path(path)
    if overwrite or not is_analysis(path):
        return check_output(path, overwrite=overwrite)
    try:
        loss = _loss(load(path, without=(schema.SINGULAR_VALUE,)), planned, rewound=rewound)
    except FormatError as error:
        loss = f"and cannot be read ({error})"
    if loss is not None:
        raise OutputExistsError(
            f"{path} exists {loss}; choose another output (-o) or allow replacing it (--overwrite)."
        )
    return path


def _check_kept(path: str | Path, result: xr.Dataset) -> None:
    """Refuse a result in which what an analysis at `path` has measured is unreadable.

    Raises:
        OutputExistsError: a checkpoint was damaged or removed since.
    """
    if not is_analysis(path):
        return
    before = load(path, without=(schema.SINGULAR_VALUE,))
    now, old = xr.align(result[schema.STATUS], before[schema.STATUS], join="inner")
    lost = ((old == Status.MEASURED) & (now == Status.UNREADABLE)).any((schema.KIND, schema.MATRIX))
    if lost.any():
        raise OutputExistsError(
            f"{path} exists and has what is unreadable now, at step {_list(lost[lost].step)}: "
            f"{json.loads(result.attrs['problems'])[0]} Repair it, choose another output (-o), or "
            "allow replacing it (--overwrite)."
        )


def _loss(old: xr.Dataset, planned: Selection, *, rewound: bool) -> str | None:
    """What an analysis has that the planned one will not have, None if it is all there."""
    source = old.attrs.get("source")
    if source is None or schema.RUN in old.dims:
        return "and is not an analysis of a single run"
    if _place(source) != _place(planned.run.path):
        return f"and is an analysis of {source}, not of {planned.run.path}"
    steps = old[schema.STEP].values.tolist()
    lags = [old.attrs.get(schema.LAG), planned.lag]
    if lags[0] != lags[1] and schema.UPDATE in old[schema.KIND]:
        was, now = ("the previous record" if each is None else f"{each} steps" for each in lags)
        return f"and has updates since {was} before, which those since {now} before would replace"
    if rewound:
        passed = [each for each in steps if each < planned.steps[-1] and each not in planned.steps]
        return f"and this would lose {schema.STEP} {_list(passed)}" if passed else None
    of_cell = (schema.KIND, schema.STEP, schema.MATRIX)
    always = (
        schema.NOISE_FLOOR,
        schema.STORAGE_NOISE_FLOOR,
        schema.SINGULAR_VALUE_ERROR,
        schema.STATUS,
    )
    metrics = [name for name, each in old.data_vars.items() if each.dims == of_cell]
    matrices = [each.info.name for each in planned.matrices]
    for word, had, has in (
        (schema.KIND, old[schema.KIND].values.tolist(), planned.kinds),
        (schema.STEP, steps, planned.steps),
        (schema.MATRIX, old[schema.MATRIX].values.tolist(), matrices),
        ("metric", metrics, [*planned.metrics, *always]),
    ):
        lost = [each for each in had if each not in set(has)]
        if lost:
            return f"and this would lose {word} {_list(lost)}"
    return None


def _place(source: str) -> str:
    # Relative to where we are now, as `source` was to where it was written.
    return source if "://" in source else str(Path(source).resolve())


def _list(items: Any, at_most: int = 4) -> str:
    shown = [str(each) for each in np.asarray(items)[:at_most]]
    return ", ".join(shown) + (f" and {len(items) - at_most} more" if len(items) > at_most else "")


def _progress_line(result: xr.Dataset) -> str:
    status = result[schema.STATUS]
    measured, unreadable = (
        int((status == each).any((schema.KIND, schema.MATRIX)).sum())
        for each in (Status.MEASURED, Status.UNREADABLE)
    )
    line = f"step {int(result[schema.STEP][-1])}: {measured} steps measured"
    return f"{line}, {unreadable} not readable yet" if unreadable else line
