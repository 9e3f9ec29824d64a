"""The singular values of one matrix at several steps, with the noise floor of each."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import counted, describe
from dynamics.plots.drawing.lines import finish, title
from dynamics.plots.drawing.style import GREY, spread, thickness
from dynamics.spectra.random_matrices import (
    TRACY_WIDOM_999,
    largest_singular_value,
    marchenko_pastur_edges,
    marchenko_pastur_median,
    random_spectrum,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 6  # steps that are drawn where nobody chooses


def plot_spectrum(
    dataset: xr.Dataset,
    matrix: str,
    *,
    kind: str = schema.WEIGHT,
    steps: Sequence[int] | None = None,
    bulk: bool | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the singular values of one matrix on a logarithmic scale, one line per step.

    Each step has its own noise floor, a dashed line in its colour: singular values below it are
    rounding. They are drawn thin. The dot at the last value above the floor has the numerical rank.
    Exact zeros cannot be shown on this scale and are left out.

    The bulk is that of a random matrix of this shape, with the median singular value of the last
    step (`dynamics.metrics.outliers`): the grey band lies between the edges of Marchenko and
    Pastur, and the dotted line is the expected spectrum. Open circles are outliers of the last
    step, above the 99.9 % point of the largest singular value of such a matrix.

    A vertical line stands behind the last singular value that the rank bound of a step allows,
    where that is less than the size of the matrix (and `rank_bound` was measured).

    Args:
        dataset: a result of `analyze`.
        matrix: the name of a parameter.
        kind: one of the dataset's kinds.
        steps: the steps to draw. By default, at most six, evenly spread over the measured ones.
        bulk: whether the bulk and the outliers are drawn; by default, if half of the singular
            values of the last step are above their floor.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes.

    Raises:
        DynamicsError: `dataset` compares several runs; or `bulk` is asked for where half of the
            singular values are rounding, so that their median says nothing.
        MissingError: the matrix, kind or a step is unknown, or nothing was measured.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> analysis = dy.analyze("run.zarr", kinds=["weight"])
        >>> ax = dy.plot_spectrum(analysis, analysis["matrix"].values[0])
        >>> ax.get_ylabel(), ax.get_yscale()
        ('singular value, weight', 'log')
        >>> matplotlib.pyplot.close(ax.figure)
    """
    of.require_one_run(dataset)
    spectra, floors = spectra_of(dataset, matrix, kind)
    steps = _chosen(spectra[schema.STEP].values.tolist(), steps, f"{kind} of {matrix}")
    rows, cols = (int(spectra[name]) for name in ("rows", "cols"))
    table = {step: spectra.sel({schema.STEP: step}).dropna(schema.INDEX).values for step in steps}
    floor = {step: float(floors.sel({schema.STEP: step})) for step in steps}
    if not any((s > 0).any() for s in table.values()):
        raise MissingError(f"All singular values of the {kind} of {matrix} are zero.")
    last = steps[-1]
    ranks = {step: int((s > floor[step]).sum()) for step, s in table.items()}
    can = 2 * ranks[last] >= min(rows, cols) and min(rows, cols) > 1
    if bulk and not can:
        raise DynamicsError(
            f"Half of the singular values of this {kind} are below the noise floor at step {last}: "
            "it has no bulk of random values. Leave bulk out."
        )
    ax = of.axes_or_new(ax)
    describe(
        ax,
        f"Singular values of the {kind.replace('_', ' ')} of {matrix}, {rows} × {cols}, at "
        f"{f'{len(steps)} steps' if len(steps) > 1 else f'step {last}'}",
        "Later steps are drawn above earlier ones" if len(steps) > 1 else "",
        "Dots, and the numbers in brackets: the numerical rank, the count above the noise floor"
        if len(steps) > 1
        else f"Dot: the numerical rank of {ranks[last]}, the count above the noise floor",
    )
    if can and bulk is not False:
        _draw_bulk(ax, table[last], rows, cols, floor[last], last)
    for step, colour in zip(steps, spread(len(steps)), strict=True):
        _draw_step(ax, step, table[step], floor[step], colour)
    for step, colour in zip(steps, spread(len(steps)), strict=True):
        if rank := ranks[step]:
            ax.plot(rank, table[step][rank - 1], "o", color=colour, label="_rank")
    if len(steps) > 1:
        _step_bar(ax, ranks)
    _draw_floors(ax, table, floor, spread(len(steps)))
    if "rank_bound" in dataset:
        bounds = dataset["rank_bound"].sel({schema.KIND: kind, schema.MATRIX: matrix})
        _draw_bounds(ax, bounds.sel({schema.STEP: steps}).values, min(rows, cols))
    ax.set_xlabel("index of the singular value")
    finish(ax, f"singular value, {kind}", log=True)
    title(ax, matrix)
    return ax


def spectra_of(dataset: xr.Dataset, matrix: str, kind: str) -> tuple[xr.DataArray, xr.DataArray]:
    """Singular values (step, index) and floors (step,) of a matrix, at steps that have both.

    Raises:
        MissingError: the result has no spectra, or none of this matrix and kind.
    """
    of.refuse_difference(dataset)
    if schema.SINGULAR_VALUE not in dataset:
        raise MissingError("This result has no singular values; measure the run again.")
    floors = of.of_a_matrix(of.metric_values(dataset, schema.NOISE_FLOOR, kind), matrix, kind)
    spectra = dataset[schema.SINGULAR_VALUE].sel({schema.KIND: kind, schema.MATRIX: matrix})
    spectra = spectra.sel({schema.STEP: floors[schema.STEP]}).dropna(schema.STEP, how="all")
    if not spectra.size:
        raise MissingError(f"This result has no singular values of the {kind} of {matrix}.")
    spectra = spectra.dropna(schema.INDEX, how="all")
    return spectra, floors.sel({schema.STEP: spectra[schema.STEP]})


def _chosen(measured: list[int], steps: Sequence[int] | None, what: str) -> list[int]:
    if steps is None:
        positions = np.linspace(0, len(measured) - 1, _MOST).round().astype(int)
        return [measured[position] for position in np.unique(positions)]
    if not len(steps):
        raise DynamicsError("No step is asked for; leave steps out to draw some of all.")
    for step in steps:
        if step not in measured:
            known = ", ".join(map(str, measured))
            raise MissingError(f"No {what} was measured at step {step}; steps: {known}.")
    return list(dict.fromkeys(steps))


def _draw_step(ax: "Axes", step: int, s: np.ndarray, floor: float, colour: Any) -> None:
    """Thick above the floor, thin below it; a cliff between the two is no line."""
    index = np.arange(1, len(s) + 1)
    positive = np.where(s > 0, s, np.nan)
    rank = int((s > floor).sum())
    ax.plot(index[:rank], positive[:rank], color=colour, label=f"step {step}")
    ax.plot(index[rank:], positive[rank:], color=colour, linewidth=thickness(0.6),
            label=f"_below {step}")  # fmt: skip


def _draw_bulk(ax: "Axes", s: np.ndarray, rows: int, cols: int, floor: float, step: int) -> None:
    """See `plot_spectrum`. The numbers are those of `dynamics.metrics.outliers`."""
    sigma = float(np.median(s)) / marchenko_pastur_median(rows, cols)
    lower, upper = (sigma * each for each in marchenko_pastur_edges(rows, cols))
    edge = max(sigma * largest_singular_value(rows, cols, TRACY_WIDOM_999), floor)
    index = np.arange(1, len(s) + 1)
    shown = max(lower, float(s[s > 0].min()) / 3)  # the lower edge of square matrices is zero
    ax.axhspan(shown, upper, color="0.92", linewidth=0, zorder=0, label="_bulk")
    ax.plot(index, sigma * random_spectrum(rows, cols), color="black", linestyle=":",
            linewidth=thickness(1), label="_random", zorder=3)  # fmt: skip
    beyond = int((s > edge).sum())
    ax.plot(index[:beyond], s[:beyond], "o", markerfacecolor="none", markeredgecolor=GREY,
            markersize=6, linestyle="none", label="_outliers")  # fmt: skip
    describe(
        ax,
        "Grey band and black dots: edges and expected values of a random matrix of this shape with "
        f"the median of step {step}",
        f"Circles: {counted([beyond], 'outlier')} beyond it"
        if beyond
        else "No value lies beyond it",
    )


def _draw_floors(
    ax: "Axes", table: Mapping[int, np.ndarray], floor: Mapping[int, float], colours: np.ndarray
) -> None:
    """A line for the floor of each step; not decades below all values, which would be flat."""
    smallest = min(float(s[s > 0].min()) for s in table.values() if (s > 0).any())
    levels = [each for each in floor.values() if each > 0]
    if not levels:
        return
    if max(levels) < smallest / 10:
        low, high = (f"{each:.1e}" for each in (min(levels), max(levels)))
        span = low if low == high else f"{low} to {high}"
        describe(ax, f"No value is near the noise floor of its step ({span}, below the axes)")
        return
    for (step, level), colour in zip(floor.items(), colours, strict=True):
        if level > 0:
            ax.axhline(level, color=colour, linewidth=thickness(0.8), linestyle="--", zorder=1,
                       label=f"noise floor of step {step}")  # fmt: skip
    describe(
        ax, "Dashed, in the colour of each step: its noise floor; values below it are drawn thin"
    )


def _draw_bounds(ax: "Axes", bounds: np.ndarray, size: int) -> None:
    """A vertical line behind the last index that each step's rank bound allows."""
    colours = spread(len(bounds)) if len(set(bounds)) > 1 else [GREY] * len(bounds)
    drawn = {bound: colour for bound, colour in zip(bounds, colours, strict=True) if bound < size}
    for bound, colour in drawn.items():
        ax.axvline(bound + 0.5, color=colour, linewidth=thickness(0.8), linestyle="-.", zorder=1,
                   label="_bound")  # fmt: skip
    if len(drawn) == 1:
        describe(ax, f"Dash-dotted: the rank bound of {next(iter(drawn)):g}")
    elif drawn:
        low, high = min(drawn), max(drawn)
        describe(ax, f"Dash-dotted: the rank bounds of the steps, {low:g} to {high:g}")


def _step_bar(ax: "Axes", ranks: Mapping[int, int]) -> None:
    """The colours of the steps beside the axes, with the ranks, which would collide at the dots."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm(np.arange(len(ranks) + 1) - 0.5, len(ranks))
    colours = ScalarMappable(norm, ListedColormap(spread(len(ranks))))
    bar = ax.figure.colorbar(colours, ax=ax, label="optimizer step (numerical rank)", aspect=25)
    bar.set_ticks(range(len(ranks)), labels=[f"{step} ({rank})" for step, rank in ranks.items()])
    bar.ax.tick_params(length=0)
    bar.ax.yaxis.label.set_wrap(True)
    bar.outline.set_visible(False)
