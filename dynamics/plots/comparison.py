"""A metric of several runs in one figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import counted, describe
from dynamics.plots.drawing.lines import draw_lines, title
from dynamics.plots.drawing.ranks import finish_metric
from dynamics.plots.drawing.runs import lines_of_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_comparison(
    comparison: xr.Dataset,
    metric: str = "effective_rank",
    *,
    kind: str = schema.WEIGHT,
    module: str | None = None,
    over: str | Sequence[str] | None = None,
    x: str = schema.STEP,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a metric of several runs over training.

    Each run is one line, the mean over matrices (the geometric mean for condition numbers). Up to
    four runs have a band: from the lowest to the highest mean of a layer. With `over`, each setting
    is one line, and its band is a confidence interval. Dotted lines mark merges.

    Args:
        comparison: a result of `compare` or `difference`.
        metric: the name of one of its metrics.
        kind: one of its kinds. A run without this kind gets no line; its name says so.
        module: the module to show. By default, all matrices inside the layers are averaged (all
            matrices, if none is inside a layer).
        over: a setting of the runs, such as "seed". Runs that differ in nothing else are averaged,
            after the matrices of each; the band is the 95 % interval of `dy.over`.
        x: "step", "tokens" or "epoch", as far as the result has them.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes. A run has the same colour in all figures of a comparison.

    Raises:
        DynamicsError: `comparison` has no dimension `run`; no two runs differ in `over` alone; runs
            that are averaged are not at the same x.
        MissingError: the metric, kind, module, setting or x is unknown, or nothing was measured.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> runs = {"full": "full/run.zarr", "relora": "relora/run.zarr"}
        >>> both = dy.compare(runs, kinds=["weight"])
        >>> ax = dy.plot_comparison(both, "stable_rank", x="tokens")
        >>> print(dy.caption(ax))
        Stable rank of the weight along tokens. Each line is the mean over 14 matrices.
        Bands: the range of 2 layers. Dotted: the merge of relora.
        >>> matplotlib.pyplot.close(ax.figure)
    """
    if schema.RUN not in comparison.dims:
        raise DynamicsError(
            "plot_comparison takes what compare() returns, with a dimension 'run'; draw one run "
            "with plot_trajectory (--style trajectory)."
        )
    values = of.metric_values(comparison, metric, kind)
    values = of.of_module(values, module, kind)
    drawn = lines_of_runs(comparison, values, kind, over=over, x=x)
    ax = of.axes_or_new(ax)
    draw_lines(ax, drawn.lines)
    describe(
        ax,
        f"{of.phrase(values, kind)} along {drawn.axis.plural}",
        of_matrices(values, drawn.counts, pooled=over is not None),
        f"Bands: {drawn.band}" if drawn.band else "",
    )
    finish_metric(ax, drawn.axis, values, kind)
    title(ax, module or "all matrices of the layers")
    return ax


def of_matrices(values: xr.DataArray, counts: list[int], *, pooled: bool) -> str:
    """Of what each line is the mean, for captions."""
    if max(counts) == 1:
        return "Each run has one matrix of it" if pooled else "Each line is one matrix"
    mean = "geometric mean" if of.is_logarithmic(values) else "mean"
    many = counted(counts, "matrix", "matrices")
    if pooled:
        return f"In each run, the {mean} over its {many} is taken first"
    return f"Each line is the {mean} over {many}"
