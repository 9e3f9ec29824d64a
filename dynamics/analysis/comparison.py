"""compare(): several runs in one Dataset, along the dimension `run`."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.analysis.analyze import Agree, Progress, cost_of, measure
from dynamics.analysis.execution import Execution, ExecutionOptions, execution_with
from dynamics.analysis.selection import Selection, SelectionOptions, Steps, selection_of
from dynamics.analysis.settings import with_settings
from dynamics.analysis.storage import is_analysis, load
from dynamics.errors import DynamicsError, IntervalWarning, MissingError, near
from dynamics.formats import open_run
from dynamics.runs.intervals import IntervalRun, References, common_references, own_references
from dynamics.runs.run import Run
from dynamics.schema import Status

# Attributes that become JSON objects by run -> what a run without them has.
_OF_RUNS = {
    "events": "[]",
    "problems": "[]",
    "account": "null",
    "left_out": "{}",
    "passed_over": "{}",
    schema.AUDITS: "null",
}
# What tells where the numbers of a run are from.
_OF_SOURCE = ("source", "source_format", "versions", "measured_by", schema.COMMAND, schema.MADE)


def compare(
    runs: Mapping[str, xr.Dataset | Run | str | Path],
    *,
    progress: Progress | None = None,
    agree: Agree | None = None,
    execution: Execution | None = None,
    metrics: Iterable[str] | None = None,
    components: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    steps: Steps | None = None,
    select: str | Sequence[str] | None = None,
    lag: int | None = None,
    **options: Unpack[ExecutionOptions],
) -> xr.Dataset:
    """Several analyses side by side.

    An `update` is over the same interval in all runs that have its step: from the last record
    before it that all of them have. Without such a record, in saved analyses and in recordings of
    spectra, intervals stay what they are. `reference_step` says where each begins.

    Args:
        runs: label -> an analysis, or a run, or the path of one of the two. Runs are measured.
        progress: see `analyze`; the label of the run stands before the matrix's name.
        agree: see `analyze`; called for each run before the first one is measured.
        execution: how runs are measured, see `analyze`. They share one cache.
        metrics: see `analyze`; this and the following hold for the runs that are measured.
        components: see `analyze`.
        kinds: see `analyze`.
        steps: see `analyze`.
        select: see `analyze`.
        lag: see `analyze`.
        options: fields of `Execution`.

    Returns:
        The union of their kinds, steps and matrices with a new first dimension `run`. Where one
        run lacks what another one has, values are NaN and `status` is "not_recorded". `rows` and
        `cols` get the dimension `run` too where the runs' shapes differ. Each setting in which the
        runs differ is a coordinate along `run`: of the model's config, the trainer's arguments, the
        adapter, and the recorder's `attrs`; NaN or "" where a run does not have it. The attributes
        `events`, `problems`, `account`, `left_out`, `passed_over` and `audits` become JSON objects
        by run, and `sources` tells what each run was measured from.

    Warns:
        IntervalWarning: updates or displacements of one step are over different intervals.

    Raises:
        DynamicsError: fewer than two runs, or an analysis that already compares runs.

    Example:
        >>> runs = {"full": "full/run.zarr", "relora": "relora/run.zarr"}
        >>> both = dy.compare(runs, kinds=["weight"])
        >>> both.run.values.tolist()
        ['full', 'relora']
    """
    if len(runs) < 2:
        raise DynamicsError(f"Comparing takes two runs or more; found {len(runs)}: {list(runs)}.")
    execution = execution_with(execution, options)
    choice: SelectionOptions = {
        "metrics": None if metrics is None else list(metrics),
        "components": None if components is None else list(components),
        "kinds": None if kinds is None else list(kinds),
        "steps": steps if steps is None or isinstance(steps, str) else list(steps),
        "select": select,
        "lag": lag,
    }
    opened = {label: _opened(label, each) for label, each in runs.items()}
    if lag is None:
        opened = _on_common_intervals(opened, choice["kinds"])
    # All of them before the work begins: what cannot be served is refused at once.
    planned = {
        label: each if isinstance(each, xr.Dataset) else selection_of(each, **choice)
        for label, each in opened.items()
    }
    for each in planned.values():
        if isinstance(each, Selection) and agree is not None:
            cost = cost_of(each, execution)
            if cost is not None:
                agree(cost)
    analyses = {
        label: each
        if isinstance(each, xr.Dataset)
        else measure(each, execution, progress=_labelled(progress, label))
        for label, each in planned.items()
    }
    all_steps = sorted(
        {step for each in analyses.values() for step in each[schema.STEP].values.tolist()}
    )
    all_kinds = [
        kind
        for kind in schema.KINDS
        if any(kind in each[schema.KIND] for each in analyses.values())
    ]
    matrices = list(
        dict.fromkeys(
            name for each in analyses.values() for name in each[schema.MATRIX].values.tolist()
        )
    )
    width = max(each.sizes[schema.INDEX] for each in analyses.values())
    aligned = [
        each.reset_coords(schema.MATRIX_COORDS, drop=True).reindex(
            {
                schema.STEP: all_steps,
                schema.KIND: all_kinds,
                schema.MATRIX: matrices,
                schema.INDEX: np.arange(width),
            },
            fill_value={
                schema.STATUS: np.int8(Status.NOT_RECORDED),
                schema.REFERENCE_STEP: np.int64(schema.NO_STEP),
            },
        )
        for each in analyses.values()
    ]
    both = xr.concat(
        aligned,
        xr.Variable(schema.RUN, list(analyses)),
        data_vars="all",
        join="exact",
        combine_attrs="drop_conflicts",
        fill_value=np.nan,
    )
    for name, none in _OF_RUNS.items():
        by_run = {label: json.loads(each.attrs.get(name, none)) for label, each in analyses.items()}
        both.attrs[name] = json.dumps(by_run)
    sources = {
        label: {name: each.attrs[name] for name in _OF_SOURCE if name in each.attrs}
        for label, each in analyses.items()
    }
    both.attrs[schema.SOURCES] = json.dumps(sources)
    both = both.assign_coords(_matrix_coords(list(analyses.values()), matrices))
    both = with_settings(both, analyses)
    for line in (*_unavailable(planned), *_differing_intervals(both)):
        warnings.warn(line, IntervalWarning, stacklevel=2)
    return both


def _opened(label: str, run: xr.Dataset | Run | str | Path) -> xr.Dataset | Run:
    """The analysis of a run, if it is one, or the run."""
    if not isinstance(run, xr.Dataset | Run):
        run = load(run) if is_analysis(run) else open_run(run)
    if not isinstance(run, xr.Dataset):
        return run
    if schema.RUN in run.dims:
        raise DynamicsError(f"{label!r} compares runs already; give single-run analyses.")
    if schema.REFERENCE_STEP in run:
        return run
    unknown = np.full((run.sizes[schema.KIND], run.sizes[schema.STEP]), schema.NO_STEP)
    return run.assign({schema.REFERENCE_STEP: ((schema.KIND, schema.STEP), unknown)})


def _on_common_intervals(
    opened: dict[str, xr.Dataset | Run], kinds: Iterable[str] | None
) -> dict[str, xr.Dataset | Run]:
    """The runs with updates over common intervals, see `common_references`."""
    own: dict[str, References] = {}
    for label, each in opened.items():
        if isinstance(each, xr.Dataset):
            own[label] = _known_references(each)
        elif schema.UPDATE in each.kinds and (kinds is None or schema.UPDATE in kinds):
            own[label] = own_references(each)
    fixed = {
        label
        for label, each in opened.items()
        if isinstance(each, xr.Dataset) or schema.UPDATE in each.spectrum_kinds
    }
    common = common_references(own, fixed)
    return {
        label: IntervalRun(each, common[label])
        if isinstance(each, Run) and label in own and common[label] != own[label]
        else each
        for label, each in opened.items()
    }


def _known_references(analysis: xr.Dataset) -> References:
    """Where the updates of an analysis begin, for all records of its run that it tells of."""
    if schema.UPDATE not in analysis[schema.KIND]:
        return {}
    starts = analysis[schema.REFERENCE_STEP].sel({schema.KIND: schema.UPDATE}).values.tolist()
    known = {
        step: None if start == schema.NO_STEP else start
        for step, start in zip(analysis[schema.STEP].values.tolist(), starts, strict=True)
    }
    return {start: None for start in starts if start != schema.NO_STEP} | known


def _unavailable(planned: Mapping[str, xr.Dataset | Selection]) -> Iterator[str]:
    """A line for each run whose recorded updates are not over the intervals that are compared."""
    for label, each in planned.items():
        view = None if isinstance(each, xr.Dataset) else each.run.untraced
        if not isinstance(view, IntervalRun) or schema.UPDATE not in view.spectrum_kinds:
            continue
        asked = {step: view.update_reference(step) for step in each.steps}
        lost = [
            step for step in each.steps if asked[step] is not None and not view.is_recorded(step)
        ]
        if lost:
            recorded = view.inner.update_reference(lost[0])
            yield (
                f"{label!r} holds the singular values of its update {_interval(recorded, lost[0])}"
                f"{_and_more(lost)}, and not of {_interval(asked[lost[0]], lost[0])}: not recorded."
            )


def _differing_intervals(both: xr.Dataset) -> Iterator[str]:
    """A line for each kind whose values at a step are over different intervals in two runs."""
    measured = (both[schema.STATUS] == Status.MEASURED).any(schema.MATRIX)
    starts = both[schema.REFERENCE_STEP].where(measured, schema.NO_STEP)
    # Cycles differ where runs are merged at different steps: that is what they are.
    for kind in (schema.UPDATE, schema.DISPLACEMENT):
        if kind not in both[schema.KIND]:
            continue
        of_kind = starts.sel({schema.KIND: kind})
        known = of_kind.where(of_kind != schema.NO_STEP)
        differ = (known.min(schema.RUN) < known.max(schema.RUN)).values
        steps = both[schema.STEP].values[differ].tolist()
        if steps:
            first = of_kind.sel({schema.STEP: steps[0]})
            labels = both[schema.RUN].values.tolist()
            runs = [
                f"{label!r} {_interval(start, steps[0])}"
                for label, start in zip(labels, first.values.tolist(), strict=True)
                if start != schema.NO_STEP
            ]
            yield (
                f"The {kind} of these runs is over different intervals{_and_more(steps)}: "
                f"{', '.join(runs)}; measure all of them with one lag, or compare the "
                "runs themselves in place of their analyses."
            )


def _interval(start: int | None, end: int) -> str:
    return f"from step {start} to {end}"


def _and_more(steps: Sequence[int]) -> str:
    return f" (and at {len(steps) - 1} more steps)" if len(steps) > 1 else ""


def _labelled(progress: Progress | None, label: str) -> Progress | None:
    return progress and (lambda done, total, name: progress(done, total, f"{label}: {name}"))


def select_run(comparison: xr.Dataset, run: str) -> xr.Dataset:
    """One run of a comparison, as a dataset without the dimension `run` and with its own events.

    Raises:
        MissingError: no run is called `run`, or this is not a comparison.

    Example:
        >>> runs = {"full": "full/run.zarr", "relora": "relora/run.zarr"}
        >>> both = dy.compare(runs, kinds=["weight"])
        >>> "run" in dy.select_run(both, "relora").dims
        False
    """
    labels = comparison[schema.RUN].values.tolist() if schema.RUN in comparison.dims else []
    if run not in labels:
        known = ", ".join(labels) or "one run without a name"
        raise MissingError(f"No run {run!r}{near(run, labels)} in this result; it has {known}.")
    noted = {n: json.loads(comparison.attrs[n]) for n in _OF_RUNS if n in comparison.attrs}
    # Before some of them were kept by run, what all runs had in common stood in their place.
    own = {
        name: json.dumps(by_run[run])
        for name, by_run in noted.items()
        if isinstance(by_run, dict) and run in by_run
    }
    source = json.loads(comparison.attrs.get(schema.SOURCES, "{}")).get(run, {})
    return comparison.sel({schema.RUN: run}).assign_attrs(own | source)


def _matrix_coords(analyses: list[xr.Dataset], matrices: list[str]) -> dict[str, Any]:
    """The coordinates of the union's matrices: from the first run that has each."""
    coords: dict[str, Any] = {}
    for name in schema.MATRIX_COORDS:
        known = [
            dict(zip(each[schema.MATRIX].values.tolist(), each[name].values.tolist(), strict=True))
            for each in analyses
        ]
        if all(
            row.get(m, first) == first
            for m in matrices
            for first in [_first(known, m)]
            for row in known
        ):
            coords[name] = (schema.MATRIX, [_first(known, m) for m in matrices])
        else:
            coords[name] = (
                (schema.RUN, schema.MATRIX),
                [[row.get(m, _first(known, m)) for m in matrices] for row in known],
            )
    return coords


def _first(rows: list[dict[str, Any]], matrix: str) -> Any:
    return next(row[matrix] for row in rows if matrix in row)
