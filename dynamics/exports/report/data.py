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
from dynamics.exports.report.runs import (
    Group,
    by_run,
    groups_of,
    in_layers,
    modules_of,
    of_matrices,
)
from dynamics.metrics.modules import metric_names

# How many numbers a report holds: about 3 bytes each in the file, compressed.
CELLS = 800_000
SPECTRA = 300_000
_DIGITS = 6  # of metrics, which are subtracted from each other; singular values have four
_FEWEST_RECORDS = 40  # rather than fewer, matrices of one layer and module become one
_MOST_INDICES = 192  # of a spectrum
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
    rows = _rows(comparison, len(runs) * len(kinds) * len(metrics), data)
    shown = _shown_steps(comparison, len(runs) * len(kinds) * len(metrics) * len(rows), data)
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
        "values": {name: _cells(comparison, name, rows, shown) for name in metrics},
        "logged": {
            name: {"label": _label(comparison, name), "values": _logged(comparison, name, shown)}
            for name in _logged_names(comparison)
        },
        "spectra": _spectra(comparison, groups, data),
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


def _rows(comparison: xr.Dataset, cells: int, data: ChartData) -> list[Row]:
    names = [str(each) for each in comparison[schema.MATRIX].values]
    layers = of_matrices(comparison, "layer").tolist()
    stacks = list(map(str, of_matrices(comparison, "stack")))
    if len({stacks[i] for i, layer in enumerate(layers) if layer != schema.NO_LAYER}) < 2:
        stacks = [""] * len(stacks)  # there is one: it needs no name
    modules, inside = modules_of(comparison), in_layers(comparison)
    places: dict[Any, list[int]] = {}
    whole = len(names) * cells * min(_FEWEST_RECORDS, comparison.sizes[schema.STEP]) <= CELLS
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


def _shown_steps(comparison: xr.Dataset, per_step: int, data: ChartData) -> np.ndarray:
    """Positions of the steps whose numbers the report holds."""
    steps = comparison[schema.STEP].values
    room = max(2, CELLS // max(per_step, 1))
    if steps.size <= room:
        return np.arange(steps.size)
    shown = np.unique(np.linspace(0, steps.size - 1, room).round().astype(int))
    data.omitted.append(
        f"Charts show {shown.size:,} of {steps.size:,} records, evenly spread; the sentences "
        "are of all."
    )
    return shown


def _cells(
    comparison: xr.Dataset, metric: str, rows: Sequence[Row], shown: np.ndarray
) -> list[list[list[Any]]]:
    """[run][kind] -> numbers of all (step, row), step by step; [] where none was measured."""
    dims = (schema.RUN, schema.KIND, schema.STEP, schema.MATRIX)
    values = comparison[metric].transpose(*dims)
    return [
        [_of_rows(values[r, k].values[shown], rows) for k in range(comparison.sizes[schema.KIND])]
        for r in range(comparison.sizes[schema.RUN])
    ]


def _of_rows(values: np.ndarray, rows: Sequence[Row]) -> list[Any]:
    values = values.astype(np.float64)
    if np.isnan(values).all():
        return []
    if all(len(each.members) == 1 for each in rows):
        found = values[:, [each.members[0] for each in rows]]
    else:
        found = np.stack([_mean(values[:, list(each.members)]) for each in rows], axis=-1)
    return _listed(found)


def _mean(values: np.ndarray) -> np.ndarray:
    there = ~np.isnan(values)
    counts = there.sum(-1)
    sums = np.where(there, values, 0).sum(-1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _listed(values: np.ndarray, digits: int = _DIGITS) -> list[Any]:
    """Numbers of so many digits; None for NaN; a text for what JSON does not have."""
    flat = _rounded(values.ravel(), digits)
    whole = flat == np.round(flat)
    found: list[Any] = flat.tolist()
    for position in np.flatnonzero(whole & (np.abs(flat) < 1e15)).tolist():
        found[position] = int(found[position])  # "64", not "64.0"
    for position in np.flatnonzero(~np.isfinite(flat)).tolist():
        value = found[position]
        found[position] = None if value != value else "inf" if value > 0 else "-inf"
    return found


def _rounded(values: np.ndarray, digits: int) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exponents = np.floor(np.log10(np.abs(values)))
        exponents = np.where(np.isfinite(exponents), exponents, 0)
        places = digits - 1 - exponents
        # By a power of ten that is exact, so that the result prints in few letters.
        small = 10.0 ** np.abs(places)
        scaled = np.where(places >= 0, np.round(values * small) / small, 0)
        large = np.round(values / small) * small
        found = np.where(places >= 0, scaled, np.where(np.abs(values) < 1e15, values, large))
    return np.where(np.isfinite(found), found, values)


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
    return [_listed(each.astype(np.float64)) for each in values]


def _spectra(
    comparison: xr.Dataset, groups: Sequence[Group], data: ChartData
) -> list[dict[str, Any]]:
    """One entry for each (run, kind, matrix): steps, floors and singular values."""
    if schema.SINGULAR_VALUE not in comparison:
        data.omitted.append("Spectra: the result does not hold singular values.")
        return []
    dims = (schema.RUN, schema.KIND, schema.MATRIX, schema.STEP)
    singular = comparison[schema.SINGULAR_VALUE].transpose(*dims, schema.INDEX)
    floors = (
        comparison[schema.NOISE_FLOOR].transpose(*dims).values
        if schema.NOISE_FLOOR in comparison
        else np.full(singular.shape[:-1], np.nan)
    )
    there = ~np.isnan(singular.isel({schema.INDEX: 0}).values)
    chosen = _Chosen(comparison, there, _with_spectra(there, groups))
    entries = []
    for r, k, m in chosen.cells:
        steps = chosen.steps_of(r, k, m)
        values = singular[r, k, m].values[steps].astype(np.float64)
        width = int((~np.isnan(values)).any(0).sum())
        index = np.unique(np.linspace(0, width - 1, min(width, _MOST_INDICES)).round().astype(int))
        entries.append(
            {
                "run": r,
                "kind": k,
                "matrix": str(comparison[schema.MATRIX].values[m]),
                "steps": comparison[schema.STEP].values[steps].tolist(),
                "floors": _listed(floors[r, k, m][steps].astype(np.float64)),
                "ranks": (values > floors[r, k, m][steps][:, None]).sum(-1).tolist(),
                "index": (index + 1).tolist(),
                "s": [_listed(each[index], 4) for each in values],
            }
        )
    data.omitted += chosen.omitted
    return entries


def _with_spectra(there: np.ndarray, groups: Sequence[Group]) -> list[int]:
    """The first run of each group that has spectra."""
    has = np.asarray(there.any((1, 2, 3)))
    return [next((run for run in each.runs if has[run]), each.runs[0]) for each in groups]


class _Chosen:
    """Which of the spectra of a result a report holds: as many as there is room for.

    They are of one run of each group. Room is made in this order: weights and displacements; one
    matrix of each module; fewer steps.
    """

    def __init__(self, comparison: xr.Dataset, there: np.ndarray, firsts: Sequence[int]):
        self.omitted: list[str] = []
        self._there = there
        width = min(comparison.sizes[schema.INDEX], _MOST_INDICES)
        everything = np.argwhere(there.any(-1))
        kinds = [str(each) for each in comparison[schema.KIND].values]
        wanted = [kinds.index(each) for each in _PREFERRED if each in kinds] or [0]
        typical = _typical(comparison)
        cells = everything[np.isin(everything[:, 0], firsts)]
        if len(cells) < len(everything):
            self.omitted.append("Spectra are shown of one run of each group.")
        for keep, said in (
            (lambda c: np.isin(c[:, 1], wanted), "of weights and displacements"),
            (lambda c: np.isin(c[:, 2], typical), "of one matrix of each module"),
        ):
            at_most = np.minimum(there.sum(-1)[tuple(cells.T)], 24).sum() * width
            if at_most <= SPECTRA:
                break
            kept = cells[keep(cells)]
            if 0 < len(kept) < len(cells):
                cells = kept
                self.omitted.append(f"Spectra are shown {said}.")
        self.cells: list[tuple[int, int, int]] = [tuple(each) for each in cells.tolist()]
        self._most = max(2, SPECTRA // max(1, len(cells) * width))
        if any(there[cell].sum() > self._most for cell in self.cells):
            self.omitted.append(f"Spectra are shown at {self._most} steps each, evenly spread.")

    def steps_of(self, r: int, k: int, m: int) -> np.ndarray:
        """Positions of the steps at which the spectra of a cell are shown."""
        measured = np.flatnonzero(self._there[r, k, m])
        picked = np.linspace(0, measured.size - 1, min(measured.size, self._most))
        return measured[np.unique(picked.round().astype(int))]


_PREFERRED = (schema.DISPLACEMENT, schema.WEIGHT)


def _typical(comparison: xr.Dataset) -> list[int]:
    """One matrix of each module: the one in the middle of its layers."""
    places: dict[str, list[int]] = {}
    for position, module in enumerate(modules_of(comparison)):
        places.setdefault(module, []).append(position)
    return [each[len(each) // 2] for each in places.values()]
