"""The spectra of a report's charts: as many as there is room for, and what is left out of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.exports.report.numbers import listed
from dynamics.exports.report.runs import Group, modules_of

SPECTRA = 300_000  # singular values in a report, about 3 bytes each in the file
_MOST_INDICES = 192  # of a spectrum


def chart_spectra(
    comparison: xr.Dataset, groups: Sequence[Group], omitted: list[str]
) -> list[dict[str, Any]]:
    """One entry for each (run, kind, matrix): steps, floors and singular values.

    Args:
        comparison: a result with the dimension `run`.
        groups: its runs.
        omitted: gets a sentence for each thing that is not shown.
    """
    if schema.SINGULAR_VALUE not in comparison:
        omitted.append("Spectra: the result does not hold singular values.")
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
                "floors": listed(floors[r, k, m][steps].astype(np.float64)),
                "ranks": (values > floors[r, k, m][steps][:, None]).sum(-1).tolist(),
                "index": (index + 1).tolist(),
                "s": [listed(each[index], 4) for each in values],
            }
        )
    omitted += chosen.omitted
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
