"""What figures of a metric along the time axis end with: labels, merges, the rank bound."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import describe
from dynamics.plots.drawing.labels import label_end
from dynamics.plots.drawing.lines import finish
from dynamics.plots.drawing.style import GREY, thickness
from dynamics.plots.drawing.time_axis import TimeAxis, mark_merges

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Kinds whose bound is only the size of the matrix.
_WHOLE = (schema.WEIGHT, schema.BASE, schema.GRADIENT)


def finish_metric(ax: "Axes", axis: TimeAxis, values: xr.DataArray, kind: str) -> None:
    """Mark merges, name the axes and set their scale; tell how many values are infinite."""
    mark_merges(ax, axis)
    axis.label(ax)
    finish(ax, of.label(values, kind), log=of.is_logarithmic(values))
    infinite = int(np.isinf(values).sum())
    if infinite:
        measured = int(values.notnull().sum())
        describe(ax, f"Not drawn: means of infinite values ({infinite} of {measured})")


def draw_bound(ax: "Axes", dataset: xr.Dataset, values: xr.DataArray, kind: str) -> None:
    """Draw the rank bound as a dashed line, if a rank is shown and all its matrices share it.

    A bound that is only the size of the matrices does not change the limits of the axes.
    """
    if values.name not in of.RANKS or "rank_bound" not in dataset or of.BASELINE in values.attrs:
        return
    bounds = of.metric_values(dataset, "rank_bound", kind)
    bounds = bounds.sel({schema.MATRIX: values[schema.MATRIX]})
    low, high = float(bounds.min()), float(bounds.max())
    if low < high:
        describe(ax, f"The rank bounds are from {low:g} to {high:g}")
        return
    limits = ax.get_ylim()
    ax.axhline(high, color=GREY, linewidth=thickness(0.8), linestyle="--", zorder=0.6)
    if kind in _WHOLE and high > limits[1]:
        ax.set_ylim(limits)
        describe(ax, f"The rank bound of {high:g} lies above the axes")
    else:
        label_end(ax, f"bound: {high:g}", high, GREY)
        describe(ax, f"Dashed: the rank bound of {high:g}")
