"""to_frame(): a result as one tidy table."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError
from dynamics.metrics.modules import metric_names
from dynamics.schema import Status

# Integers with a number that stands for "none", which a table leaves empty.
_NONE = {
    "layer": schema.NO_LAYER,
    "head": schema.NO_HEAD,
    "expert": schema.NO_EXPERT,
    schema.REFERENCE_STEP: schema.NO_STEP,
}
_DIMS = (schema.RUN, schema.KIND, schema.STEP, schema.MATRIX)
_LAST = (schema.NOISE_FLOOR, schema.STORAGE_NOISE_FLOOR, schema.SINGULAR_VALUE_ERROR)
# What results do not describe.
_DESCRIBED = {
    schema.STEP: {"long_name": "optimizer step", "units": "optimizer steps"},
    schema.KIND: {"long_name": "; ".join(f"{kind}: {what}" for kind, what in schema.KINDS.items())},
    "rows": {"long_name": "m of the (m, n) matrix"},
    "cols": {"long_name": "n of the (m, n) matrix"},
}
_FIRST_LOGGED = ("tokens", "loss")


def to_frame(dataset: xr.Dataset, *, spectra: bool = False) -> pd.DataFrame:
    """A result as a tidy table: one row for each matrix that was measured, at each step and kind.

    `dataset.to_dataframe()` is no such table: it has a row for every singular value, and also for
    every combination of dimensions that have nothing to do with each other.

    Args:
        dataset: what `analyze`, `compare`, `difference` or `over` returned.
        spectra: whether to add a column `singular_value`, with a float64 array in each row, or None
            where the result does not have it.

    Returns:
        The columns, as far as the result has them: run, the settings of runs, kind, step, what was
        logged (tokens, loss, ...), matrix, component, layer, module, stack, attention, head,
        expert, rows, cols, reference_step, each metric, noise_floor, singular_value_error. Texts
        are categories. layer, head, expert and reference_step are Int64, and missing where there is
        none. Numbers keep their bits. `attrs["columns"]` has long_name, units and reference of
        columns; `attrs["result"]` the attributes of the result: source, versions, ...

    Raises:
        DynamicsError: this is no result.
        MissingError: `spectra`, and the result has no singular values.

    Example:
        >>> frame = dy.to_frame(dy.analyze("run.zarr", kinds=["weight"], steps=[0, 8]))
        >>> frame.groupby(["module", "step"], observed=True)["stable_rank"].mean().shape
        (18,)
        >>> frame.attrs["columns"]["stable_rank"]["units"]
        '1'
    """
    metrics = metric_names(dataset) if isinstance(dataset, xr.Dataset) else []
    if not metrics:
        raise DynamicsError("to_frame() takes what analyze() or compare() returns.")
    if spectra and schema.SINGULAR_VALUE not in dataset:
        raise MissingError("This result has no singular values; leave spectra (--spectra) out.")
    has = dataset[metrics[0]].dims
    others = [dim for dim in has if dim not in _DIMS]  # of `over`: the statistic
    dims = [dim for dim in (_DIMS[0], *others, *_DIMS[1:]) if dim in has]
    rows = dict(zip(dims, np.nonzero(_measured(dataset, metrics, dims)), strict=True))
    columns = {str(name): _column(dataset[name], rows) for name in _ordered(dataset, metrics, dims)}
    if spectra:
        columns[schema.SINGULAR_VALUE] = _spectra(dataset[schema.SINGULAR_VALUE], rows)
    frame = pd.DataFrame(columns)
    frame.attrs = {
        "columns": {
            name: {str(key): _plain(each) for key, each in described.items()}
            for name in columns
            if (described := _DESCRIBED.get(name, {}) | dataset[name].attrs)
        },
        "result": {str(name): _plain(each) for name, each in dataset.attrs.items()},
    }
    return frame


def _measured(dataset: xr.Dataset, metrics: Sequence[str], dims: Sequence[Hashable]) -> np.ndarray:
    """Which cells get a row; a difference has no status."""
    if schema.STATUS in dataset:
        found = dataset[schema.STATUS] == Status.MEASURED
    else:
        found = xr.concat([dataset[name].notnull() for name in metrics], "metric").any("metric")
    missing = [dim for dim in dims if dim not in found.dims]
    return found.expand_dims({d: dataset.sizes[d] for d in missing}).transpose(*dims).values


def _ordered(
    dataset: xr.Dataset, metrics: Sequence[str], dims: Sequence[Hashable]
) -> list[Hashable]:
    """The variables that become columns, in the order of `to_frame`."""
    along = {
        name: set(each.dims)
        for name, each in dataset.variables.items()
        if each.dims and set(each.dims) <= set(dims)
    }
    settings = [n for n, d in along.items() if d == {schema.RUN} and n not in dims]
    of_matrix = [n for n, d in along.items() if schema.MATRIX in d <= {schema.RUN, schema.MATRIX}]
    of_matrix.sort(key=lambda n: _place(n, (schema.MATRIX, *schema.MATRIX_COORDS)))
    late = (schema.REFERENCE_STEP, *metrics, *_LAST)
    logged = [n for n in along if n not in (*dims, *settings, *of_matrix, *late, schema.STATUS)]
    logged.sort(key=lambda n: _place(n, _FIRST_LOGGED))
    # A dimension without a coordinate has no names to show.
    first = [schema.RUN, *settings, *(dim for dim in dims if dim not in _DIMS)]
    order = [*first, schema.KIND, schema.STEP, *logged, *of_matrix, *late]
    return [name for name in order if name in along]


def _place(name: Hashable, order: Sequence[str]) -> int:
    return order.index(str(name)) if name in order else len(order)


def _column(values: xr.DataArray, rows: Mapping[Hashable, np.ndarray]) -> Any:
    found = values.values
    indices = tuple(rows[dim] for dim in values.dims)
    if found.dtype.kind in "UOT":
        codes, names = pd.factorize(np.asarray(found, dtype=object).ravel())
        return pd.Categorical.from_codes(codes.reshape(found.shape)[indices], pd.Index(names))
    if values.name in _NONE:
        numbers = found[indices].astype(np.int64)
        return pd.arrays.IntegerArray(numbers, numbers == _NONE[str(values.name)])
    return found[indices]


def _spectra(values: xr.DataArray, rows: Mapping[Hashable, np.ndarray]) -> pd.Series:
    dims = [dim for dim in values.dims if dim != schema.INDEX]
    found = values.transpose(*dims, schema.INDEX).values
    spectra = found[tuple(rows[dim] for dim in dims)].astype(np.float64)
    kept = [each[~np.isnan(each)] for each in spectra]
    return pd.Series([each if each.size else None for each in kept], dtype=object)


def _plain(value: Any) -> Any:
    """What JSON can hold, so that attributes survive files."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if isinstance(value, str | bool | int | float | None) else str(value)
