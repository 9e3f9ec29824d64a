"""Small multiples: the same figure for each run, kind, module, layer or expert, on one scale."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.analysis.comparison import select_run
from dynamics.errors import DynamicsError, MissingError, near
from dynamics.plots.drawing import values as of
from dynamics.plots.drawing.captions import describe, listed
from dynamics.plots.drawing.cells import colour_bar, colour_scale, hatch
from dynamics.plots.drawing.labels import broken, has_labels, remove_labels
from dynamics.plots.drawing.lines import title
from dynamics.plots.drawing.time_axis import has_merge_name, hide_merge_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

_BY = (schema.RUN, schema.KIND, "module", "layer", "expert", "stack", "attention", "component")
_NONE = {"layer": schema.NO_LAYER, "expert": schema.NO_EXPERT}
_MOST = 36


def plot_panels(
    draw: "Callable[..., Axes]",
    dataset: xr.Dataset,
    *arguments: Any,
    by: str,
    columns: int | None = None,
    axes: "np.ndarray | None" = None,
    **options: Any,
) -> np.ndarray:
    """Draw one figure for each run, kind, module, layer or expert, all on the same scales.

    Colours of all panels have one scale, and y axes are shared.

    Args:
        draw: what is drawn: `dy.plot_heatmap`, `dy.plot_trajectory`, ..., or a function of yours
            that takes a result and `ax=`. What a figure itself calls `by` goes into it:
            `functools.partial(dy.plot_trajectory, by="layer")`.
        dataset: a result.
        arguments: what `draw` takes after the result.
        by: "run", "kind", "module", "layer", "expert", "stack", "attention" or "component".
        columns: panels beside each other; by default, as many as have about 2 inches each.
        axes: an array of Axes to draw on, at least one for each panel; by default, a new figure of
            the width of `figure.figsize` is made.
        options: what `draw` takes by name. A `kind` for which `by` is "kind" is refused.

    Returns:
        (panels,) the Axes, each with the name of its part as title.

    Raises:
        DynamicsError: `by` is "run" for one run; an option is given twice; fewer Axes than panels;
            more than 36 panels.
        MissingError: `by` is unknown, or the result has nothing of it.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> runs = {"full": "full/run.zarr", "relora": "relora/run.zarr"}
        >>> both = dy.compare(runs, kinds=["weight"])
        >>> axes = dy.plot_panels(dy.plot_heatmap, both, "stable_rank", by="run")
        >>> [ax.get_title() for ax in axes]
        ['full', 'relora']
        >>> [mesh] = {ax.collections[0].norm for ax in axes}  # one scale for both
        >>> matplotlib.pyplot.close("all")
    """
    if by not in _BY:
        raise MissingError(f"No panels by {by!r}{near(by, _BY)}; known: {', '.join(_BY)}.")
    if by == schema.KIND and schema.KIND in options:
        raise DynamicsError("Panels by kind draw every kind; leave kind (--kind) out.")
    parts = _parts(dataset, by)
    if len(parts) > _MOST:
        raise DynamicsError(
            f"{len(parts)} panels are too many ({_MOST} at most); choose some with .sel or .isel."
        )
    used = _grid(len(parts), columns) if axes is None else np.asarray(axes, dtype=object).ravel()
    if len(used) < len(parts):
        raise DynamicsError(f"{len(parts)} panels need as many Axes; found {len(used)}.")
    used = used[: len(parts)]
    for ax, (part, own) in zip(used, parts.values(), strict=True):
        draw(part, *arguments, ax=ax, **(options | own))
        describe(ax, f"Panels: {listed(parts)}", last=True)
    for ax, name in zip(used, parts, strict=True):
        title(ax, name)
    _one_scale(used, options.get("log"))
    if axes is None:
        _tidy(used)
    return used


def _parts(dataset: xr.Dataset, by: str) -> dict[str, tuple[xr.Dataset, dict[str, Any]]]:
    """Name -> the part of the result, and options that choose it."""
    if by == schema.RUN:
        if schema.RUN not in dataset.dims:
            raise DynamicsError("Panels by run are for several runs; this result is of one.")
        return {run: (select_run(dataset, run), {}) for run in dataset[schema.RUN].values.tolist()}
    if by == schema.KIND:
        measured = [
            kind
            for kind in dataset[schema.KIND].values.tolist()
            if _has(dataset.sel({schema.KIND: kind}))
        ]
        return {kind: (dataset, {schema.KIND: kind}) for kind in measured}
    names = of.of_matrices(dataset, by)
    none = _NONE.get(by, "")
    found = [each for each in dict.fromkeys(names.tolist()) if each != none]
    if by in _NONE:
        found = sorted(found)
    if not found:
        raise MissingError(f"No {by} in this result; choose other panels.")
    return {
        f"{by} {each}" if by in _NONE else str(each): (
            dataset.isel({schema.MATRIX: np.flatnonzero(names == each)}),
            {},
        )
        for each in found
    }


def _has(dataset: xr.Dataset) -> bool:
    return bool((dataset[schema.STATUS] == 1).any()) if schema.STATUS in dataset else True


def _grid(panels: int, columns: int | None) -> np.ndarray:
    import matplotlib
    import matplotlib.pyplot as plt

    width, height = matplotlib.rcParams["figure.figsize"]
    points = matplotlib.rcParams["font.size"]
    if columns is None:
        columns = max(1, min(panels, round(width / (2 * points / 8))))
    if columns < 1:
        raise DynamicsError(f"columns is {columns}; it must be at least 1.")
    columns = min(columns, panels)
    rows = -(-panels // columns)
    tall = height if rows == 1 else rows * min(height, 0.85 * width / columns)
    _, axes = plt.subplots(rows, columns, figsize=(width, tall), sharex=True, sharey=True,
                                squeeze=False, layout="constrained")  # fmt: skip
    for ax in axes.flat[panels:]:
        ax.remove()
    return axes.ravel()[:panels]


def _one_scale(axes: np.ndarray, log: bool | None) -> None:
    """One norm and one colour bar for the maps of all panels."""
    meshes = [mesh for ax in axes for mesh in _meshes(ax)]
    if not meshes:
        return
    from matplotlib.colors import LogNorm

    ends: list[Any] = [(mesh.norm.vmin, mesh.norm.vmax) for mesh in meshes]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    cells = np.concatenate(
        [np.ma.asarray(mesh.get_array()).filled(np.nan).ravel() for mesh in meshes]
    )
    if any(isinstance(mesh.norm, LogNorm) for mesh in meshes):
        log, low = True, min(low for low, _ in ends if low > 0)
    norm = colour_scale(cells, log=log, limits=(low, high) if log or low < 0 else None)
    label = ""
    for mesh in meshes:
        if mesh.colorbar is not None:
            label = mesh.colorbar.ax.get_ylabel() or label
            mesh.colorbar.remove()
        mesh.set_norm(norm)
    colour_bar(meshes[0], list(axes), label)
    logarithmic = isinstance(norm, LogNorm)
    for ax in axes:
        describe(ax, f"All panels have one {'logarithmic ' if logarithmic else ''}colour scale",
                 last=True)  # fmt: skip
        hatch(ax)


def _meshes(ax: "Axes") -> "list[QuadMesh]":
    from matplotlib.collections import QuadMesh

    return [each for each in ax.collections if isinstance(each, QuadMesh)]


def _tidy(axes: np.ndarray) -> None:
    """Say once what all panels say: names of axes, of lines and of the merge."""
    figure = axes[0].figure
    others = [ax for ax in figure.axes if ax not in axes and ax.get_label() != "<colorbar>"]
    common = "" if others else _common({ax.get_ylabel() for ax in axes})
    if common:
        size = axes[0].yaxis.label.get_fontsize()
        letters = int(72 * figure.get_size_inches()[1] / (0.6 * size))
        figure.supylabel(broken(common, letters), fontsize=size)
        for ax in axes:
            ax.set_ylabel("")
    columns = axes[0].get_subplotspec().get_gridspec().ncols
    for number, ax in enumerate(axes):
        name = ax.get_xlabel()
        ax.label_outer()
        if number + columns >= len(axes):  # nothing stands below it
            ax.set_xlabel(name)
            ax.tick_params(labelbottom=True)
    named = [ax for ax in axes if has_merge_name(ax)]
    for ax in axes if named else []:
        if ax is not named[0]:
            hide_merge_name(ax, keep_room=True)
    for ax in axes:
        if _names(ax) == [ax.get_title()]:
            remove_labels(ax)
    if len(axes) > 1 and len({tuple(_names(ax)) for ax in axes}) == 1 and len(_names(axes[0])) > 1:
        names = _names(axes[0])
        lines = [line for line in axes[0].get_lines() if line.get_label() in names]
        for ax in axes:
            remove_labels(ax)
        figure.legend(lines, names, loc="outside lower center",
                      ncols=min(len(lines), 4))  # fmt: skip


def _common(names: set[str]) -> str:
    """What all names begin with, up to a comma: kinds stand in the titles then."""
    parts = [name.split(", ") for name in names]
    shared = []
    for each in zip(*parts, strict=False):
        if len(set(each)) > 1:
            break
        shared.append(each[0])
    return ", ".join(shared)


def _names(ax: "Axes") -> list[str]:
    """The names of lines that stand at their ends."""
    if not has_labels(ax):
        return []
    return [name for line in ax.get_lines() if (name := str(line.get_label()))[:1] != "_"]
