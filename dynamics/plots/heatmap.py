"""A metric as a heatmap: layers upwards, training to the right."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import counted, describe, listed
from dynamics.plots.drawing.cells import (
    Limits,
    colour_bar,
    colour_scale,
    draw_cells,
    mark_merges_of_cells,
)
from dynamics.plots.drawing.lines import title
from dynamics.plots.drawing.time_axis import time_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_heatmap(
    dataset: xr.Dataset,
    metric: str = "effective_rank",
    *,
    kind: str = schema.WEIGHT,
    module: str | None = None,
    log: bool | None = None,
    limits: Limits = None,
    x: str = schema.STEP,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a metric of one run as a heatmap, layer × time.

    A cell reaches from the record before it to its own, so its breadth is that of the interval.
    Cells without a value are hatched. White lines mark merges. For several runs on one scale, see
    `plot_panels`.

    Args:
        dataset: a result of `analyze`.
        metric: the name of one of its metrics.
        kind: one of its kinds.
        module: the module to show. By default, the modules of each layer are averaged (by the
            geometric mean for condition numbers).
        log: whether the colours are logarithmic; by default for condition numbers, and if the
            largest cell is more than 10 times the smallest.
        limits: the numbers at the ends of the colours; by default those of the cells.
        x: "step", "tokens" or "epoch", as far as the result has them.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes. Differences have a scale with zero in its middle.

    Raises:
        DynamicsError: `dataset` compares several runs, or a scale cannot be drawn.
        MissingError: the metric, kind, module or x is unknown, or nothing was measured inside the
            layers.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> analysis = dy.analyze("run.zarr", kinds=["weight"])
        >>> ax = dy.plot_heatmap(analysis, "stable_rank")
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('optimizer step', 'layer')
        >>> matplotlib.pyplot.close(ax.figure)
    """
    values = of.metric_values(of.require_one_run(dataset), metric, kind)
    values = of.inside_layers(values, kind, module)
    modules = sorted(set(of.of_matrices(values, "module").tolist()))
    groups = of.groups_of(values, "layer")
    means = {name: of.mean_over_matrices(values[:, found]) for name, found in groups.items()}
    steps = values[schema.STEP].values
    grid = np.full((len(means), len(steps)), np.nan)
    for row, mean in zip(grid, means.values(), strict=True):
        row[np.searchsorted(steps, mean.steps)] = mean.mean
    axis = time_axis(dataset, x)
    signed = of.BASELINE in values.attrs
    if log is None and of.is_logarithmic(values):
        log = True
    norm = colour_scale(grid, log=log, limits=limits, signed=signed)
    ax = of.axes_or_new(ax)
    import matplotlib
    from matplotlib.colors import LogNorm

    colours = matplotlib.colormaps["viridis"]
    counts = [mean.count for mean in means.values()]
    many = counted(counts, "matrix", "matrices")
    mean_name = "geometric mean" if of.is_logarithmic(values) else "mean"
    describe(
        ax,
        f"{of.phrase(values, kind)} by layer along {axis.plural}",
        f"Each cell is the {mean_name} over {many}" if max(counts) > 1 else "",
        f"Modules: {listed(modules)}" if module is None else f"Only {module}",
        "The colours are logarithmic" if isinstance(norm, LogNorm) else "",
        "Infinite means are hatched" if np.isinf(grid).any() else "",
        "Zero is in the middle of the colours" if signed and limits is None else "",
    )
    mesh = draw_cells(ax, axis, steps, np.arange(len(means) + 1), grid, norm, colours)
    names = [name.removeprefix("layer ") for name in means]
    shown = np.arange(0, len(names), -(-len(names) // 9))
    ax.set_yticks(shown + 0.5, [names[i] for i in shown])
    ax.set_ylabel("layer")
    colour_bar(mesh, [ax], of.label(values, kind))
    mark_merges_of_cells(ax, axis)
    title(ax, module or "all matrices of the layers")
    return ax
