"""A metric as a heatmap: layers upwards, steps to the right."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import MissingError, near
from dynamics.plots import shared

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_heatmap(
    dataset: xr.Dataset,
    metric: str = "effective_rank",
    *,
    kind: str = schema.WEIGHT,
    module: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a metric of one run as a heatmap, layer × step.

    There is one column per recorded step; all columns have the same width. Cells without a value
    are grey.

    Args:
        dataset: a result of `analyze`.
        metric: the name of one of its metrics.
        kind: one of its kinds.
        module: the module to show. By default, the modules of each layer are averaged.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes.

    Raises:
        DynamicsError: `dataset` compares several runs.
        MissingError: the metric, kind or module is unknown, or nothing was measured inside the
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
    values = shared.metric_values(shared.require_one_run(dataset), metric, kind)
    values = shared.inside_layers(values, kind)
    modules = sorted(set(values["module"].values.tolist()))
    if module is not None:
        if module not in modules:
            raise MissingError(
                f"No {kind} of a module {module!r}{near(module, modules)}; there are "
                f"{', '.join(modules)}."
            )
        values = values.sel({schema.MATRIX: values["module"] == module})
    grid = values.groupby("layer").mean(schema.MATRIX).transpose("layer", schema.STEP)
    ax = shared.axes_or_new(ax)
    import matplotlib

    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")
    if shared.is_logarithmic(values):
        norm: matplotlib.colors.Normalize = matplotlib.colors.LogNorm()
    else:
        norm = matplotlib.colors.Normalize()
    image = ax.pcolormesh(np.ma.masked_invalid(grid.values), cmap=colours, norm=norm)
    steps, layers = grid[schema.STEP].values, grid["layer"].values
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 9)).round().astype(int))
    ax.set_xticks(shown + 0.5, [str(steps[i]) for i in shown])
    ax.set_yticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("layer")
    ax.set_title(module or f"mean of {', '.join(modules)}", fontsize="small")
    ax.figure.colorbar(image, ax=ax, label=shared.label(values, kind))
    return ax
