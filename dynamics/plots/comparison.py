"""A metric of several runs in one figure."""

from typing import TYPE_CHECKING

import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError, near
from dynamics.plots import shared

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_comparison(
    comparison: xr.Dataset,
    metric: str = "effective_rank",
    *,
    kind: str = schema.WEIGHT,
    module: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a metric of several runs over their steps.

    Each run is one line, the mean over matrices, in a band from the smallest to the largest
    matrix. Dotted lines mark merges.

    Args:
        comparison: a result of `compare` or `difference`.
        metric: the name of one of its metrics.
        kind: one of its kinds. A run without this kind gets no line; the legend says so.
        module: the module to show. By default, all matrices inside the layers are averaged (all
            matrices, if none is inside a layer).
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes.

    Raises:
        DynamicsError: `comparison` has no dimension `run`.
        MissingError: the metric, kind or module is unknown, or nothing was measured.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> runs = {"full": "full/run.zarr", "relora": "relora/run.zarr"}
        >>> both = dy.compare(runs, kinds=["weight"])
        >>> ax = dy.plot_comparison(both, "stable_rank")
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['full', 'relora']
        >>> matplotlib.pyplot.close(ax.figure)
    """
    if schema.RUN not in comparison.dims:
        raise DynamicsError(
            "plot_comparison takes what compare() returns, with a dimension 'run'; draw one run "
            "with plot_trajectory (--style trajectory)."
        )
    values = shared.metric_values(comparison, metric, kind)
    if module is None:
        inside = values.sel({schema.MATRIX: values["layer"] != schema.NO_LAYER})
        values = inside if inside.size else values
    else:
        values = values.sel({schema.MATRIX: values["module"] == module})
        if values.size == 0:
            known = sorted(set(comparison["module"].values.tolist()))
            raise MissingError(
                f"No {kind} of a module {module!r}{near(module, known)} was measured; modules: "
                f"{', '.join(known)}."
            )
    ax = shared.axes_or_new(ax)
    for run in values[schema.RUN].values.tolist():
        of_run = values.sel({schema.RUN: run}).dropna(schema.STEP, how="all")
        if of_run.size == 0:
            ax.plot([], [], label=f"{run} (no {kind})", linestyle="none")
            continue
        steps, mean = of_run[schema.STEP], of_run.mean(schema.MATRIX)
        (line,) = ax.plot(steps, mean, marker=".", markersize=5, label=run)
        lowest, highest = of_run.min(schema.MATRIX), of_run.max(schema.MATRIX)
        ax.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)
    shared.mark_merges(ax, comparison)
    shared.style_axes(ax, values, kind)
    ax.set_title(module or "all matrices of the layers", fontsize="medium")
    ax.legend(fontsize="small", frameon=False)
    return ax
