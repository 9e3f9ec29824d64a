"""The rank budget at one step: numerical and effective rank as parts of the bound."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError, near
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import counted, describe, listed
from dynamics.plots.drawing.labels import broken
from dynamics.plots.drawing.lines import quiet, title
from dynamics.plots.drawing.style import PALETTE, panel_width, run_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BY = ("module", "layer", schema.MATRIX, "expert", schema.RUN)
_PARTS = ("rank_bound", "numerical_rank", "effective_rank")
_TALL = 8  # bars, up to which a name has room for two lines
_MOST = 40  # bars with names that can be read


def plot_rank_budget(
    dataset: xr.Dataset,
    *,
    kind: str = schema.DISPLACEMENT,
    by: str | None = None,
    step: int | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw how much of the rank that is allowed is used, as one bar for each module, layer or run.

    The frame of a bar is the rank bound, the pale part the numerical rank (directions above the
    noise floor) and the dark part the effective rank (how many of them carry weight). The numbers
    are effective, numerical and bound.

    Args:
        dataset: a result of `analyze`; or of `compare`, for a bar for each run.
        kind: displacement, adapter, or another one of its kinds.
        by: what a bar stands for: "module" (the default of one run), "layer", "expert", "matrix",
            or "run" (the default of several). It is the mean over its matrices; for "run", over
            those inside the layers.
        step: the step to show; by default, the last one at which all runs were measured that have
            the kind at all.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes.

    Raises:
        DynamicsError: `by` does not go with the number of runs, or there are more than 40 bars.
        MissingError: a metric, the kind, `by` or the step is unknown, or nothing was measured.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> analysis = dy.analyze("run.zarr", kinds=["adapter"])
        >>> ax = dy.plot_rank_budget(analysis, kind="adapter")
        >>> ax.get_xlabel()
        'directions of the adapter at step 8'
        >>> matplotlib.pyplot.close(ax.figure)
    """
    of.refuse_difference(dataset)
    several = schema.RUN in dataset.dims
    by = by or (schema.RUN if several else "module")
    if by not in _BY:
        raise MissingError(f"No grouping {by!r}{near(by, _BY)}; known: {', '.join(_BY)}.")
    if (by == schema.RUN) != several:
        fits = "by='run' (--by run)" if several else "by='module' (--by module) and the like"
        raise DynamicsError(
            f"by={by!r} does not fit a result of {'several runs' if several else 'one run'}; "
            f"choose {fits}{', or one run (--run)' if several else ''}."
        )
    parts = {name: of.metric_values(dataset, name, kind) for name in _PARTS}
    step = _step(parts["numerical_rank"], step, kind)
    parts = {name: each.sel({schema.STEP: step}) for name, each in parts.items()}
    if by == "layer":
        parts = {name: of.inside_layers(each, kind) for name, each in parts.items()}
    bars = _bars(parts, by, kind)
    if len(bars) > _MOST:
        raise DynamicsError(
            f"{len(bars)} bars are too many to be read; choose another by (--by), or fewer "
            "matrices (.sel(matrix=[...]))."
        )
    ax = of.axes_or_new(ax)
    for place, (name, (_, bound, numerical, effective)) in enumerate(bars.items()):
        colour = run_style(dataset, name)["color"] if several else PALETTE[0]
        ax.barh(place, numerical, 0.62, color=colour, alpha=0.3, linewidth=0, label="_numerical")
        ax.barh(place, effective, 0.62, color=colour, linewidth=0, label="_effective")
        ax.barh(place, bound, 0.76, fill=False, edgecolor="0.35", linewidth=0.8, label="_bound")
        _numbers(ax, place, bound, f"{effective:.3g} · {numerical:.3g} · {bound:.3g}")
    names = [broken(name, 30) if len(bars) <= _TALL else name for name in bars]
    ax.set_yticks(range(len(bars)), names)
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.set_xlim(0, max(each[1] for each in bars.values()) * 1.02)
    letters = int(72 * panel_width(ax) / (0.7 * 8))
    ax.set_xlabel(broken(f"directions of the {kind.replace('_', ' ')} at step {step}", letters))
    quiet(ax)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    title(ax, "effective · numerical · bound")
    if several:
        without = [run for run in dataset[schema.RUN].values.tolist() if run not in bars]
        if without:
            describe(ax, f"Without {kind} at this step: {listed(without)}", last=True)
    counts = [each[0] for each in bars.values()]
    mean = f", the mean over {counted(counts, 'matrix', 'matrices')}" if max(counts) > 1 else ""
    describe(
        ax,
        f"Ranks of the {kind.replace('_', ' ')} at step {step}",
        f"Each bar is a {by}{mean}".replace("a expert", "an expert"),
        "Frame: the rank bound. Pale: the numerical rank, the directions above the noise floor. "
        "Dark: the effective rank. The numbers are effective rank, numerical rank and bound",
    )
    return ax


def _step(values: xr.DataArray, step: int | None, kind: str) -> int:
    there = values.notnull().any(schema.MATRIX)
    everywhere = there
    if schema.RUN in there.dims:
        having = there.isel({schema.RUN: np.flatnonzero(there.any(schema.STEP))})
        there, everywhere = there.any(schema.RUN), having.all(schema.RUN)
    measured = there[schema.STEP].values[there.values].tolist()
    if step is None:
        common = there[schema.STEP].values[everywhere.values].tolist()
        return int((common or measured)[-1])
    if step not in measured:
        known = ", ".join(map(str, measured))
        raise MissingError(f"No {kind} was measured at step {step}; steps: {known}.")
    return step


def _bars(
    parts: dict[str, xr.DataArray], by: str, kind: str
) -> dict[str, tuple[int, float, float, float]]:
    """Name -> number of matrices, and the means of bound, numerical and effective rank."""
    measured = parts["numerical_rank"].notnull()
    if by == schema.RUN:
        inside = {name: of.of_module(each, None, kind) for name, each in parts.items()}
        measured = inside["numerical_rank"].notnull()
        return {
            run: (int(measured.sel({schema.RUN: run}).sum()), *_means(inside, {schema.RUN: run}))
            for run in measured[schema.RUN].values.tolist()
            if measured.sel({schema.RUN: run}).any()
        }
    bars = {}
    for name, found in of.groups_of(measured, by).items():
        chosen = np.flatnonzero(found & measured.values)
        if chosen.size:
            bars[name] = (int(chosen.size), *_means(parts, matrices=chosen))
    return bars


def _means(
    parts: dict[str, xr.DataArray], at: dict | None = None, matrices: np.ndarray | None = None
) -> tuple[float, float, float]:
    chosen = [each if at is None else each.sel(at) for each in parts.values()]
    if matrices is not None:
        chosen = [each.isel({schema.MATRIX: matrices}) for each in chosen]
    bound, numerical, effective = (float(each.mean()) for each in chosen)
    return bound, numerical, effective


def _numbers(ax: "Axes", place: int, bound: float, text: str) -> None:
    import matplotlib

    ax.annotate(
        text,
        (1, place),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=matplotlib.rcParams["legend.fontsize"],
    )
