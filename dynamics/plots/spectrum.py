"""The singular values of one matrix at several steps, with the noise floor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import MissingError, near
from dynamics.plots import shared
from dynamics.runs.run import abridged

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_spectrum(
    dataset: xr.Dataset,
    matrix: str,
    *,
    kind: str = schema.WEIGHT,
    steps: Sequence[int] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the singular values of one matrix on a logarithmic scale, one line per step.

    The dashed line is the noise floor of the last step that is drawn: singular values below it
    are rounding. Exact zeros cannot be shown on this scale and are left out.

    Args:
        dataset: a result of `analyze`.
        matrix: the name of a parameter.
        kind: one of the dataset's kinds.
        steps: the steps to draw. By default, at most six, evenly spread over the measured ones.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes.

    Raises:
        DynamicsError: `dataset` compares several runs.
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
    values = shared.metric_values(shared.require_one_run(dataset), schema.NOISE_FLOOR, kind)
    if matrix not in values[schema.MATRIX]:
        known = values[schema.MATRIX].values.tolist()
        raise MissingError(
            f"No measured {kind} of {matrix!r}{near(matrix, known)}; there are "
            f"{abridged(known, 4)}."
        )
    floors = values.sel({schema.MATRIX: matrix}).dropna(schema.STEP)
    measured_steps = floors[schema.STEP].values.tolist()
    if steps is None:
        positions = np.unique(np.linspace(0, len(measured_steps) - 1, 6).round().astype(int))
        steps = [measured_steps[position] for position in positions]
    for step in steps:
        if step not in measured_steps:
            known = ", ".join(map(str, measured_steps))
            raise MissingError(
                f"No {kind} of {matrix} was measured at step {step}; steps: {known}."
            )
    spectra = dataset[schema.SINGULAR_VALUE].sel({schema.KIND: kind, schema.MATRIX: matrix})
    ax = shared.axes_or_new(ax)
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(steps)))
    for step, colour in zip(steps, colours, strict=True):
        spectrum = spectra.sel({schema.STEP: step})
        ax.plot(
            spectrum[schema.INDEX] + 1,
            spectrum.where(spectrum > 0),
            color=colour,
            label=f"step {step}",
        )
    floor = float(floors.sel({schema.STEP: steps[-1]}))
    if floor > 0:
        ax.axhline(floor, color="0.35", linewidth=1, linestyle="--", label="noise floor")
    ax.set_yscale("log")
    ax.set_xlabel("index of the singular value")
    ax.set_ylabel(f"singular value, {kind}")
    ax.set_title(matrix, fontsize="medium")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.legend(fontsize="small", frameon=False)
    return ax
