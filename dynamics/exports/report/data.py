"""The numbers of a report's charts: a result in few enough digits for one file."""

import base64
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import t as student_t

from dynamics import schema
from dynamics.exports.report.numbers import DIGITS, listed
from dynamics.exports.report.runs import (
    by_run,
    groups_of,
    in_layers,
    modules_of,
    of_matrices,
)
from dynamics.exports.report.spectra import chart_spectra
from dynamics.metrics.modules import metric_names

# How many numbers of metrics a report holds, and from where on they have a digit less. Each takes
# about 4 bytes of the file, compressed.
CELLS, _MANY = 1_160_000, 800_000
_FEWEST_RECORDS = 40  # rather than fewer, matrices of one layer and module become one
_LOGARITHMIC = ("condition_number", "condition_number_raw")


@dataclass
class ChartData:
    """What the charts of a report are made of.

    Attributes:
        document: JSON-like values, as report.js reads them.
        omitted: a sentence for each thing that the result has and the report does not show.
    """

    document: dict[str, Any]
    omitted: list[str] = field(default_factory=list)

    def encoded(self) -> str:
        """The document as JSON, gzipped, in base64: no letter of it means anything to HTML."""
        text = json.dumps(self.document, separators=(",", ":"), ensure_ascii=False)
        packed = gzip.compress(text.encode(), compresslevel=6, mtime=0)
        return base64.b64encode(packed).decode("ascii")


def chart_data(comparison: xr.Dataset) -> ChartData:
    """The numbers of all charts.

    Args:
        comparison: a result with the dimension `run`, see `comparison_of`.
    """
    groups = groups_of(comparison)
    data = ChartData({})
    runs = [str(each) for each in comparison[schema.RUN].values]
    steps = comparison[schema.STEP].values
    kinds = [str(each) for each in comparison[schema.KIND].values]
    metrics = metric_names(comparison)
    # Many metrics are those of one kind, and NaN in all others, which takes next to nothing.
    per_step = sum(int(comparison[name].count()) for name in metrics) / steps.size
    rows = _rows(comparison, per_step, data)
    of_rows = per_step * len(rows) / comparison.sizes[schema.MATRIX]
    shown = _shown_steps(comparison, of_rows, data)
    digits = DIGITS if of_rows * shown.size <= _MANY else DIGITS - 1
    events = by_run(comparison, "events")
    seeds = {i: seed for g in groups for i, seed in zip(g.runs, g.seeds, strict=True)}
    data.document = {
        "runs": [
            {
                "name": name,
                "seed": None if seeds[i] is None else str(seeds[i]),
                "merges": [e["step"] for e in events[name] or () if e["kind"] == schema.MERGE],
            }
            for i, name in enumerate(runs)
        ],
        "groups": [{"name": each.name, "runs": list(each.runs)} for each in groups],
        "quantiles": [0, 0, *(round(float(student_t.ppf(0.975, n - 1)), 4) for n in range(2, 65))],
        "steps": steps[shown].tolist(),
        "tokens": _logged(comparison, "tokens", shown),
        "kinds": [{"name": kind, "meaning": schema.KINDS.get(kind, "")} for kind in kinds],
        "rows": [each.document for each in rows],
        "metrics": [_described(comparison, name) for name in metrics],
        "values": {name: _cells(comparison, name, rows, shown, digits) for name in metrics},
        "logged": {
            name: {"label": _label(comparison, name), "values": _logged(comparison, name, shown)}
            for name in _logged_names(comparison)
        },
        "spectra": chart_spectra(comparison, groups, data.omitted),
    }
    return data


@dataclass(frozen=True)
class Row:
    """A row of the charts: a matrix, or all matrices of a layer and module.

    Attributes:
        members: positions along `matrix`.
        document: its description, as report.js reads it.
    """

    members: tuple[int, ...]
    document: dict[str, Any]


def _rows(comparison: xr.Dataset, per_step: float, data: ChartData) -> list[Row]:
    names = [str(each) for each in comparison[schema.MATRIX].values]
    layers = of_matrices(comparison, "layer").tolist()
    stacks = list(map(str, of_matrices(comparison, "stack")))
    if len({stacks[i] for i, layer in enumerate(layers) if layer != schema.NO_LAYER}) < 2:
        stacks = [""] * len(stacks)  # there is one: it needs no name
    modules, inside = modules_of(comparison), in_layers(comparison)
    places: dict[Any, list[int]] = {}
    whole = per_step * min(_FEWEST_RECORDS, comparison.sizes[schema.STEP]) <= CELLS
    for position, name in enumerate(names):
        alone = whole or layers[position] == schema.NO_LAYER
        key = name if alone else (stacks[position], layers[position], modules[position])
        places.setdefault(key, []).append(position)
    if len(places) < len(names):
        data.omitted.append(
            f"Matrices of one layer and module are one row: {len(places):,} rows show the means of "
            f"{len(names):,} matrices."
        )
    rows, cols = (of_matrices(comparison, each) for each in ("rows", "cols"))
    return [
        Row(
            tuple(members),
            {
                "name": names[members[0]]
                if len(members) == 1
                else f"layer {layers[members[0]]} {modules[members[0]]} ({len(members)} matrices)",
                "layer": int(layers[members[0]]),
                "stack": stacks[members[0]],
                "module": modules[members[0]],
                "inside": bool(inside[members[0]]),
                "shape": f"{rows[members[0]]} × {cols[members[0]]}",
            },
        )
        for members in places.values()
    ]


def _shown_steps(comparison: xr.Dataset, per_step: float, data: ChartData) -> np.ndarray:
    """Positions of the steps whose numbers the report holds."""
    steps = comparison[schema.STEP].values
    room = max(2, int(CELLS / max(per_step, 1)))
    if steps.size <= room:
        return np.arange(steps.size)
    shown = np.unique(np.linspace(0, steps.size - 1, room).round().astype(int))
    data.omitted.append(
        f"Charts show {shown.size:,} of {steps.size:,} records, evenly spread; the sentences "
        "are of all."
    )
    return shown


def _cells(
    comparison: xr.Dataset, metric: str, rows: Sequence[Row], shown: np.ndarray, digits: int
) -> list[list[list[Any]]]:
    """[run][kind] -> numbers of all (step, row), step by step; [] where none was measured."""
    dims = (schema.RUN, schema.KIND, schema.STEP, schema.MATRIX)
    values = comparison[metric].transpose(*dims)
    return [
        [
            _of_rows(values[r, k].values[shown], rows, digits)
            for k in range(comparison.sizes[schema.KIND])
        ]
        for r in range(comparison.sizes[schema.RUN])
    ]


def _of_rows(values: np.ndarray, rows: Sequence[Row], digits: int) -> list[Any]:
    values = values.astype(np.float64)
    if np.isnan(values).all():
        return []
    if all(len(each.members) == 1 for each in rows):
        found = values[:, [each.members[0] for each in rows]]
    else:
        found = np.stack([_mean(values[:, list(each.members)]) for each in rows], axis=-1)
    return listed(found, digits)


def _mean(values: np.ndarray) -> np.ndarray:
    there = ~np.isnan(values)
    counts = there.sum(-1)
    sums = np.where(there, values, 0).sum(-1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _described(comparison: xr.Dataset, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": _label(comparison, name),
        "log": name in _LOGARITHMIC,
    }


def _label(comparison: xr.Dataset, name: str) -> str:
    return str(comparison[name].attrs.get("long_name", name.replace("_", " ")))


def _logged_names(comparison: xr.Dataset) -> Iterator[str]:
    """What was logged along steps, such as the loss, and holds numbers."""
    for name, each in comparison.data_vars.items():
        numeric = set(each.dims) == {schema.RUN, schema.STEP} and each.dtype.kind in "fiu"
        if numeric and name != "tokens" and np.isfinite(each.values.astype(np.float64)).any():
            yield str(name)


def _logged(comparison: xr.Dataset, name: str, shown: np.ndarray) -> list[Any] | None:
    if name not in comparison or set(comparison[name].dims) != {schema.RUN, schema.STEP}:
        return None
    values = comparison[name].transpose(schema.RUN, schema.STEP).values[:, shown]
    return [listed(each.astype(np.float64)) for each in values]
