"""Overlaps of subspaces over training, of the left and of the right directions."""

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError, near
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import counted, describe
from dynamics.plots.drawing.labels import label_end
from dynamics.plots.drawing.lines import Line, draw_lines, finish, title
from dynamics.plots.drawing.style import GREY, line_style, thickness
from dynamics.plots.drawing.time_axis import time_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Figure -> its variables, and what they are called.
_SHOWS = {
    "weight": (
        {"left": "left_overlap_with_weight", "right": "right_overlap_with_weight"},
        "overlap with the weight",
    ),
    "last_cycle": (
        {"left": "left_overlap_with_last_cycle", "right": "right_overlap_with_last_cycle"},
        "overlap with the last cycle",
    ),
    "runs": ({"left": "left_overlap", "right": "right_overlap"}, "overlap of the runs"),
    "energy": ({"energy": "energy_in_weight"}, "share within the weight's subspaces"),
    "alignment": ({"cosine": "alignment"}, "cosine between the runs"),
}


def plot_overlaps(
    overlaps: xr.Dataset,
    show: str | None = None,
    *,
    kind: str | None = None,
    module: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw how far subspaces overlap over training: 1 if they are the same, 0 if orthogonal.

    A line is a mean over matrices; its band is the range of the layers. Where it is known, a dashed
    line is the overlap that random subspaces have: k / n for k directions in n dimensions.

    Args:
        overlaps: a result of `subspace_overlaps` or `run_alignment`.
        show: "weight" (an update with the weight that it changes), "last_cycle" (an adapter with
            the one that was merged last), "energy" (share of an update in the weight's leading
            subspaces), "runs" (one run with another), or "alignment" (the cosine between two runs).
            By default, the first of weight, runs that it has.
        kind: one of its kinds; by default the first one that has values.
        module: the module to show; by default, all matrices inside the layers are averaged.
        ax: the Axes to draw on; by default, a new figure is made.

    Returns:
        The Axes.

    Raises:
        DynamicsError: `overlaps` is no such result.
        MissingError: it does not have what is to be shown, the kind or the module.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> overlaps = dy.subspace_overlaps("run.zarr", k=2, kinds=["adapter"])
        >>> ax = dy.plot_overlaps(overlaps, "last_cycle")
        >>> ax.get_ylabel()
        'overlap with the last cycle, adapter'
        >>> matplotlib.pyplot.close(ax.figure)
    """
    has = [name for name, (names, _) in _SHOWS.items() if set(names.values()) <= set(overlaps)]
    if not has:
        raise DynamicsError(
            "plot_overlaps takes what subspace_overlaps() or run_alignment() returns, where it has "
            "values."
        )
    show = show or next((name for name in ("weight", "runs") if name in has), has[0])
    if show not in has:
        raise MissingError(f"No {show!r}{near(show, has)} in this result; it has "
                           f"{', '.join(has)}.")  # fmt: skip
    names, meaning = _SHOWS[show]
    if kind is None:
        kind = _first_kind(overlaps[list(names.values())])
    drawn = {
        side: of.of_module(of.metric_values(overlaps, name, kind), module, kind)
        for side, name in names.items()
    }
    axis = time_axis(overlaps, schema.STEP)
    lines, counts, layers = [], [], []
    for number, (side, values) in enumerate(drawn.items()):
        mean = of.mean_over_matrices(values)
        counts.append(mean.count)
        layers.append(mean.layers)
        lines.append(Line(side, axis.at(mean.steps), mean.mean, line_style(number), *mean.band))
    ax = of.axes_or_new(ax)
    draw_lines(ax, lines)
    axis.label(ax)
    k = int(overlaps.attrs["directions"])
    finish(ax, f"{meaning}, {kind}")
    describe(
        ax,
        f"{meaning} of the {kind.replace('_', ' ')}, of {k} leading directions above the noise "
        "floor, along optimizer steps"
        if show != "alignment"
        else f"{meaning}, of the {kind.replace('_', ' ')}, along optimizer steps",
        "Left and right: the output and the input side of the matrices" if "left" in names else "",
        f"Lines: the mean over {counted(counts, 'matrix', 'matrices')}" if max(counts) > 1 else "",
        f"Bands: the range of {counted(layers, 'layer')}" if max(layers) > 1 else "",
    )
    if "left" in names:
        _draw_random(ax, overlaps, show, drawn, k)
    ax.set_ylim(-1.02 if show == "alignment" and ax.get_ylim()[0] < 0 else 0, 1.02)
    title(ax, module or "all matrices of the layers")
    return ax


def _first_kind(overlaps: xr.Dataset) -> str:
    for kind in overlaps[schema.KIND].values.tolist():
        if any(each.sel({schema.KIND: kind}).notnull().any() for each in overlaps.values()):
            return str(kind)
    raise MissingError("This result has no values of it.")


def _draw_random(
    ax: "Axes", overlaps: xr.Dataset, show: str, drawn: dict[str, xr.DataArray], k: int
) -> None:
    """What random subspaces give, where both have k directions: k / rows and k / cols."""
    if show == "last_cycle":
        return  # an adapter has r directions, which the result does not tell
    if show == "runs":
        sizes = overlaps["subspace_dimension"]
        if not (sizes.where(sizes.notnull(), k) == k).all():
            describe(ax, f"Some subspaces have fewer than {k} directions, so the overlap of random "
                         "ones is not drawn")  # fmt: skip
            return
    levels = {}
    for number, (side, values) in enumerate(drawn.items()):
        n = of.of_matrices(values, "rows" if side == "left" else "cols")
        levels[number] = float(np.minimum(k / n, 1).mean())
    for number, level in levels.items():
        colour = line_style(number)["color"]
        ax.axhline(
            level, color=colour, linewidth=thickness(0.9), linestyle="--", zorder=1, label="_random"
        )
    label_end(ax, "random", float(np.mean(list(levels.values()))), GREY)
    describe(ax, "Dashed: the mean overlap of random subspaces, k / n")
