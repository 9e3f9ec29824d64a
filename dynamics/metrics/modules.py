"""Metrics of the modules of a model: means over its layers, and what trackers call them."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError
from dynamics.runs.run import MatrixInfo

MODULE = "module"
_NO_METRICS = {
    schema.STATUS,
    schema.SINGULAR_VALUE_ERROR,
    schema.NOISE_FLOOR,
    schema.STORAGE_NOISE_FLOOR,
}


def tracker_key(kind: str, metric: str, module: str) -> str:
    """What a tracker calls a metric of a module: one panel or section for all modules of a metric.

    >>> tracker_key("weight", "effective_rank", "q_proj")
    'rank/weight/effective_rank/q_proj'
    """
    return f"rank/{kind}/{metric}/{module}"


def module_labels(
    modules: Sequence[str], stacks: Sequence[str], attentions: Sequence[str]
) -> list[str]:
    """The group of each matrix: its module, within its stack and attention where it has several.

    Encoder and decoder, self- and cross-attention are never averaged together.

    Args:
        modules: of each matrix.
        stacks: likewise, "" where there is one.
        attentions: likewise, "" outside of attention.

    >>> module_labels(["q_proj", "q_proj", "fc"], ["", "", ""], ["self", "self", ""])
    ['q_proj', 'q_proj', 'fc']
    >>> module_labels(["q", "q", "q"], ["encoder", "decoder", "decoder"], ["self", "self", "cross"])
    ['encoder.self.q', 'decoder.self.q', 'decoder.cross.q']
    """
    matrices = list(zip(modules, stacks, attentions, strict=True))
    in_stacks: dict[str, set[str]] = {}
    in_attentions: dict[str, set[str]] = {}
    for module, stack, attention in matrices:
        in_stacks.setdefault(module, set()).add(stack)
        in_attentions.setdefault(module, set()).add(attention)
    return [
        ".".join(
            part
            for part in (
                stack if len(in_stacks[module]) > 1 else "",
                attention if len(in_attentions[module]) > 1 else "",
                module,
            )
            if part
        )
        for module, stack, attention in matrices
    ]


def labels_of(matrices: Iterable[MatrixInfo]) -> list[str]:
    """The groups of matrices, see `module_labels`."""
    matrices = list(matrices)
    return module_labels(
        [each.module for each in matrices],
        [each.stack for each in matrices],
        [each.attention for each in matrices],
    )


def mean(values: Iterable[float]) -> float:
    """The mean of what was measured, rounded once: it does not depend on the order of the values.

    So a mean that was logged while a model trained has the bits of one that is computed of a saved
    result. NaN stands for a value that was not measured; the mean is NaN where none was.

    >>> mean([1e16, 1.0, -1e16, float("nan")]) == 1 / 3
    True
    """
    measured = [value for value in map(float, values) if value == value]
    if not measured:
        return math.nan
    try:
        return math.fsum(measured) / len(measured)
    except ValueError:  # both infinities
        return math.nan
    except OverflowError:  # of the sum, not of the mean
        return math.fsum(value / len(measured) for value in measured)


def metric_names(dataset: xr.Dataset) -> list[str]:
    """The metrics of a result, in its order: variables with a number of each matrix."""
    return [
        str(name)
        for name, each in dataset.data_vars.items()
        if {schema.KIND, schema.STEP, schema.MATRIX} <= set(each.dims)
        and schema.INDEX not in each.dims
        and name not in _NO_METRICS
    ]


def by_module(dataset: xr.Dataset) -> xr.Dataset:
    """The metrics of a result as means over the layers of each module.

    Args:
        dataset: what `analyze`, `compare` or `difference` returned.

    Returns:
        Its metrics with a dimension `module` in the place of `matrix`, float64, with their
        attributes. The mean is over matrices that were measured, see `mean`. A module that lies in
        several stacks (encoder, decoder) or attentions (self, cross) is one module for each.

    Raises:
        DynamicsError: `dataset` has no metrics of matrices, or it holds statistics over runs: a
            mean of bounds is no bound.

    Example:
        >>> from dynamics.metrics.modules import by_module
        >>> ranks = by_module(dy.analyze("run.zarr", kinds=["weight"]))
        >>> ranks["stable_rank"].dims
        ('kind', 'step', 'module')
        >>> ranks["stable_rank"].sel(kind="weight", step=8, module="q_proj").isnull().item()
        False
    """
    names = metric_names(dataset)
    if not names:
        raise DynamicsError("This takes what analyze() or compare() returns: it has no metrics.")
    known = {schema.RUN, schema.KIND, schema.STEP, schema.MATRIX}
    if others := set(dataset[names[0]].dims) - known:
        raise DynamicsError(
            f"This result has the dimension {min(map(str, others))!r}; average over the layers of "
            "modules before averaging over runs."
        )
    columns = (_of_matrices(dataset, name) for name in (MODULE, "stack", "attention"))
    groups: dict[str, list[int]] = {}
    for position, label in enumerate(module_labels(*columns)):
        groups.setdefault(label, []).append(position)
    variables = {}
    for name in names:
        values = dataset[name].transpose(..., schema.MATRIX)
        cells = values.values.astype(np.float64, copy=False)
        rows = cells.reshape(-1, cells.shape[-1])
        means = np.array([[mean(row[m]) for m in groups.values()] for row in rows])
        shape = (*cells.shape[:-1], len(groups))
        variables[name] = ((*values.dims[:-1], MODULE), means.reshape(shape), values.attrs)
    coords = {
        name: coord
        for name, coord in dataset.coords.items()
        if schema.MATRIX not in coord.dims and set(coord.dims) <= set(dataset[names[0]].dims)
    }
    return xr.Dataset(variables, {**coords, MODULE: list(groups)}, dataset.attrs)


def _of_matrices(dataset: xr.Dataset, name: str) -> list[str]:
    """A coordinate of the matrices as texts, "" where the result was made by hand without it."""
    if name not in dataset.coords:
        return [""] * dataset.sizes[schema.MATRIX]
    texts = (
        dataset[name].transpose(..., schema.MATRIX).values.reshape(-1, len(dataset[schema.MATRIX]))
    )
    # Runs of which one was saved before there was this coordinate: it has "" there.
    return [next((str(each) for each in column if each), "") for column in texts.T.tolist()]
