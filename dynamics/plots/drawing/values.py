"""What a figure shows of a result: one metric of one kind, whose matrices, their mean and range."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.analysis.statistics import STATISTIC
from dynamics.errors import DynamicsError, MissingError, near
from dynamics.metrics.modules import module_labels
from dynamics.plots.drawing.style import whole_figure
from dynamics.runs.run import abridged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOGARITHMIC = {"condition_number", "condition_number_raw"}
RANKS = ("effective_rank", "effective_rank_above_floor", "numerical_rank", "numerical_rank_raw")
BASELINE = "baseline"  # an attribute that `difference` sets


def metric_values(dataset: xr.Dataset, metric: str, kind: str) -> xr.DataArray:
    """One metric of one kind, (..., step, matrix) float64; matrices without any value are left out.

    Raises:
        DynamicsError: `dataset` holds statistics over runs.
        MissingError: the metric or kind is unknown, or there is no finite number to draw.
    """
    metrics = [str(name) for name, each in dataset.items() if _is_metric(each)]
    if STATISTIC in dataset.dims:
        raise DynamicsError(
            "A figure averages over matrices before it averages over runs; give it the comparison "
            "itself, and over='seed' (--over seed)."
        )
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
    if BASELINE in dataset.attrs:  # the dataset comes from `difference`
        values = values.assign_attrs({BASELINE: dataset.attrs[BASELINE]})
    return values.astype(np.float64, keep_attrs=True)


def inside_layers(values: xr.DataArray, kind: str, module: str | None = None) -> xr.DataArray:
    """The matrices that belong to a layer; of them, those of a module.

    Raises:
        MissingError: no matrix belongs to a layer, or none of this module does.
    """
    values = values.sel({schema.MATRIX: of_matrices(values, "layer") != schema.NO_LAYER})
    if values.size == 0:
        raise MissingError(
            f"No {kind} inside the stack of layers was measured; plot_trajectory with by='matrix' "
            "(--style trajectory --by matrix) draws all matrices."
        )
    return of_module(values, module, kind)


def of_module(values: xr.DataArray, module: str | None, kind: str) -> xr.DataArray:
    """The matrices of a module; without one, those inside the layers, or all if none is inside.

    Raises:
        MissingError: there is no such module.
    """
    if module is None:
        inside = _inside(values)
        return inside if inside.size else values
    modules = of_matrices(values, "module")
    if module not in modules:
        known = sorted(set(modules.tolist()))
        raise MissingError(
            f"No {kind} of a module {module!r}{near(module, known)} was measured; there are "
            f"{', '.join(known)}."
        )
    return values.sel({schema.MATRIX: modules == module})


def _inside(values: xr.DataArray) -> xr.DataArray:
    """The matrices inside the layers: parameters, if there are any; their products stay apart."""
    inside = of_matrices(values, "layer") != schema.NO_LAYER
    parameters = inside & (of_matrices(values, "component") == "parameters")
    return values.sel({schema.MATRIX: parameters if parameters.any() else inside})


def of_matrices(values: xr.Dataset | xr.DataArray, name: str) -> np.ndarray:
    """A coordinate of the matrices. Of runs in which it differs: the first run's; "" if unknown."""
    if name not in values.coords:
        return np.full(values.sizes[schema.MATRIX], "")
    found = values[name]
    return (found.isel({schema.RUN: 0}) if schema.RUN in found.dims else found).values


def groups_of(values: xr.DataArray, by: str) -> dict[str, np.ndarray]:
    """Name of a group -> which matrices belong to it. Stacks and attentions stay apart.

    Args:
        values: (..., matrix).
        by: "module", "layer", "expert" or "matrix". Layers and experts are in their order.
    """
    if by == "module":
        columns = (of_matrices(values, name).tolist() for name in ("module", "stack", "attention"))
        labels = np.array(module_labels(*columns))
        return {name: labels == name for name in dict.fromkeys(labels.tolist())}
    if by == schema.MATRIX:
        names = values[schema.MATRIX].values
        return {str(name): names == name for name in names}
    numbers, stacks = of_matrices(values, by), of_matrices(values, "stack")
    several = len(set(stacks.tolist())) > 1
    return {
        f"{f'{stack} ' if several and stack else ''}{by} {number}": (numbers == number)
        & (stacks == stack)
        for stack, number in sorted(set(zip(stacks.tolist(), numbers.tolist(), strict=True)))
    }


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


def refuse_difference(dataset: xr.Dataset) -> None:
    """Refuse a result of `difference`, where the figure shows what single runs have.

    Raises:
        DynamicsError: it is one.
    """
    if BASELINE in dataset.attrs:
        raise DynamicsError(
            f"This result is less {dataset.attrs[BASELINE]!r}, and this figure shows what runs "
            "have; give it the comparison, or use plot_difference (--style difference)."
        )


@dataclass(frozen=True)
class Mean:
    """The mean over matrices along steps, and the range of the layers.

    Attributes:
        steps: (n,) those at which anything was measured.
        mean: (n,) float64.
        low, high: (n,) the lowest and the highest mean of a layer. Matrices outside of the layers
            are as many layers here.
        count: the number of matrices.
        layers: the number of layers.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    count: int
    layers: int

    @property
    def band(self) -> "tuple[np.ndarray, np.ndarray] | tuple[None, None]":
        """The range, None where it is that of a single layer."""
        return (self.low, self.high) if self.layers > 1 else (None, None)


def mean_over_matrices(values: xr.DataArray, *, of_layers: bool = True) -> Mean:
    """The mean of (step, matrix), the geometric one for condition numbers, and a range.

    Args:
        values: of some matrices.
        of_layers: whether the range is that of the means of layers, or that of the matrices. The
            modules of a layer have different shapes, and therefore different ranks.
    """
    values = values.dropna(schema.STEP, how="all").dropna(schema.MATRIX, how="all")
    table = values.transpose(schema.STEP, schema.MATRIX).values
    layers = [
        f"{stack}{layer if layer != schema.NO_LAYER and of_layers else f'/{number}'}"
        for number, (stack, layer) in enumerate(
            zip(of_matrices(values, "stack"), of_matrices(values, "layer"), strict=True)
        )
    ]
    middle = _geometric if is_logarithmic(values) else _arithmetic
    each = np.stack([middle(table[:, np.array(layers) == name]) for name in dict.fromkeys(layers)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step of which a layer has nothing
        low, high = np.nanmin(each, axis=0), np.nanmax(each, axis=0)
    steps = values[schema.STEP].values
    return Mean(steps, middle(table), low, high, table.shape[1], len(each))


def _arithmetic(table: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(table, axis=1)


def _geometric(table: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.exp(_arithmetic(np.log(table)))


def is_logarithmic(values: xr.DataArray) -> bool:
    """Whether to use a logarithmic scale; never for differences, which may be negative."""
    return values.name in _LOGARITHMIC and BASELINE not in values.attrs


def name_of(values: xr.DataArray) -> str:
    """The metric's long name."""
    return str(values.attrs.get("long_name", values.name))


def label(values: xr.DataArray, kind: str) -> str:
    """The metric's long name and the kind: "effective rank, weight".

    For a difference, the baseline follows: "effective rank, weight, less full".
    """
    text = f"{name_of(values)}, {kind}"
    return f"{text}, less {values.attrs[BASELINE]}" if BASELINE in values.attrs else text


def phrase(values: xr.DataArray, kind: str) -> str:
    """What is shown, for captions: "effective rank of the cycle update"."""
    text = f"{name_of(values)} of the {kind.replace('_', ' ')}"
    return f"{text}, less that of {values.attrs[BASELINE]}" if BASELINE in values.attrs else text


def of_a_matrix(values: xr.DataArray, matrix: str, kind: str) -> xr.DataArray:
    """The values of a matrix at the steps where it was measured.

    Raises:
        MissingError: it was not measured.
    """
    if matrix not in values[schema.MATRIX]:
        known = values[schema.MATRIX].values.tolist()
        raise MissingError(
            f"No measured {kind} of {matrix!r}{near(matrix, known)}; there are "
            f"{abridged(known, 4)}."
        )
    return values.sel({schema.MATRIX: matrix}).dropna(schema.STEP)


def axes_or_new(ax: "Axes | None") -> "Axes":
    """`ax`, or the axes of a new figure. What stands beside them has to be on the canvas.

    A figure without a layout gets matplotlib's constrained one, which makes room for it.
    """
    if ax is None:
        import matplotlib.pyplot as plt

        return plt.subplots(layout="constrained")[1]
    figure = whole_figure(ax)
    if figure.get_layout_engine() is None and ax.get_subplotspec() is not None:
        figure.set_layout_engine("constrained")
    return ax


def _is_metric(values: xr.DataArray) -> bool:
    per_matrix = {schema.KIND, schema.STEP, schema.MATRIX} <= set(values.dims)
    return per_matrix and schema.INDEX not in values.dims and values.name != schema.STATUS
