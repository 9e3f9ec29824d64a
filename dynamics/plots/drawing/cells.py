"""Maps of colours along the time axis: cells of records, one scale for all panels, its bar."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynamics.errors import DynamicsError
from dynamics.plots.drawing.captions import describe
from dynamics.plots.drawing.lines import plain_decades
from dynamics.plots.drawing.time_axis import TimeAxis, draw_merges, edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

_DECADE = 10.0  # a scale whose ends differ by more is logarithmic, where nothing else is asked for
_FEW = 0.8  # of the values have to be above zero, so that the others may be left out
Limits = tuple[float, float] | None


def colour_scale(
    values: np.ndarray, *, log: bool | None, limits: Limits, signed: bool = False
) -> "Normalize":
    """The scale from numbers to colours.

    Args:
        values: any shape; NaN and Inf have no colour.
        log: whether it is logarithmic; by default, if the largest is more than 10 times the
            smallest, and all are positive but for a few that are zero.
        limits: the lowest and the highest number; by default those of `values`.
        signed: whether zero has to be in the middle.

    Raises:
        DynamicsError: the limits are not in order, or a logarithmic scale is to show what is not
            above zero.
    """
    from matplotlib.colors import LogNorm, Normalize

    finite = values[np.isfinite(values)]
    if log is not False and limits is None and not signed and finite.min() == 0:
        positive = finite[finite > 0]  # zeros have no place on a logarithmic scale: they are grey
        if positive.size >= _FEW * finite.size and (
            log or positive.max() > _DECADE * positive.min()
        ):
            finite, log = positive, True
    low, high = (float(finite.min()), float(finite.max())) if limits is None else limits
    if not low <= high or not np.isfinite([low, high]).all():
        raise DynamicsError(f"limits are {limits}; give the lowest and then the highest number.")
    positive = low > 0
    if log and not positive:
        raise DynamicsError(
            f"A logarithmic scale cannot begin at {low:g}; leave log out, or give limits."
        )
    if log is None:
        log = positive and high / low > _DECADE and not signed
    if signed and limits is None:
        high = max(abs(low), abs(high))
        low = -high
    return LogNorm(low, high) if log else Normalize(low, high)


def draw_cells(
    ax: "Axes",
    axis: TimeAxis,
    steps: np.ndarray,
    rows: np.ndarray,
    cells: np.ndarray,
    norm: "Normalize",
    colours: "Colormap",
) -> Any:
    """Draw (row, step) cells; each reaches from the record before it to its own.

    Args:
        ax: where.
        axis: where the steps lie; steps that it does not know are left out.
        steps: (n,), of which the first ones are left out if they have no cell.
        rows: (m + 1,) the edges of the rows.
        cells: (m, n).
        norm: see `colour_scale`.
        colours: the colour map.
    """
    at = axis.at(steps)
    known = np.isfinite(at)
    at, cells = at[known], cells[:, known]
    filled = np.flatnonzero(np.isfinite(cells).any(axis=0))
    first = int(filled[0])
    # Where the first record has no cell, the first cell begins there.
    x = at[first - 1 :] if first else edges(at)
    mesh = ax.pcolormesh(
        x,
        rows,
        np.ma.masked_invalid(cells[:, first:]),
        cmap=colours.with_extremes(bad=(0, 0, 0, 0)),
        norm=norm,
        rasterized=cells.size > 4000,
        linewidth=0,
    )
    hatch(ax)
    ax.grid(visible=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(x[0], x[-1])
    axis.label(ax)
    describe(
        ax,
        "A cell reaches from the record before it to its own"
        + ("" if first else "; the first one is the first record"),
    )
    return mesh


def hatch(ax: "Axes") -> None:
    """Hatch what has no colour: a grey would be that of a number where all is printed in grey."""
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm

    for mesh in [each for each in ax.collections if isinstance(each, QuadMesh)]:
        cells: np.ma.MaskedArray = np.ma.asarray(mesh.get_array())
        missing = bool(np.ma.getmaskarray(cells).any())
        zero = isinstance(mesh.norm, LogNorm) and bool((cells <= 0).any())
        if missing or zero:
            ax.patch.set(facecolor="white", edgecolor="0.7", hatch="/////", linewidth=0)
            none = "zero" if zero and not missing else "zero, or not measured"
            describe(ax, f"Hatched: {none if zero else 'not measured'}", last=True)


def mark_merges_of_cells(ax: "Axes", axis: TimeAxis) -> None:
    """Mark the merges that lie inside of the map."""
    low, high = ax.get_xlim()
    at = [float(x) for x in axis.at(axis.merges.get(None, [])) if low < x < high]
    draw_merges(ax, at, on_cells=True)


def colour_bar(mesh: Any, axes: "Sequence[Axes]", label: str) -> None:
    """The scale beside Axes, with its label in lines that fit its height."""
    from matplotlib.colors import LogNorm

    beside = axes[0] if len(axes) == 1 else list(axes)
    bar = axes[0].figure.colorbar(mesh, ax=beside, aspect=25)
    if isinstance(mesh.norm, LogNorm):
        plain_decades(bar.ax.yaxis, lambda: (mesh.norm.vmin, mesh.norm.vmax))
    bar.set_label(label)
    bar.ax.yaxis.label.set_wrap(True)
    bar.outline.set_visible(False)
