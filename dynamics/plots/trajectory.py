"""A metric over training, one line per layer, module or matrix."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import MissingError, near
from dynamics.plots import shared

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BY = ("layer", "module", schema.MATRIX)


def plot_trajectory(
    dataset: xr.Dataset,
    metric: str = "effective_rank",
    *,
    kind: str = schema.WEIGHT,
    by: str = "module",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a metric of one run over its steps.

    Dotted lines mark merges. A dashed line is the rank bound, if all matrices share it.

    Args:
        dataset: a result of `analyze`.
        metric: the name of one of its metrics.
        kind: one of its kinds.
        by: what one line stands for. "module": a module, averaged over the layers. "layer": a
            layer, averaged over its modules; matrices outside the layers, such as embeddings, are
            left out. "matrix": a single matrix.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes.

    Raises:
        DynamicsError: `dataset` compares several runs.
        MissingError: the metric, kind or `by` is unknown, or nothing was measured.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> analysis = dy.analyze("run.zarr", kinds=["weight"])
        >>> ax = dy.plot_trajectory(analysis, "stable_rank", by="layer")
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('optimizer step', 'stable rank, weight')
        >>> matplotlib.pyplot.close(ax.figure)
    """
    if by not in _BY:
        raise MissingError(f"No grouping {by!r}{near(by, _BY)}; known: {', '.join(_BY)}.")
    values = shared.metric_values(shared.require_one_run(dataset), metric, kind)
    if by == "layer":
        values = shared.inside_layers(values, kind)
    names, groups = _groups(values, by)
    ax = shared.axes_or_new(ax)
    import matplotlib

    if by == "layer":
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(names)))
    else:
        colours = matplotlib.colormaps["tab10"](np.arange(len(names)) % 10)
    for name, colour in zip(names, colours, strict=True):
        line = values.sel({schema.MATRIX: groups == name}).mean(schema.MATRIX)
        text = f"layer {name}" if by == "layer" else str(name)
        ax.plot(line[schema.STEP], line, marker=".", markersize=4, color=colour, label=text)
    shared.draw_bound(ax, dataset, values, kind)
    shared.mark_merges(ax, dataset)
    shared.style_axes(ax, values, kind)
    if len(names) <= 16:
        ax.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def _groups(values: xr.DataArray, by: str) -> tuple[list, np.ndarray]:
    groups = values[by].values
    return (
        sorted(set(groups.tolist())) if by == "layer" else list(dict.fromkeys(groups.tolist()))
    ), groups
