"""Overlaps of subspaces over training, of the left and of the right directions."""

from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class _Show:
    """One of the figures.

    Attributes:
        lines: what a line is called -> its variable.
        meaning: of the y axis.
        what: the same for captions, with {k} directions.
        reference: a variable with what random directions have.
        also: more lines, where the result has them.
    """

    lines: dict[str, str]
    meaning: str
    what: str
    reference: str = ""
    also: dict[str, str] = field(default_factory=dict)


_OVERLAP = "of {k} leading directions above the noise floor"
_SHOWS = {
    "weight": _Show(
        {"left": "left_overlap_with_weight", "right": "right_overlap_with_weight"},
        "overlap with the weight",
        _OVERLAP,
    ),
    "last_cycle": _Show(
        {"left": "left_overlap_with_last_cycle", "right": "right_overlap_with_last_cycle"},
        "overlap with the last cycle",
        _OVERLAP,
    ),
    "energy": _Show(
        {"energy": "energy_in_weight"}, "share within the weight's subspaces", _OVERLAP
    ),
    "runs": _Show(
        {"left": "left_overlap", "right": "right_overlap"}, "overlap of the runs", _OVERLAP
    ),
    "alignment": _Show({"cosine": "alignment"}, "cosine between the runs", ""),
    "gradients": _Show(
        {
            "its own": "energy",
            "record before": "energy_in_last",
            "first record": "energy_in_first",
        },
        "share within {k} directions",
        "its own, those of the record before, and those of the first record",
        "chance",
        {"projector": "energy_in_projector"},
    ),
    "turning": _Show(
        {"record before": "overlap_with_last", "first record": "overlap_with_first"},
        "overlap with earlier directions",
        _OVERLAP,
        "chance",
    ),
    "intruders": _Show(
        {"the run": "intruders", "random change": "intruders_of_noise"},
        "intruders among {k} directions",
        "leading directions that the weight before did not have, beside those of a random change "
        "of equal norm and rank",
    ),
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
        overlaps: a result of `subspace_overlaps`, `run_alignment`, `gradient_subspaces` or
            `intruders`.
        show: "weight" (an update with the weight that it changes), "last_cycle" (an adapter with
            the one that was merged last), "energy" (share of an update in the weight's leading
            subspaces), "runs" (one run with another), "alignment" (the cosine between two runs),
            "gradients" (share of a gradient within its own and earlier leading directions, and
            within the projector in use where that is known),
            "turning" (overlap of these directions) or "intruders". By default, the first of these
            that it has.
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
    has = [name for name, each in _SHOWS.items() if set(each.lines.values()) <= set(overlaps)]
    if not has or "directions" not in overlaps.attrs:
        raise DynamicsError(
            "plot_overlaps takes what subspace_overlaps(), run_alignment(), gradient_subspaces() "
            "or intruders() returns, where it has values."
        )
    show = show or has[0]
    if show not in has:
        raise MissingError(f"No {show!r}{near(show, has)} in this result; it has "
                           f"{', '.join(has)}.")  # fmt: skip
    k = int(overlaps.attrs["directions"])
    also = {name: each for name, each in _SHOWS[show].also.items() if each in overlaps}
    names, meaning = _SHOWS[show].lines | also, _SHOWS[show].meaning.format(k=k)
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
    finish(ax, f"{meaning}, {kind}")
    describe(
        ax,
        ", ".join(
            filter(
                None,
                (
                    f"{meaning} of the {kind.replace('_', ' ')}",
                    _SHOWS[show].what.format(k=k),
                    "and those of the projector in use" if "projector" in also else "",
                    "along optimizer steps",
                ),
            )
        ),
        "Left and right: the output and the input side of the matrices" if "left" in names else "",
        f"Lines: the mean over {counted(counts, 'matrix', 'matrices')}" if max(counts) > 1 else "",
        f"Bands: the range of {counted(layers, 'layer')}" if max(layers) > 1 else "",
    )
    if "left" in names:
        _draw_random(ax, overlaps, show, drawn, k)
    elif _SHOWS[show].reference:
        _draw_reference(ax, of.metric_values(overlaps, _SHOWS[show].reference, kind), module, kind)
    top = k if show == "intruders" else 1
    ax.set_ylim(-1.02 if show == "alignment" and ax.get_ylim()[0] < 0 else 0, 1.02 * top)
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


def _draw_reference(ax: "Axes", values: xr.DataArray, module: str | None, kind: str) -> None:
    """What random directions have, as the result says."""
    level = float(of.of_module(values, module, kind).mean())
    ax.axhline(level, color=GREY, linewidth=thickness(0.9), linestyle="--", zorder=1,
               label="_random")  # fmt: skip
    label_end(ax, "random", level, GREY)
    describe(ax, "Dashed: the same of random directions, k / n")
