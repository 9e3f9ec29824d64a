"""Lines along the time axis: with a band, a name at their end, breaks at merges, none hidden."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dynamics.plots.drawing.captions import describe, listed
from dynamics.plots.drawing.labels import MOST, NO_BREAK, broken, label_end, short_names
from dynamics.plots.drawing.style import GREY, panel_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_MARKED = 8  # markers on a line, about
_SAME = 0.004  # of the height of the axes: lines as near as this lie on each other


@dataclass(frozen=True)
class Line:
    """A line and how it looks.

    Attributes:
        name: what it stands for.
        x, y: (n,).
        style: colour, dashes, marker.
        low, high: (n,) the band, or None.
        cycles: the parts that are joined.
        shown: what stands at its end; its name by default.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    style: dict[str, Any]
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    cycles: Sequence[slice] = field(default_factory=lambda: [slice(None)])
    shown: str | None = None


def draw_lines(ax: "Axes", lines: Sequence[Line], *, values: bool = False, **options: Any) -> None:
    """Draw lines; name them at their ends if they are few; tell in the caption which are hidden.

    Args:
        ax: where.
        lines: from the lowest to the uppermost.
        values: whether the last value stands behind a name.
        options: for all lines, e.g. drawstyle.
    """
    drawn = [line for line in lines if np.isfinite(line.y).any()]
    few = len(lines) <= MOST
    same = _alike(drawn) if few else []
    under = {line.name for group in same for line in group[:-1]}
    names = dict(zip((each.name for each in lines), short_names([e.name for e in lines]),
                     strict=True)) if any("." in e.name for e in lines) else {}  # fmt: skip
    step = options.get("drawstyle", "").removeprefix("steps-") or None
    for number, line in enumerate(lines):
        x, y = _broken(line, line.x), _broken(line, line.y)
        style = dict(line.style)
        if "marker" in style:  # at other records for each line, so that none hides another's
            style["markevery"] = _marked(line, number)
        if line.name in under:  # a broad pale band below the line that hides it
            _underlay(ax, x, y, style["color"], options)
        ax.plot(x, y, label=line.name, **(style | options))
        if line.low is not None and line.high is not None:
            ax.fill_between(
                x,
                _broken(line, line.low),
                _broken(line, line.high),
                color=style["color"],
                alpha=0.16,
                linewidth=0,
                step=step,
            )
        if few:
            text = line.shown or names.get(line.name, line.name)
            finite = line.y[np.isfinite(line.y)]
            if finite.size == 0:
                label_end(ax, line.name, None, GREY)
                continue
            last = f":{NO_BREAK}{finite[-1]:.1f}".removesuffix(".0") if values else ""
            label_end(ax, f"{text}{last}", float(finite[-1]), style["color"])
    if not few:
        describe(ax, "Later ones hide earlier ones where they are close", last=True)
    for group in same:
        describe(
            ax, f"The lines of {listed(line.name for line in group)} lie on each other", last=True
        )


def _marked(line: Line, number: int) -> list[int]:
    """The points that get a marker: a few of each line, and records that are a cycle alone."""
    positions: list[int] = []
    alone: list[int] = []
    start = 0
    for part in line.cycles:
        size = len(line.x[part])
        positions += range(start, start + size)
        alone += [start] if size == 1 else []
        start += size + 1  # the break between two cycles
    every = max(1, len(positions) // _MARKED)
    return sorted({*positions[number % every :: every], *alone})


def _underlay(ax: "Axes", x: Any, y: Any, colour: Any, options: dict[str, Any]) -> None:
    import matplotlib

    width = 3.5 * matplotlib.rcParams["lines.linewidth"]
    (band,) = ax.plot(x, y, color=colour, linewidth=width, alpha=0.3, zorder=1.5, **options)
    band.set_label("_below")


def _broken(line: Line, values: np.ndarray) -> np.ndarray:
    """The values with NaN between the cycles."""
    parts: list[np.ndarray] = []
    for each in line.cycles:
        parts += [np.asarray(values, dtype=np.float64)[each], np.array([np.nan])]
    return np.concatenate(parts[:-1])


def _alike(lines: Sequence[Line]) -> list[list[Line]]:
    """Groups of lines that lie on each other wherever both are."""
    finite = [line.y[np.isfinite(line.y)] for line in lines]
    if not finite:
        return []
    height = max(each.max() for each in finite) - min(each.min() for each in finite)
    groups: list[list[Line]] = []
    for line in lines:
        for group in groups:
            if _coincide(group[0], line, _SAME * height):
                group.append(line)
                break
        else:
            groups.append([line])
    return [group for group in groups if len(group) > 1]


def _coincide(one: Line, other: Line, tolerance: float) -> bool:
    _, i, j = np.intersect1d(one.x, other.x, return_indices=True)
    a, b = one.y[i], other.y[j]
    both = np.isfinite(a) & np.isfinite(b)
    return bool(both.sum() >= 2 and (abs(a[both] - b[both]) <= tolerance).all())


def finish(ax: "Axes", ylabel: str, *, log: bool = False) -> None:
    """Name the y axis and set its scale; a light grid, and no frame at the top and the right."""
    ax.set_ylabel(ylabel).set_wrap(True)
    if log:
        ax.set_yscale("log")
        plain_decades(ax.yaxis, ax.get_ylim)
    quiet(ax)


def plain_decades(axis: "Axis", limits: "Callable[[], tuple[float, float]]") -> None:
    """Ticks at 1, 2, 5, 10, ... with plain numbers where a logarithmic axis has few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = limits()
    subs = (1, 2, 3, 4, 5, 7) if high < 6 * low else (1, 2, 5)
    if low > 0 and high / low < 300 and low >= 1e-3 and high < 1e5:
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def quiet(ax: "Axes") -> None:
    """A light grid below everything, no frame at the top and the right, lines up to the edge."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.margins(x=0.01)


def title(ax: "Axes", text: str) -> None:
    """A title; long ones are broken at dots and spaces."""
    ax.set_title(broken(text, int(72 * panel_width(ax) / (0.6 * 8))))
