"""A metric over training, one line per layer, module, expert or matrix."""

from typing import TYPE_CHECKING

import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError, near
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import counted, describe
from dynamics.plots.drawing.labels import MOST
from dynamics.plots.drawing.lines import Line, draw_lines
from dynamics.plots.drawing.ranks import draw_bound, finish_metric
from dynamics.plots.drawing.style import GREY, layer_colours, line_style, spread
from dynamics.plots.drawing.time_axis import time_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BY = ("layer", "module", schema.MATRIX, "expert")
_BANDS = 4  # lines, up to which each has a band


def plot_trajectory(
    dataset: xr.Dataset,
    metric: str = "effective_rank",
    *,
    kind: str = schema.WEIGHT,
    by: str = "module",
    band: bool | None = None,
    x: str = schema.STEP,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a metric of one run over training.

    A line is a mean over matrices, the geometric one for condition numbers. Its band is the range
    of the layers. Dotted lines mark merges; lines of adapters are broken there. A dashed line is
    the rank bound, if all matrices share it.

    Args:
        dataset: a result of `analyze`.
        metric: the name of one of its metrics.
        kind: one of its kinds.
        by: what one line stands for. "module": a module, averaged over the layers. "layer": a
            layer, averaged over its modules; matrices outside the layers, such as embeddings, are
            left out. "expert": a routed expert, averaged over its matrices. "matrix": a single
            matrix.
        band: whether the range of what a line is a mean over is drawn: of the layers, or for layers
            of their matrices, whose shapes differ. By default for modules and experts, if there are
            four lines at most.
        x: "step", "tokens" or "epoch", as far as the result has them.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes. Up to 16 lines are named at their ends.

    Raises:
        DynamicsError: `dataset` compares several runs, or `band` is asked for where each line is
            a single matrix.
        MissingError: the metric, kind, `by` or `x` is unknown, or nothing was measured.

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
    values = of.metric_values(of.require_one_run(dataset), metric, kind)
    if by == "layer":
        values = of.inside_layers(values, kind)
    if by == "expert":
        values = _of_experts(values, kind)
    groups = of.groups_of(values, by)
    means = {
        name: of.mean_over_matrices(values[:, found], of_layers=by != "layer")
        for name, found in groups.items()
    }
    counts, layers = ([getattr(e, name) for e in means.values()] for name in ("count", "layers"))
    if band and max(layers) == 1:
        raise DynamicsError(f"A band needs lines of several matrices; by={by!r} has one for each.")
    few = len(means) <= _BANDS and by != "layer"
    banded = max(layers) > 1 and (few if band is None else band)
    axis = time_axis(dataset, x)
    ordered = by in ("layer", "expert")
    colours = spread(len(means)) if ordered else None
    ax = of.axes_or_new(ax)
    lines = [
        Line(
            name,
            axis.at(mean.steps),
            mean.mean,
            line_style(number) if colours is None else {"color": colours[number], "marker": "."},
            low=mean.band[0] if banded else None,
            high=mean.band[1] if banded else None,
            cycles=axis.cycles(mean.steps, None, kind),
        )
        for number, (name, mean) in enumerate(means.items())
    ]
    if len(lines) > MOST and not ordered:
        lines = _by_layer(lines, values)
    draw_lines(ax, lines)
    what = {"layer": "layer", "module": "module", "expert": "expert", schema.MATRIX: "matrix"}[by]
    describe(ax, f"{of.phrase(values, kind)} along {axis.plural}", _over(values, what, counts))
    if banded:
        what = counted(layers, "matrix", "matrices") if by == "layer" else counted(layers, "layer")
        describe(ax, f"Bands: the range of {what}")
    if len(lines) > MOST:
        _colour_bar(ax, lines, "layer" if by != "expert" else by, values)
    draw_bound(ax, dataset, values, kind)
    finish_metric(ax, axis, values, kind)
    return ax


def _over(values: xr.DataArray, what: str, counts: list[int]) -> str:
    if max(counts) == 1:
        return f"Each line is a {what}"
    mean = "geometric mean" if of.is_logarithmic(values) else "mean"
    many = counted(counts, "matrix", "matrices")
    return f"Each line is {'an' if what == 'expert' else 'a'} {what}, the {mean} over its {many}"


def _of_experts(values: xr.DataArray, kind: str) -> xr.DataArray:
    experts = of.of_matrices(values, "expert")
    if "expert" not in values.coords or not (experts != schema.NO_EXPERT).any():
        raise MissingError(f"No {kind} of a routed expert was measured; choose another by (--by).")
    return values.sel({schema.MATRIX: experts != schema.NO_EXPERT})


def _by_layer(lines: list[Line], values: xr.DataArray) -> list[Line]:
    """Too many lines to be told apart: each has the colour of its layer, grey outside of them."""
    layers = {
        name: of.of_matrices(values[:, found], "layer")[0]
        for by in ("module", schema.MATRIX)
        for name, found in of.groups_of(values, by).items()
    }
    known = sorted({each for each in layers.values() if each != schema.NO_LAYER})
    colours = dict(zip(known, spread(len(known)), strict=True))
    return [
        Line(
            each.name,
            each.x,
            each.y,
            {"color": colours.get(layers[each.name], GREY), "linewidth": 0.7},
            cycles=each.cycles,
        )
        for each in lines
    ]


def _colour_bar(ax: "Axes", lines: list[Line], name: str, values: xr.DataArray) -> None:
    """The colours of layers, where the lines are too many to be named."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    numbers = of.of_matrices(values, name)
    numbers = numbers[numbers >= 0]
    describe(ax, f"The {len(lines)} lines are coloured by {name}, and grey outside of them"
             if (of.of_matrices(values, name) < 0).any() else
             f"The {len(lines)} lines are coloured by {name}")  # fmt: skip
    if numbers.size:
        norm = Normalize(int(numbers.min()), max(int(numbers.max()), int(numbers.min()) + 1))
        bar = ax.figure.colorbar(ScalarMappable(norm, layer_colours()), ax=ax, label=name)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(integer=True)
