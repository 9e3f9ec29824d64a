"""A metric of several runs along training: a line for each, or for groups with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.analysis.settings import settings_groups
from dynamics.analysis.statistics import over as over_runs
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import counted
from dynamics.plots.drawing.lines import Line
from dynamics.plots.drawing.style import run_style
from dynamics.plots.drawing.time_axis import TimeAxis, time_axis

_BANDS = 4  # runs, up to which each has a band of its layers


@dataclass(frozen=True)
class RunLines:
    """The lines of runs.

    Attributes:
        lines: one for each run, or for each group.
        axis: where they lie.
        counts: of how many matrices each line is the mean.
        band: what the bands are, "" where there are none.
    """

    lines: list[Line]
    axis: TimeAxis
    counts: list[int]
    band: str


def lines_of_runs(
    dataset: xr.Dataset,
    values: xr.DataArray,
    kind: str,
    *,
    over: str | Sequence[str] | None,
    x: str,
) -> RunLines:
    """The mean over matrices of each run, or of that its mean and interval over runs.

    Args:
        dataset: a comparison.
        values: (run, step, matrix).
        kind: which they are.
        over: a setting, such as "seed": runs that differ in nothing else become one line.
        x: see `time_axis`.
    """
    axis = time_axis(dataset, x)
    means: dict[str, of.Mean | None] = {}
    for run in values[schema.RUN].values.tolist():
        of_run = values.sel({schema.RUN: run}).dropna(schema.MATRIX, how="all")
        means[run] = of.mean_over_matrices(of_run) if of_run.size else None
    counts = [mean.count for mean in means.values() if mean is not None]
    if over is not None:
        return _pooled(dataset, values, means, axis, over, counts, kind)
    lines = []
    for run, mean in means.items():
        if mean is None:
            lines.append(missing(dataset, run, kind))
            continue
        low, high = mean.band if len(means) <= _BANDS else (None, None)
        at = axis.at(mean.steps, run)
        cycles = axis.cycles(mean.steps, run, kind)
        lines.append(Line(run, at, mean.mean, run_style(dataset, run), low, high, cycles))
    layers = [mean.layers for mean in means.values() if mean is not None]
    several = max(layers) > 1 and len(means) <= _BANDS
    band = f"the range of {counted(layers, 'layer')}" if several else ""
    return RunLines(lines, axis, counts, band)


def missing(dataset: xr.Dataset, run: str, kind: str) -> Line:
    """A line without points for a run that has none of it: it is named, so that nobody asks."""
    return Line(f"{run} (no {kind})", np.empty(0), np.empty(0), run_style(dataset, run))


def _pooled(
    dataset: xr.Dataset,
    values: xr.DataArray,
    means: dict[str, of.Mean | None],
    axis: TimeAxis,
    over: str | Sequence[str],
    counts: list[int],
    kind: str,
) -> RunLines:
    """The geometric mean and its interval are those of logarithms."""
    logarithmic = of.is_logarithmic(values)
    steps = values[schema.STEP].values
    table = np.full((len(means), len(steps)), np.nan)
    for row, mean in zip(table, means.values(), strict=True):
        if mean is not None:
            row[np.searchsorted(steps, mean.steps)] = (
                np.log(mean.mean) if logarithmic else mean.mean
            )
    settings = {
        name: coord
        for name, coord in dataset.coords.items()
        if coord.dims == (schema.RUN,) and name != schema.RUN
    }
    labels = {schema.RUN: list(means), schema.STEP: steps}
    rows = xr.DataArray(table, labels, (schema.RUN, schema.STEP)).assign_coords(settings)
    return pooled_lines(dataset, rows, axis, over, counts, kind, np.exp if logarithmic else None)


def pooled_lines(
    dataset: xr.Dataset,
    rows: xr.DataArray,
    axis: TimeAxis,
    over: str | Sequence[str],
    counts: list[int],
    kind: str,
    back: Callable[[np.ndarray], np.ndarray] | None = None,
) -> RunLines:
    """Mean and interval over runs of (run, step); `back` undoes a transformation."""
    found = over_runs(rows.where(np.isfinite(rows)), over)
    members = {
        label: [rows[schema.RUN].values[i] for i in group.values()]
        for label, group in settings_groups(rows, over).items()
    }
    axis = axis.pooled(members)
    lines, numbers = [], []
    for group in found[schema.RUN].values.tolist():
        each = found.sel({schema.RUN: group}).dropna(schema.STEP, how="all", subset=["mean"])
        steps = each[schema.STEP].values
        if not steps.size:
            lines.append(missing(dataset, group, kind))
            continue
        y, low, high = (
            each[name].values if back is None else back(each[name].values)
            for name in ("mean", "lower", "upper")
        )
        numbers += each["count"].values.tolist()
        cycles = axis.cycles(steps, group, kind)
        style = run_style(dataset, group, list(members))
        lines.append(Line(group, axis.at(steps, group), y, style, low, high, cycles=cycles))
    name = over if isinstance(over, str) else " and ".join(over)
    band = f"95 % confidence interval of the mean over {counted(numbers, name)}"
    if len(set(numbers)) == 1 and numbers[0] > 1:
        from scipy.stats import t as student_t

        band += f" (t = {student_t.ppf(0.975, numbers[0] - 1):.2f})"
    return RunLines(lines, axis, counts, band if numbers and max(numbers) > 1 else "")
