"""What the results pages have in common: tables and lines with intervals, and where they stand."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

import dynamics as dy
from dynamics.plots.drawing.lines import Line, quiet


def save_figure(path: Path, rows: int, columns: int, draw: Callable[[np.ndarray], None]) -> None:
    """Draw a figure of rows × columns panels into a PNG file."""
    plt.switch_backend("Agg")
    with dy.figure_style("paper", width="page", height=0.3 + 1.9 * rows):
        figure, axes = plt.subplots(rows, columns, squeeze=False)
        draw(axes)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def interval(found: xr.Dataset, digits: int) -> str:
    """Mean ± half of the 95 % interval over seeds; a dash where nothing was measured."""
    mean, half = float(found["mean"]), float(found["upper"] - found["mean"])
    if np.isnan(mean):
        return "–"
    mean = round(mean, digits) + 0.0  # not -0.0
    return (
        f"{mean:.{digits}f} ± {half:.{digits}f}"
        if round(half, digits) > 0
        else f"{mean:.{digits}f}"
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def with_tables(page: str, found: dict[str, str]) -> str:
    """The page with each table between <!-- NAME --> and <!-- end -->."""
    for name, text in found.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert marked.search(page), f"the page has no place for the table {name}"
        page = marked.sub(lambda place, text=text: f"{place[1]}{text}\n{place[2]}", page)
    return page


def line_of(found: xr.Dataset, label: str, style: dict[str, object], along: str = "step") -> Line:
    """A mean over seeds with its interval, where it was measured."""
    found = found.isel({along: np.flatnonzero(found["mean"].notnull().values)})
    bounds = (found[name].values for name in ("lower", "upper"))
    return Line(label, found[along].values, found["mean"].values, style, *bounds)


def finish(ax: Axes, xlabel: str, ylabel: str) -> None:
    """Labels and a quiet frame."""
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    quiet(ax)
    ax.locator_params(axis="x", nbins=5)
