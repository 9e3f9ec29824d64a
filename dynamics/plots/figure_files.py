"""Figures in files: which figure a style is, what its file is called, what it may not replace."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError, OutputExistsError, local_path, near
from dynamics.plots.budget import plot_rank_budget
from dynamics.plots.comparison import plot_comparison
from dynamics.plots.differences import plot_difference
from dynamics.plots.drawing.captions import caption
from dynamics.plots.drawing.style import figure_style, whole_figure
from dynamics.plots.heatmap import plot_heatmap
from dynamics.plots.loss import plot_loss
from dynamics.plots.panels import plot_panels
from dynamics.plots.spectra_over_time import plot_spectra_over_time
from dynamics.plots.spectrum import plot_spectrum
from dynamics.plots.staircase import plot_staircase
from dynamics.plots.trajectory import plot_trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Style -> the function that draws it; what it takes are its arguments.
STYLES: "dict[str, Callable[..., Axes]]" = {
    "trajectory": plot_trajectory,
    "comparison": plot_comparison,
    "difference": plot_difference,
    "heatmap": plot_heatmap,
    "spectrum": plot_spectrum,
    "spectra": plot_spectra_over_time,
    "staircase": plot_staircase,
    "budget": plot_rank_budget,
    "loss": plot_loss,
}
# Without a date, the same figure is the same file.
_METADATA = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def save_figure(
    dataset: xr.Dataset,
    output: Path | None = None,
    *,
    stem: str = "result",
    style: str | None = None,
    panels: str | None = None,
    slides: bool = False,
    width: str | float | None = None,
    height: float | None = None,
    overwrite: bool = False,
    **options: Any,
) -> tuple[Path, str]:
    """Draw a result into a file; returns its path and the caption.

    Args:
        dataset: what `analyze`, `compare` or `difference` returned.
        output: a PNG, PDF or SVG file; STEM.STYLE.METRIC.KIND.png by default.
        stem: how the names of files without `output` begin.
        style: one of `STYLES`; by default "comparison" for several runs, else "trajectory".
        panels: one figure for each of these, see `plot_panels`.
        slides: whether fonts and size are those of slides; those of paper by default.
        width: see `figure_style`.
        height: likewise.
        overwrite: whether the file may replace another one.
        options: what the function of the style takes by name; None stands for its default.

    Raises:
        OutputExistsError: the file exists.
        DynamicsError: something that this style needs or does not take; the file cannot be written.
        MissingError: the result does not have what is to be drawn.
    """
    style = style or ("comparison" if schema.RUN in dataset.dims else "trajectory")
    if style not in STYLES:
        raise MissingError(f"No style {style!r}{near(style, STYLES)}; known: {', '.join(STYLES)}.")
    draw = STYLES[style]
    given = {name: each for name, each in options.items() if each is not None}
    _check(style, given)
    output = local_path(output) if output else Path(f"{stem}.{_name(style, given)}.png")
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output} exists; choose another output or add --overwrite.")
    with figure_style("slides" if slides else "paper", width=width, height=height):
        axes: Any = (
            draw(dataset, **given) if panels is None else _panels(draw, dataset, panels, given)
        )
        first = axes if panels is None else axes[0]
        figure = whole_figure(first)
        text = caption(figure.axes if style == "loss" else axes)
        try:
            figure.savefig(output, metadata=_METADATA.get(output.suffix.lower()))
        except (ValueError, OSError) as error:
            raise DynamicsError(f"Cannot draw {output}: {error}.") from error
    return output, text


def _panels(
    draw: "Callable[..., Axes]", dataset: xr.Dataset, by: str, given: dict[str, Any]
) -> Any:
    """Panels, inside of which `draw` may group by something else."""
    if "by" in given:
        draw = partial(draw, by=given["by"])
    options = {name: each for name, each in given.items() if name != "by"}
    return plot_panels(draw, dataset, by=by, **options)


def _check(style: str, given: dict[str, Any]) -> None:
    """Refuse options that the style has not, and a spectrum of no matrix."""
    takes = {name: set(signature(each).parameters) for name, each in STYLES.items()}
    for name in given:
        if name not in takes[style]:
            fits = [each for each, parameters in takes.items() if name in parameters]
            raise DynamicsError(
                f"--{name} has no effect on --style {style}; it is for {' and '.join(fits)}. "
                "Leave it out, or choose another --style."
            )
    if "matrix" in takes[style] and "matrix" not in given:
        raise DynamicsError(f"--style {style} needs --matrix NAME; 'dynamics inspect' lists them.")


def _name(style: str, given: dict[str, Any]) -> str:
    """STYLE.METRIC.KIND, as far as the style has a metric and a kind."""
    parameters = signature(STYLES[style]).parameters
    metric = given.get("metric", parameters["metric"].default if "metric" in parameters else None)
    if style in ("spectrum", "spectra"):
        metric = schema.SINGULAR_VALUE
    kind = given.get("kind", parameters["kind"].default)
    return ".".join(str(each) for each in (style, metric, kind) if each is not None)
