"""compare() and difference(): several runs in one Dataset, along the dimension `run`."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.analysis.analyze import Progress, measure
from dynamics.analysis.execution import Execution, ExecutionOptions, execution_with
from dynamics.analysis.selection import Selection, SelectionOptions, Steps, selection_of
from dynamics.analysis.storage import is_analysis, load
from dynamics.errors import DynamicsError, MissingError
from dynamics.formats import open_run
from dynamics.runs.run import Run

# Attributes that become JSON objects by run -> what a run without them has.
_OF_RUNS = {"events": "[]", "problems": "[]", "account": "null", "left_out": "{}"}


def compare(
    runs: Mapping[str, xr.Dataset | Run | str | Path],
    *,
    progress: Progress | None = None,
    execution: Execution | None = None,
    metrics: Iterable[str] | None = None,
    components: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    steps: Steps | None = None,
    select: str | Sequence[str] | None = None,
    **options: Unpack[ExecutionOptions],
) -> xr.Dataset:
    """Several analyses side by side.

    Args:
        runs: label -> an analysis, or a run, or the path of one of the two. Runs are measured.
        progress: see `analyze`; the label of the run stands before the matrix's name.
        execution: how runs are measured, see `analyze`. They share one cache.
        metrics: see `analyze`; this and the following hold for the runs that are measured.
        components: see `analyze`.
        kinds: see `analyze`.
        steps: see `analyze`.
        select: see `analyze`.
        options: fields of `Execution`.

    Returns:
        The union of their kinds, steps and matrices with a new first dimension `run`. Where one
        run lacks what another one has, values are NaN and `status` is "not_recorded". `rows` and
        `cols` get the dimension `run` too where the runs' shapes differ. The attributes `events`,
        `problems`, `account` and `left_out` become JSON objects by run.

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
    }
    # All of them before the work begins: what cannot be served is refused at once.
    planned = {label: _planned(label, each, choice) for label, each in runs.items()}
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
            fill_value={schema.STATUS: np.int8(schema.Status.NOT_RECORDED)},
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
    return both.assign_coords(_matrix_coords(list(analyses.values()), matrices))


def _planned(
    label: str, run: xr.Dataset | Run | str | Path, choice: SelectionOptions
) -> xr.Dataset | Selection:
    """The analysis of a run, if it is one, or what will be measured of it."""
    if not isinstance(run, xr.Dataset | Run) and is_analysis(run):
        run = load(run)
    if not isinstance(run, xr.Dataset):
        return selection_of(run if isinstance(run, Run) else open_run(run), **choice)
    if schema.RUN in run.dims:
        raise DynamicsError(f"{label!r} compares runs already; give single-run analyses.")
    return run


def _labelled(progress: Progress | None, label: str) -> Progress | None:
    return progress and (lambda done, total, name: progress(done, total, f"{label}: {name}"))


def difference(comparison: xr.Dataset, *, baseline: str) -> xr.Dataset:
    """Every other run minus the baseline run, value by value.

    NaN where either was not measured. The variables `status`, `singular_value_error` and
    `noise_floor` describe single runs and are left out.

    Raises:
        DynamicsError: `comparison` has no dimension `run`.
        MissingError: no run is called `baseline`.

    Example:
        >>> runs = {"full": "full/run.zarr", "relora": "relora/run.zarr"}
        >>> both = dy.compare(runs, kinds=["weight"])
        >>> dy.difference(both, baseline="full").run.values.tolist()
        ['relora']
    """
    if schema.RUN not in comparison.dims:
        raise DynamicsError("difference() takes what compare() returns: it has a dimension 'run'.")
    labels = comparison[schema.RUN].values.tolist()
    if baseline not in labels:
        raise MissingError(f"No run {baseline!r} in this comparison; it has {', '.join(labels)}.")
    described = (schema.STATUS, schema.SINGULAR_VALUE_ERROR, schema.NOISE_FLOOR)
    values = comparison.drop_vars([name for name in described if name in comparison])
    others = values.sel({schema.RUN: [label for label in labels if label != baseline]})
    with xr.set_options(keep_attrs=True):
        result = others - values.sel({schema.RUN: baseline}, drop=True)
    return result.assign_attrs(comparison.attrs, baseline=baseline)


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
        raise MissingError(f"No run {run!r} in this result; it has {known}.")
    own = {
        name: json.dumps(json.loads(comparison.attrs[name])[run])
        for name in _OF_RUNS
        if name in comparison.attrs
    }
    return comparison.sel({schema.RUN: run}).assign_attrs(own)


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
