"""The loss and ranks over the same training, one above the other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError, near
from dynamics.plots.comparison import plot_comparison
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import describe
from dynamics.plots.drawing.labels import remove_labels
from dynamics.plots.drawing.lines import Line, draw_lines, finish
from dynamics.plots.drawing.runs import RunLines, missing, pooled_lines
from dynamics.plots.drawing.style import line_style, run_style
from dynamics.plots.drawing.time_axis import hide_merge_name, mark_merges, time_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED_TWICE = 5  # lines, up to which both axes have room for their names
_MEAN = "mean"  # the line of a run without a name
_PREFERRED = ("loss", "train_loss", "training_loss", "eval_loss")


def plot_loss(
    dataset: xr.Dataset,
    metric: str | None = "effective_rank",
    *,
    loss: str | None = None,
    kind: str = schema.WEIGHT,
    module: str | None = None,
    over: str | Sequence[str] | None = None,
    x: str = schema.STEP,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a logged value, such as the loss, and below it a metric along the same time axis.

    They have axes of their own, so that neither scale says something about the other.

    Args:
        dataset: a result of `analyze` or `compare`, of runs that logged it.
        metric: the metric below; None for the logged value alone.
        loss: the logged value, by default the first of loss, train_loss, eval_loss that it has.
        kind: of which kind the metric is.
        module: the module to show; by default, all matrices inside the layers are averaged.
        over: a setting of the runs, such as "seed"; see `plot_comparison`.
        x: "step", "tokens" or "epoch", as far as the result has them.
        ax: the Axes to draw on; with a metric, they are divided in two. By default, a new figure is
            made.

    Returns:
        The Axes of the loss. Those of the metric are `ax.figure.axes[-1]`, and share the x axis.

    Raises:
        DynamicsError: `over` without several runs; kind or module without a metric; `ax` that
            cannot be divided, because it does not stand in a grid.
        MissingError: nothing of this name was logged; or see `plot_comparison`.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> runs = {"full": "full/run.zarr", "relora": "relora/run.zarr"}
        >>> ax = dy.plot_loss(dy.compare(runs, kinds=["weight"]), "stable_rank")
        >>> [each.get_ylabel() for each in ax.figure.axes]
        ['loss', 'stable rank, weight']
        >>> matplotlib.pyplot.close(ax.figure)
    """
    several = schema.RUN in dataset.dims
    if over is not None and not several:
        raise DynamicsError("over (--over) is for several runs; this result is of one.")
    if metric is None and (kind != schema.WEIGHT or module is not None):
        raise DynamicsError("kind and module are of the metric; name one, or leave them out.")
    name = _logged(dataset, loss)
    drawn = _lines(dataset, name, over, x)
    if metric is not None:
        of.of_module(of.metric_values(dataset, metric, kind), module, kind)  # or nothing is drawn
    upper = of.axes_or_new(ax)
    lower = None if metric is None else _divided(upper)
    draw_lines(upper, drawn.lines)
    describe(
        upper,
        f"{_called(dataset, name)} along {drawn.axis.plural}",
        f"Bands: {drawn.band}" if drawn.band else "",
    )
    mark_merges(upper, drawn.axis)
    drawn.axis.label(upper)
    finish(upper, _called(dataset, name))
    if lower is not None and metric is not None:
        runs = dataset if several else dataset.expand_dims({schema.RUN: [_MEAN]})
        plot_comparison(runs, metric, kind=kind, module=module, over=over, x=x, ax=lower)
        hide_merge_name(lower)
        upper.set_xlabel("")
        upper.tick_params(labelbottom=False)
        lower.set_title("")
        if len(drawn.lines) > _NAMED_TWICE:
            remove_labels(lower)
        describe(lower, f"Module: {module}" if module else "", last=True)
        upper.set_xlim(min(upper.get_xlim()[0], lower.get_xlim()[0]),
                       max(upper.get_xlim()[1], lower.get_xlim()[1]))  # fmt: skip
    return upper


def _logged(dataset: xr.Dataset, name: str | None) -> str:
    has = [
        str(each)
        for each, values in dataset.data_vars.items()
        if schema.STEP in values.dims
        and set(values.dims) <= {schema.RUN, schema.STEP}
        and values.dtype.kind in "fiu"
        and np.isfinite(values).any()
    ]
    if name is None:
        name = next((each for each in _PREFERRED if each in has), None)
        if name is None:
            raise MissingError(
                f"No loss was logged in this run; it has {', '.join(has) or 'nothing logged'}."
            )
    if name not in has:
        raise MissingError(
            f"No {name!r}{near(name, has)} was logged in this run; it has "
            f"{', '.join(has) or 'nothing logged'}."
        )
    return name


def _called(dataset: xr.Dataset, name: str) -> str:
    return str(dataset[name].attrs.get("long_name", name.replace("_", " ")))


def _lines(dataset: xr.Dataset, name: str, over: str | Sequence[str] | None, x: str) -> RunLines:
    axis = time_axis(dataset, x)
    values = dataset[name].astype(np.float64)
    if over is not None:
        settings = {
            key: coord
            for key, coord in dataset.coords.items()
            if coord.dims == (schema.RUN,) and key != schema.RUN
        }
        rows = values.assign_coords(settings)
        return pooled_lines(dataset, rows, axis, over, [1], name)
    lines = []
    for run in dataset[schema.RUN].values.tolist() if schema.RUN in dataset.dims else [None]:
        one = values if run is None else values.sel({schema.RUN: run})
        one = one.dropna(schema.STEP)
        style = line_style(0) if run is None else run_style(dataset, run)
        if not one.size:
            lines.append(missing(dataset, str(run), name))
            continue
        at = axis.at(one[schema.STEP].values, run)
        lines.append(Line(run or _called(dataset, name), at, one.values, style))
    return RunLines(lines, axis, [1], "")


def _divided(ax: "Axes") -> "Axes":
    """New Axes below `ax`, which becomes the upper part of the place that it had."""
    place = ax.get_subplotspec()
    if place is None:
        raise DynamicsError(
            "These Axes stand in no grid and cannot be divided; make them with plt.subplots(), or "
            "draw the loss alone (metric=None)."
        )
    rows = place.subgridspec(2, 1)
    ax.set_subplotspec(rows[0])
    return ax.figure.add_subplot(rows[1], sharex=ax)
