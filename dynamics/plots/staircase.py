"""Ranks of differences as stairs, with the bound that merges and r allow."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError
from dynamics.plots.comparison import of_matrices
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import describe
from dynamics.plots.drawing.lines import Line, draw_lines, finish, title
from dynamics.plots.drawing.runs import RunLines, lines_of_runs
from dynamics.plots.drawing.style import PALETTE, thickness
from dynamics.plots.drawing.time_axis import TimeAxis, mark_merges

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ONE = "numerical rank"  # the line of a run without a name


def plot_staircase(
    dataset: xr.Dataset,
    *,
    kind: str = schema.DISPLACEMENT,
    module: str | None = None,
    over: str | Sequence[str] | None = None,
    effective: bool | None = None,
    x: str = schema.STEP,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the numerical rank of how far the weights have moved, as stairs below its bound.

    After K merges of adapters of rank r, a weight has moved in (K + 1)·r directions at most. This
    bound is the broad pale band. GaLore's is r for each projector that it has used, and that of
    other runs without adapters is the size of their matrices. The rank of a record holds for the
    interval before it, so stairs rise where merges are. The effective rank is dashed: how many of
    the directions carry weight.

    Args:
        dataset: a result of `analyze` or `compare`, with the metrics numerical_rank and rank_bound.
        kind: displacement, cycle_update, update, or another one of its kinds.
        module: the module to show; by default, all matrices inside the layers are averaged.
        over: a setting of the runs, such as "seed"; see `plot_comparison`.
        effective: whether the effective rank is drawn; by default for up to four lines.
        x: "step", "tokens" or "epoch", as far as the result has them.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes.

    Raises:
        DynamicsError: `over` without several runs; `effective` with more than four lines, whose
            dashes would not be told apart.
        MissingError: a metric, the kind, module, setting or x is unknown, or nothing was measured.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> analysis = dy.analyze("run.zarr", kinds=["displacement"])
        >>> ax = dy.plot_staircase(analysis)
        >>> print(dy.caption(ax))
        Numerical rank of the displacement along optimizer steps. Each line is the mean over 14
        matrices. Dashed: the effective rank. Broad band: the rank bound, (merges + 1)·r for
        adapters of rank r, and at most the size of the matrix. Dotted: the merge.
        >>> matplotlib.pyplot.close(ax.figure)
    """
    of.refuse_difference(dataset)
    several = schema.RUN in dataset.dims
    if over is not None and not several:
        raise DynamicsError("over (--over) is for several runs; this result is of one.")
    one = dataset if several else dataset.expand_dims({schema.RUN: [_ONE]})
    drawn = {
        metric: _lines(dataset, one, metric, kind, module, over, x)
        for metric in ("numerical_rank", "rank_bound", "effective_rank")
        if metric != "effective_rank" or (effective is not False and metric in dataset)
    }
    ranks, bounds = drawn["numerical_rank"], drawn["rank_bound"]
    if effective and len(ranks.lines) > len(PALETTE):
        raise DynamicsError(
            f"The effective rank of {len(ranks.lines)} lines cannot be told from their numerical "
            f"rank; choose {len(PALETTE)} runs at most (.sel(run=[...])), or leave effective out."
        )
    ax = of.axes_or_new(ax)
    for line in bounds.lines:
        _draw_bound(ax, line, bounds.axis, several)
    draw_lines(ax, [_stairs(line, ranks.axis) for line in ranks.lines], values=True,
               drawstyle="steps-pre")  # fmt: skip
    values = of.of_module(of.metric_values(dataset, "numerical_rank", kind), module, kind)
    describe(
        ax,
        f"{of.phrase(values, kind)} along {ranks.axis.plural}",
        of_matrices(values, ranks.counts, pooled=over is not None),
        f"Bands: {ranks.band}" if over is not None else "",
    )
    if "effective_rank" in drawn and len(ranks.lines) <= len(PALETTE):
        _draw_effective(ax, drawn["effective_rank"].lines)
    projected = ", r for each projector" if any(ranks.axis.projectors.values()) else ""
    describe(
        ax,
        f"Broad band: the rank bound, (merges + 1)·r for adapters of rank r{projected}, and at "
        "most the size of the matrix",
    )
    mark_merges(ax, ranks.axis)
    ranks.axis.label(ax)
    finish(ax, f"directions of the {kind.replace('_', ' ')}")
    ax.set_ylim(bottom=0)
    _ticks(ax, bounds.lines)
    title(ax, module or "all matrices of the layers")
    return ax


def _lines(
    dataset: xr.Dataset,
    several: xr.Dataset,
    metric: str,
    kind: str,
    module: str | None,
    over: str | Sequence[str] | None,
    x: str,
) -> RunLines:
    of.metric_values(dataset, metric, kind)  # its errors speak of the result as it was given
    values = of.of_module(of.metric_values(several, metric, kind), module, kind)
    found = lines_of_runs(several, values, kind, over=over, x=x)
    if over is None:  # the range of ranks is the range of shapes and bounds
        lines = [replace(line, low=None, high=None) for line in found.lines]
        found = replace(found, lines=lines, band="")
    return found


def _stairs(line: Line, axis: TimeAxis) -> Line:
    """The line from the beginning of its first interval on, without markers."""
    run = line.name if line.name in axis.known else None
    single = line.x.size == 1  # stairs of one record, which are no line
    style = {name: each for name, each in line.style.items() if single or name != "marker"}
    if run is None or not line.x.size:
        return replace(line, style=style)
    at = axis.at(axis.known[run][0], run)
    before = at[at < line.x[0]]
    if not before.size:
        return replace(line, style=style)
    low, high = (None if each is None else _with_first(each) for each in (line.low, line.high))
    cycles = [
        slice(part.start and part.start + 1, part.stop and part.stop + 1) for part in line.cycles
    ]
    x = np.concatenate([before[-1:], line.x])
    return replace(line, x=x, y=_with_first(line.y), low=low, high=high, cycles=cycles, style=style)


def _with_first(values: np.ndarray) -> np.ndarray:
    """The values with the first one twice: it holds from the beginning of its interval on."""
    return np.concatenate([values[:1], values])


def _draw_bound(ax: "Axes", line: Line, axis: TimeAxis, several: bool) -> None:
    """The bound of a run as a broad pale band; it rises at merges, not at the record before.

    Those of projectors rise where a new one is taken.
    """
    if not line.x.size:
        return
    stairs = _stairs(line, axis)
    rises = sorted([*axis.merges.get(line.name, []), *axis.projectors.get(line.name, [])])
    at_rises = axis.at(rises, line.name)
    x, y = [stairs.x[0]], [stairs.y[0]]
    for start, end, before, after in zip(
        stairs.x[:-1], stairs.x[1:], stairs.y[:-1], stairs.y[1:], strict=True
    ):
        within = at_rises[(at_rises >= start) & (at_rises < end)]
        at = float(within[0]) if within.size and after != before else start
        x += [at, at, end]
        y += [before, after, after]
    colour = line.style["color"] if several else PALETTE[0]
    ax.plot(x, y, color=colour, alpha=0.28, linewidth=thickness(5), solid_capstyle="butt",
            solid_joinstyle="miter", label=f"_bound {line.name}", zorder=1)  # fmt: skip


def _draw_effective(ax: "Axes", lines: Sequence[Line]) -> None:
    shown = [
        replace(line, name=f"_effective {line.name}", shown="effective", low=None, high=None,
                style={"color": line.style["color"], "linestyle": (0, (4, 1.5))})
        for line in lines
        if line.y.size
    ]  # fmt: skip
    draw_lines(ax, shown, values=True)
    describe(ax, "Dashed: the effective rank")


def _ticks(ax: "Axes", bounds: Sequence[Line]) -> None:
    """Ticks at multiples of the smallest bound, which is r, where all bounds are multiples."""
    from matplotlib.ticker import MultipleLocator

    values = np.unique(np.concatenate([line.y for line in bounds if line.y.size]))
    r = float(values[0])
    adapted = values[values < values[-1]] if len(values) > 2 else values
    if r < 1 or len(values) < 2 or not np.allclose(adapted % r, 0):
        return
    top, step = ax.get_ylim()[1], r
    while top / step > 7:
        step *= 2
    ax.yaxis.set_major_locator(MultipleLocator(step))
