"""Runs less a baseline over training, with intervals over paired runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import xarray as xr

from dynamics import schema
from dynamics.analysis.statistics import difference
from dynamics.errors import DynamicsError
from dynamics.plots.comparison import plot_comparison
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import describe
from dynamics.plots.drawing.style import GREY, thickness

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_difference(
    comparison: xr.Dataset,
    metric: str = "effective_rank",
    *,
    baseline: str | None = None,
    kind: str = schema.WEIGHT,
    module: str | None = None,
    over: str | Sequence[str] | None = None,
    x: str = schema.STEP,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw how far runs are from a baseline run, matrix by matrix and then on average.

    The line at zero is the baseline. With `over`, each run is compared with the run of the
    baseline that has the same seed, and the band is the 95 % interval of the mean over these
    pairs: where it leaves out zero, the difference is more than what seeds do. Without it, the band
    is the range of the matrices.

    Args:
        comparison: a result of `compare`, or of `difference`.
        metric: the name of one of its metrics.
        baseline: the run that is subtracted, or with `over` the name of its setting, see
            `dy.difference`. A result of `difference` has its own.
        kind: one of its kinds.
        module: the module to show; by default, all matrices inside the layers are averaged.
        over: a setting such as "seed" by which runs are paired and over which they are averaged.
        x: "step", "tokens" or "epoch", as far as the result has them.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes.

    Raises:
        DynamicsError: `comparison` has no dimension `run`; it has no baseline and none is given,
            or both; runs are no pairs.
        MissingError: the metric, kind, module, setting, baseline or x is unknown, or nothing was
            measured.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> runs = {"full": "full/run.zarr", "relora": "relora/run.zarr"}
        >>> both = dy.compare(runs, kinds=["weight"])
        >>> ax = dy.plot_difference(both, "stable_rank", baseline="full")
        >>> ax.get_ylabel()
        'stable rank, weight, less full'
        >>> matplotlib.pyplot.close(ax.figure)
    """
    if schema.RUN not in comparison.dims:
        raise DynamicsError("plot_difference takes what compare() or difference() returns.")
    own = comparison.attrs.get(of.BASELINE)
    if own is not None and baseline is not None:
        raise DynamicsError(
            f"This result is less {own!r} already; leave baseline (--baseline) out."
        )
    if own is None:
        if baseline is None:
            labels = ", ".join(comparison[schema.RUN].values.tolist())
            raise DynamicsError(
                f"Which run is subtracted? Give baseline (--baseline), one of {labels}."
            )
        comparison = difference(_without_spectra(comparison), baseline=baseline, pair=over)
    ax = plot_comparison(comparison, metric, kind=kind, module=module, over=over, x=x, ax=ax)
    ax.axhline(0, color=GREY, linewidth=thickness(0.8), zorder=1, label="_zero")
    describe(ax, f"Zero: {comparison.attrs[of.BASELINE]}")
    return ax


def _without_spectra(comparison: xr.Dataset) -> xr.Dataset:
    """Nothing that is large and not drawn is subtracted."""
    return comparison.drop_vars(schema.SINGULAR_VALUE, errors="ignore")
