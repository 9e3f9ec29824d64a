"""The whole spectrum of one matrix over training: index × time, with the numerical rank."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import MissingError
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import describe
from dynamics.plots.drawing.cells import (
    Limits,
    colour_bar,
    colour_scale,
    draw_cells,
    mark_merges_of_cells,
)
from dynamics.plots.drawing.lines import title
from dynamics.plots.drawing.style import thickness
from dynamics.plots.drawing.time_axis import time_axis
from dynamics.plots.spectrum import spectra_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_spectra_over_time(
    dataset: xr.Dataset,
    matrix: str,
    *,
    kind: str = schema.WEIGHT,
    limits: Limits = None,
    x: str = schema.STEP,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw all singular values of one matrix over training, as colours on a logarithmic scale.

    The white stairs are the numerical rank: what is above them is below the noise floor of its
    step. A cell reaches from the record before it to its own. Exact zeros are hatched.

    Args:
        dataset: a result of `analyze`.
        matrix: the name of a parameter.
        kind: one of the dataset's kinds.
        limits: the singular values at the ends of the colours. By default, from a tenth of the
            smallest one above its floor to the largest; all that is smaller has the darkest colour.
        x: "step", "tokens" or "epoch", as far as the result has them.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes.

    Raises:
        DynamicsError: `dataset` compares several runs, or the limits are not in order.
        MissingError: the matrix, kind or x is unknown, nothing was measured, or all of it is zero.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> analysis = dy.analyze("run.zarr", kinds=["displacement"])
        >>> name = "model.layers.0.mlp.up_proj.weight"
        >>> ax = dy.plot_spectra_over_time(analysis, name, kind="displacement")
        >>> ax.get_ylabel()
        'index of the singular value'
        >>> matplotlib.pyplot.close(ax.figure)
    """
    of.require_one_run(dataset)
    spectra, floors = spectra_of(dataset, matrix, kind)
    steps = dataset[schema.STEP].values
    cells = np.full((spectra.sizes[schema.INDEX], len(steps)), np.nan)
    ranks = np.full(len(steps), np.nan)
    floor = floors.values.astype(np.float64)
    found = spectra.transpose(schema.INDEX, schema.STEP).values.astype(np.float64)
    at = np.searchsorted(steps, spectra[schema.STEP].values)
    cells[:, at] = found
    above = found > floor
    ranks[at] = above.sum(axis=0)
    if not (cells > 0).any():
        raise MissingError(f"All singular values of the {kind} of {matrix} are zero.")
    if limits is None:
        counted = found[above & (found > 0)] if above.any() else cells[cells > 0]
        smallest = cells[cells > 0].min()
        limits = float(max(counted.min() / 10, smallest)), float(counted.max())
    axis = time_axis(dataset, x)
    ax = of.axes_or_new(ax)
    import matplotlib

    colours = matplotlib.colormaps["magma"]
    norm = colour_scale(cells, log=True, limits=limits)
    rows = np.arange(cells.shape[0] + 1) + 0.5
    describe(
        ax,
        f"Singular values of the {kind.replace('_', ' ')} of {matrix}, "
        f"{int(spectra['rows'])} × {int(spectra['cols'])}, along {axis.plural}",
        "White stairs: the numerical rank; what lies above them is below the noise floor of its "
        "step, hence rounding",
    )
    mesh = draw_cells(ax, axis, steps, rows, cells, norm, colours)
    known = np.isfinite(axis.at(steps))
    _draw_stairs(ax, axis.at(steps)[known], ranks[known] + 0.5)
    ax.set_ylim(rows[0], rows[-1])
    ax.set_ylabel("index of the singular value")
    colour_bar(mesh, [ax], f"singular value, {kind}")
    if cells[cells > 0].min() < limits[0]:
        describe(ax, f"All values below {limits[0]:.1g} have the darkest colour")
    mark_merges_of_cells(ax, axis)
    title(ax, matrix)
    return ax


def _draw_stairs(ax: "Axes", at: np.ndarray, heights: np.ndarray) -> None:
    """Stairs with the breadth of the cells, on a dark line that pale cells show."""
    low = ax.get_xlim()[0]
    there = np.isfinite(heights)
    x, y = at[there], heights[there]
    x, y = np.concatenate([[low], x]), np.concatenate([y[:1], y])
    for colour, width, name in (("0.1", 2.2, "_edge"), ("white", 1.1, "numerical rank")):
        ax.plot(x, y, drawstyle="steps-pre", color=colour, linewidth=thickness(width),
                label=name)  # fmt: skip
