"""How figures look: sizes and fonts for paper and slides, and the colours of runs and layers."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, near

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

# Of Okabe & Ito: the four that are told apart by all eyes and have contrast on white and on black.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1)))
_MARKERS = "os^D"
GREY = "0.35"  # of what is no measurement: bounds, floors, merges

# Inches: one and two columns of a journal.
WIDTHS = {"column": 3.4, "page": 6.75}
_SHAPES = {"column": 0.72, "page": 0.5}  # height / width
_SLIDE = (10.0, 5.6)

_COMMON: dict[str, Any] = {
    "axes.labelsize": "medium",
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "ps.fonttype": 42,
    "savefig.bbox": None,  # "tight" would change the width
    "svg.fonttype": "none",
    "svg.hashsalt": "learning-dynamics",
}
_STYLES: dict[str, dict[str, Any]] = {
    "paper": {
        "axes.linewidth": 0.6,
        "font.size": 8,
        "legend.fontsize": 7,
        "lines.linewidth": 1.2,
        "lines.markersize": 2.8,
        "savefig.dpi": 300,
        "xtick.labelsize": 7,
        "xtick.major.width": 0.6,
        "ytick.labelsize": 7,
        "ytick.major.width": 0.6,
    },
    "slides": {
        "axes.linewidth": 1,
        "font.size": 18,
        "legend.fontsize": 16,
        "lines.linewidth": 2.8,
        "lines.markersize": 7,
        "savefig.dpi": 150,
        "xtick.labelsize": 16,
        "ytick.labelsize": 16,
    },
}


def figure_style(
    style: str = "paper", *, width: str | float | None = None, height: float | None = None
) -> AbstractContextManager[None]:
    """Sizes and fonts for figures that are made and saved inside of a `with` statement.

    Files have exactly the size asked for. Text stays text in PDF and SVG. The ids in an SVG do not
    change from one run to the next.

    Args:
        style: "paper": 8 points, 7 for ticks and labels. "slides": 18 and 16 points.
        width: "column" (3.4 inches, the default for paper), "page" (6.75 inches), or inches. For
            slides, 10 inches by default.
        height: inches; by default, it goes with the width.

    Raises:
        DynamicsError: the style or width is unknown, or a size is not above zero.

    Example:
        >>> import matplotlib.pyplot as plt
        >>> with dy.figure_style("paper", width="page"):
        ...     figure, axes = plt.subplots(1, 2)
        >>> figure.get_size_inches().tolist()
        [6.75, 3.375]
        >>> plt.close(figure)
    """
    import matplotlib

    if style not in _STYLES:
        raise DynamicsError(
            f"No style {style!r}{near(style, _STYLES)}; known: {', '.join(_STYLES)}."
        )
    size = _slide(width) if style == "slides" else _page(width)
    if height is not None:
        _check(height, "height")
        size = size[0], height
    settings: Any = _COMMON | _STYLES[style] | {"figure.figsize": size}
    return matplotlib.rc_context(settings)


def _page(width: str | float | None) -> tuple[float, float]:
    name = "column" if width is None else width
    if isinstance(name, str):
        if name not in WIDTHS:
            raise DynamicsError(
                f"No width {name!r}{near(name, WIDTHS)}; give inches, or {' or '.join(WIDTHS)}."
            )
        return WIDTHS[name], WIDTHS[name] * _SHAPES[name]
    _check(name, "width")
    return name, name * _SHAPES["column" if name <= 5 else "page"]


def _slide(width: str | float | None) -> tuple[float, float]:
    if isinstance(width, str):
        raise DynamicsError(f"{width!r} is a width of paper; give the inches of a slide.")
    if width is None:
        return _SLIDE
    _check(width, "width")
    return width, width * _SLIDE[1] / _SLIDE[0]


def _check(inches: float, name: str) -> None:
    if not 0 < inches < 100:
        raise DynamicsError(f"{name} is {inches!r}; it is in inches, above 0 and below 100.")


def line_style(position: int, repeated: int = 0) -> dict[str, Any]:
    """The colour, dashes and marker of the line at a position: four colours, then dashes too."""
    dashes, colour = divmod(position, len(PALETTE))
    return {
        "color": PALETTE[colour],
        "linestyle": _DASHES[(dashes + repeated) % len(_DASHES)],
        "marker": _MARKERS[colour],
    }


def run_style(dataset: xr.Dataset, run: str, groups: Sequence[str] = ()) -> dict[str, Any]:
    """The style of a run: the same in every figure of a comparison, and of a part of it.

    A result remembers in its events which runs it was made of. Runs that differ in their seed have
    one colour, and so has the group that `over` makes of them.

    Args:
        dataset: of several runs.
        run: one of them, or of `groups`.
        groups: the groups that are drawn.
    """
    known = json.loads(dataset.attrs.get("events", "{}"))
    names = list(known) if isinstance(known, Mapping) else []
    here = [str(each) for each in dataset[schema.RUN].values] if schema.RUN in dataset.dims else []
    for order in (names, here):
        stems = [_stem(each) for each in order]
        colours = list(dict.fromkeys(stems))
        if run in order:
            stem = _stem(run)
            return line_style(colours.index(stem), stems[: order.index(run)].count(stem))
        if run in colours:
            return line_style(colours.index(run))
    return line_style(list(groups).index(run) if run in groups else 0)


def _stem(name: str) -> str:
    """The name of a run without its seed, as `over` names groups."""
    return re.sub(r"(^|[-_ ,]+)seed=?\d+(?=$|[-_ ,])", "", name) or name


def whole_figure(ax: "Axes") -> "Figure":
    """The figure that Axes belong to, also through subfigures."""
    figure = ax.get_figure(root=True)
    assert figure is not None, "Axes that were removed"
    return figure


def panel_width(ax: "Axes") -> float:
    """The inches that Axes have beside each other, in letters of paper: 8 points."""
    import matplotlib

    place = ax.get_subplotspec()
    columns = 1 if place is None else place.get_gridspec().ncols
    width = float(whole_figure(ax).get_size_inches()[0]) / columns
    return width * 8 / float(matplotlib.rcParams["font.size"])


def thickness(points: float) -> float:
    """A line width of figures for paper in the style that is used: of slides, it is broader."""
    import matplotlib

    return points * float(matplotlib.rcParams["lines.linewidth"]) / 1.2


def layer_colours() -> "Colormap":
    """The colours of what has an order (layers, steps): dark to light, without the palest."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, 256)), "layers")


def spread(count: int) -> np.ndarray:
    """(count, 4) colours of `layer_colours`, from the first to the last."""
    return layer_colours()(np.linspace(0, 1, count) if count > 1 else np.array([0.0]))
