"""The runs of a result as the report sees them: groups of seeds, and means over matrices."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.analysis.settings import settings_groups
from dynamics.analysis.statistics import STATISTIC, mean_interval
from dynamics.errors import DynamicsError
from dynamics.metrics.modules import metric_names, module_labels

SEED = "seed"
# Attributes that a comparison has as JSON objects by run.
_BY_RUN = ("events", "problems", "account", "left_out", "passed_over", schema.AUDITS)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; a run without such others is a group, too.

    Attributes:
        name: what the report calls them.
        runs: their positions along `run`.
        seeds: of each, None where a run has none.
    """

    name: str
    runs: tuple[int, ...]
    seeds: tuple[Any, ...]


@dataclass(frozen=True)
class Mean:
    """A mean over the runs of a group, and half of the 95 % interval; None for a single run."""

    value: float
    half: float | None


def comparison_of(dataset: xr.Dataset, name: str) -> xr.Dataset:
    """A result with the dimension `run`: of one run, that run is called `name`.

    Raises:
        DynamicsError: this is no result, or one of differences or of statistics over runs.
    """
    metrics = metric_names(dataset) if isinstance(dataset, xr.Dataset) else []
    if not metrics:
        raise DynamicsError("A report takes runs, or what analyze() or compare() returns.")
    if "baseline" in dataset.attrs:
        raise DynamicsError(
            f"This result holds differences from {dataset.attrs['baseline']!r}; give the "
            "comparison itself, from which the report makes differences."
        )
    if STATISTIC in dataset.dims:
        raise DynamicsError(
            "This result holds statistics over runs; give the comparison itself, from which the "
            "report makes means and intervals."
        )
    if schema.RUN in dataset.dims:
        return dataset
    attrs = {
        key: json.dumps({name: json.loads(dataset.attrs[key])})
        for key in _BY_RUN
        if key in dataset.attrs
    }
    with xr.set_options(keep_attrs=True):
        found = dataset.drop_vars(schema.RUN, errors="ignore").expand_dims({schema.RUN: [name]})
    return found.assign_attrs(attrs)


def by_run(comparison: xr.Dataset, attribute: str) -> dict[str, Any]:
    """An attribute of each run; None where the result does not have it."""
    runs = [str(each) for each in comparison[schema.RUN].values]
    try:
        found = json.loads(comparison.attrs.get(attribute, "{}"))
    except (TypeError, ValueError):  # not as this release writes it
        found = {}
    found = found if isinstance(found, dict) else {}
    return {run: found.get(run) for run in runs}


def groups_of(comparison: xr.Dataset) -> list[Group]:
    """The groups of the runs, in the order of their first runs."""
    names = [str(each) for each in comparison[schema.RUN].values]
    single = [Group(name, (i,), (None,)) for i, name in enumerate(names)]
    try:
        found = settings_groups(comparison, SEED)
    except DynamicsError:  # no seeds, or not told apart by settings
        return single
    if all(len(each) == 1 for each in found.values()):
        return single
    return [
        Group(label, tuple(each.values()), tuple(value for (value,) in each))
        for label, each in found.items()
    ]


def of_matrices(comparison: xr.Dataset, name: str) -> np.ndarray:
    """A coordinate along `matrix`, of the first run where runs differ in it."""
    if name not in comparison.coords:
        none: Any = {"layer": schema.NO_LAYER, "component": "parameters"}.get(name, "")
        return np.full(comparison.sizes[schema.MATRIX], none)
    coord = comparison[name]
    if schema.RUN in coord.dims:
        coord = coord.isel({schema.RUN: 0})
    return coord.values


def modules_of(comparison: xr.Dataset) -> list[str]:
    """The module of each matrix; stacks and attentions are told apart where there are several."""
    columns = (of_matrices(comparison, name) for name in ("module", "stack", "attention"))
    return module_labels(*(list(map(str, each)) for each in columns))


def in_layers(comparison: xr.Dataset) -> np.ndarray:
    """Which matrices means are over: the parameters of the layers; all where there are none."""
    parameters = of_matrices(comparison, "component") == "parameters"
    for chosen in (parameters & (of_matrices(comparison, "layer") != schema.NO_LAYER), parameters):
        if chosen.any():
            return chosen
    return np.ones(comparison.sizes[schema.MATRIX], dtype=bool)


def layer_means(comparison: xr.Dataset, metric: str, kind: str) -> xr.DataArray | None:
    """A metric of a kind, mean over the matrices of the layers, (run, step).

    NaN where no matrix was measured; None where the result does not have the metric or the kind.
    """
    if metric not in comparison or kind not in comparison[schema.KIND]:
        return None
    values = (
        comparison[metric].sel({schema.KIND: kind}).isel({schema.MATRIX: in_layers(comparison)})
    )
    values = values.astype(np.float64)
    found = values.where(np.isfinite(values)).mean(schema.MATRIX)
    return None if found.isnull().all() else found.transpose(schema.RUN, schema.STEP)


def at_end(values: xr.DataArray, position: int) -> xr.DataArray:
    """The first (0) or last (-1) value of each run, (run, ...); NaN for a run without any."""
    others = [dim for dim in values.dims if dim not in (schema.RUN, schema.STEP)]
    there = values.notnull().any(others).transpose(schema.RUN, schema.STEP).values
    steps = there.argmax(1) if position == 0 else there.shape[1] - 1 - there[:, ::-1].argmax(1)
    runs = xr.DataArray(np.arange(len(steps)), dims=schema.RUN)
    return values.isel({schema.RUN: runs, schema.STEP: xr.DataArray(steps, dims=schema.RUN)})


def mean_over(values: xr.DataArray, runs: Iterable[int]) -> Mean | None:
    """The mean of one number of each run, with its interval; None where there is no number."""
    found = mean_interval(values.isel({schema.RUN: list(runs)}), schema.RUN)
    mean, upper = float(found["mean"]), float(found["upper"])
    if np.isnan(mean):
        return None
    return Mean(mean, None if np.isnan(upper) else upper - mean)
