"""What the figures share: values of one metric, axes, labels, marks of merges and bounds."""

import json
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError, near

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOGARITHMIC = {"condition_number", "condition_number_raw"}


def metric_values(dataset: xr.Dataset, metric: str, kind: str) -> xr.DataArray:
    """One metric of one kind, (..., step, matrix); matrices without any value are left out.

    Raises:
        MissingError: the metric or kind is unknown, or there is no finite number to draw.
    """
    metrics = [str(name) for name, each in dataset.items() if _is_metric(each)]
    if metric not in metrics:
        raise MissingError(
            f"No metric {metric!r}{near(metric, metrics)} in this analysis; it has "
            f"{', '.join(metrics)}."
        )
    if kind not in dataset[schema.KIND]:
        known = dataset[schema.KIND].values.tolist()
        raise MissingError(
            f"No kind {kind!r}{near(kind, known)} in this analysis; it has {', '.join(known)}."
        )
    values = dataset[metric].sel({schema.KIND: kind}).dropna(schema.MATRIX, how="all")
    if values.size == 0:
        raise MissingError(
            f"No {kind} was measured in this analysis; its variable 'status' says why."
        )
    if not np.isfinite(values).any():
        raise MissingError(
            f"{metric} of {kind} is infinite everywhere, so there is nothing to draw; choose "
            "another metric."
        )
    if "baseline" in dataset.attrs:  # the dataset comes from `difference`
        values = values.assign_attrs(baseline=dataset.attrs["baseline"])
    return values


def inside_layers(values: xr.DataArray, kind: str) -> xr.DataArray:
    """The matrices that belong to a layer.

    Raises:
        MissingError: no matrix belongs to a layer.
    """
    values = values.sel({schema.MATRIX: values["layer"] != schema.NO_LAYER})
    if values.size == 0:
        raise MissingError(
            f"No {kind} inside the stack of layers was measured; plot_trajectory with by='matrix' "
            "(--style trajectory --by matrix) draws all matrices."
        )
    return values


def require_one_run(dataset: xr.Dataset) -> xr.Dataset:
    """The dataset itself.

    Raises:
        DynamicsError: it compares several runs.
    """
    if schema.RUN in dataset.dims:
        labels = ", ".join(dataset[schema.RUN].values.tolist())
        raise DynamicsError(
            f"This figure shows one run; choose one of {labels} with .sel(run=...) (--run)."
        )
    return dataset


def axes_or_new(ax: "Axes | None") -> "Axes":
    """`ax`, or the axes of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7, 4.2), layout="constrained")[1]


def label(values: xr.DataArray, kind: str) -> str:
    """The metric's long name and the kind: "effective rank, weight".

    For a difference, the baseline follows: "effective rank, weight, less full".
    """
    text = f"{values.attrs.get('long_name', values.name)}, {kind}"
    return f"{text}, less {values.attrs['baseline']}" if "baseline" in values.attrs else text


def is_logarithmic(values: xr.DataArray) -> bool:
    """Whether to use a logarithmic scale; never for differences, which may be negative."""
    return values.name in _LOGARITHMIC and "baseline" not in values.attrs


def style_axes(ax: "Axes", values: xr.DataArray, kind: str) -> None:
    """Set axis labels, a logarithmic scale where `is_logarithmic`, a light grid and frame."""
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(label(values, kind))
    if is_logarithmic(values):
        ax.set_yscale("log")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)


def mark_merges(ax: "Axes", dataset: xr.Dataset) -> None:
    """Draw a thin dotted line at every merge of the run, or of any run of a comparison."""
    events = json.loads(dataset.attrs.get("events", "[]"))
    if isinstance(events, dict):  # a comparison: run -> its events
        events = [event for of_run in events.values() for event in of_run]
    for step in sorted({each["step"] for each in events if each["kind"] == schema.MERGE}):
        ax.axvline(step, color="0.6", linewidth=0.8, linestyle=":", zorder=0)


def draw_bound(ax: "Axes", dataset: xr.Dataset, values: xr.DataArray, kind: str) -> None:
    """Draw the rank bound as a dashed line, if a rank is shown and all its matrices share it."""
    if values.name not in ("effective_rank", "numerical_rank") or "rank_bound" not in dataset:
        return
    if "baseline" in values.attrs:
        return
    bounds = metric_values(dataset, "rank_bound", kind).sel({schema.MATRIX: values[schema.MATRIX]})
    if float(bounds.min()) == float(bounds.max()):
        ax.axhline(float(bounds.max()), color="0.35", linewidth=1, linestyle="--", zorder=0)
        ax.annotate(
            "rank bound",
            (1, float(bounds.max())),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            fontsize="small",
            color="0.35",
        )


def _is_metric(values: xr.DataArray) -> bool:
    per_matrix = {schema.KIND, schema.STEP, schema.MATRIX} <= set(values.dims)
    return per_matrix and schema.INDEX not in values.dims and values.name != schema.STATUS
