"""Figures in files: which figure a style is, what its file is called, what it may not replace."""

from pathlib import Path

import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, OutputExistsError
from dynamics.plots.comparison import plot_comparison
from dynamics.plots.heatmap import plot_heatmap
from dynamics.plots.spectrum import plot_spectrum
from dynamics.plots.trajectory import plot_trajectory

# What only some styles take -> these styles.
_STYLES_OF = {
    "metric": ("trajectory", "heatmap", "comparison"),
    "by": ("trajectory",),
    "module": ("heatmap", "comparison"),
    "matrix": ("spectrum",),
}


def save_figure(
    dataset: xr.Dataset,
    output: Path | None = None,
    *,
    stem: str = "result",
    style: str | None = None,
    metric: str | None = None,
    kind: str = schema.WEIGHT,
    by: str | None = None,
    module: str | None = None,
    matrix: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Draw a result into a file; returns its path.

    Args:
        dataset: what `analyze` or `compare` returned.
        output: a PNG, PDF or SVG file; STEM.STYLE.METRIC.KIND.png by default.
        stem: how the names of files without `output` begin.
        style: "trajectory", "heatmap", "comparison" or "spectrum"; by default "comparison" for
            several runs, else "trajectory".
        metric: what is drawn, "effective_rank" by default; a spectrum draws singular values.
        kind: of which kind of matrix.
        by: what each line of a trajectory is a mean over, "module" by default.
        module: draw only this module; heat-maps and comparisons.
        matrix: the matrix of a spectrum.
        overwrite: whether the file may replace another one.

    Raises:
        OutputExistsError: the file exists.
        DynamicsError: a spectrum without `matrix`; something that this style does not take;
            the file cannot be written.
        MissingError: the result does not have what is to be drawn.
    """
    style = style or ("comparison" if schema.RUN in dataset.dims else "trajectory")
    given = {"metric": metric, "by": by, "module": module, "matrix": matrix}
    for name, value in given.items():
        if value is not None and style not in (takes := _STYLES_OF[name]):
            raise DynamicsError(
                f"--{name} has no effect on --style {style}; it is for {' and '.join(takes)}. "
                "Leave it out, or choose another --style."
            )
    metric = metric or "effective_rank"
    drawn = schema.SINGULAR_VALUE if style == "spectrum" else metric
    output = output or Path(f"{stem}.{style}.{drawn}.{kind}.png")
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output} exists; choose another output or add --overwrite.")
    if style == "trajectory":
        ax = plot_trajectory(dataset, metric, kind=kind, by=by or "module")
    elif style == "heatmap":
        ax = plot_heatmap(dataset, metric, kind=kind, module=module)
    elif style == "comparison":
        ax = plot_comparison(dataset, metric, kind=kind, module=module)
    elif matrix is None:
        raise DynamicsError("--style spectrum needs --matrix NAME; 'dynamics inspect' lists them.")
    else:
        ax = plot_spectrum(dataset, matrix, kind=kind)
    figure = ax.get_figure(root=True)
    assert figure is not None
    try:
        figure.savefig(output, dpi=150)
    except (ValueError, OSError) as error:
        raise DynamicsError(f"Cannot draw {output}: {error}.") from error
    return output
