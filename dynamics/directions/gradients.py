"""Where gradients point over time: whether a few directions hold them, and for how long."""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.components.rank_bounds import projectors
from dynamics.directions.pairwise import (
    Subspaces,
    all_subspaces,
    count_above,
    leading_subspaces,
    subspace_overlap,
)
from dynamics.directions.subspaces import dataset_of_cells, measurable, selected_matrices
from dynamics.errors import MissingError
from dynamics.formats import open_run
from dynamics.runs.differences import Difference, is_finite
from dynamics.runs.run import Dense, Factored, Matrix, Run
from dynamics.spectra.spectrum import noise_of

_LONG_NAMES = {
    "energy": "share of the gradient within its own leading directions",
    "energy_in_last": "share of the gradient within the leading directions of the record before",
    "energy_in_first": "share of the gradient within the leading directions of the first record",
    "energy_in_projector": "share of the gradient within the projector that was in use",
    "overlap_with_last": "overlap of the leading directions with those of the record before",
    "overlap_with_first": "overlap of the leading directions with those of the first record",
    "chance": "overlap, and share of a flat gradient, of random directions",
    "rounding": "bound on the sine of the angle that rounding turns the leading directions by",
    "subspace_dimension": "leading directions above the noise floor",
}


def gradient_subspaces(
    run: Run | str | Path, *, k: int = 8, select: str | Sequence[str] | None = None
) -> xr.Dataset:
    """How much of each gradient its k leading directions hold, and how fast these directions turn.

    They are singular vectors on the short side, as GaLore's projector takes them (Zhao et al. 2024,
    arXiv 2403.03507): the right ones of a gradient (m, n) with m >= n, else the left ones. A method
    that keeps its projector for a while trains within directions of the past: `energy_in_last` says
    what it would still see, `energy` what fresh directions would.

    Args:
        run: a run, or its path. Of frozen weights, the probed gradients are taken.
        k: directions; fewer where fewer are above the noise floor.
        select: globs over parameter names ("*_proj" matches with or without ".weight").

    Returns:
        A Dataset with dims (kind, step, matrix), kind "gradient" alone, NaN where there is no
        gradient, it is zero, or there is no record before:

        - `energy`: Σ of the k largest σ² over Σ σ².
        - `energy_in_last`, `energy_in_first`: ‖G Q‖²/‖G‖² with the directions Q (n, k) of the
          record before, and of the first gradient.
        - `energy_in_projector`: the same with the projector that GaLore used at this step; the rest
          of the gradient was dropped. It needs events `projection` of a method that is bounded by
          its projector, and two records while it was in use: the update between them spans it. NaN
          where the update's numerical rank is not that of the projector.
        - `overlap_with_last`, `overlap_with_first`: ‖QᵀQ'‖_F²/k, the mean cos² of the principal
          angles.
        - `chance`: k/n, what random directions would have of both.
        - `rounding`: the noise floor over the gap σ_k − σ_(k+1), at most 1. It bounds the sine of
          the largest angle by which rounding can have turned the directions (Wedin 1972). Near 1,
          the last of the directions are arbitrary.
        - `subspace_dimension`: how many directions were taken.

    Raises:
        MissingError: the run has no gradients or holds only spectra, or `select` matches nothing.
        FormatError: `run` cannot be opened, or one of its files is damaged.

    Example:
        >>> found = dy.gradient_subspaces("run.zarr", k=2, select="*q_proj")
        >>> bool((found["energy_in_last"] <= found["energy"] + 1e-12).sel(step=8).all())
        True
    """
    run = run if isinstance(run, Run) else open_run(run)
    if schema.GRADIENT not in {*run.stored_kinds, *run.spectrum_kinds}:
        raise MissingError(f"{run.path} has no gradients; it has {', '.join(run.kinds)}.")
    matrices = selected_matrices(run, select)
    cells: dict[tuple[int, int, int], dict[str, float]] = {}
    for m, (info, read) in enumerate(matrices):
        in_use = _Projectors(run, info.name)
        first: np.ndarray | None = None
        last: np.ndarray | None = None
        for t, step in enumerate(run.steps.tolist()):
            gradient = measurable(read, step, schema.GRADIENT)
            if gradient is None:
                last = None
                continue
            assert not isinstance(gradient, Factored)
            every, noise = all_subspaces(gradient), noise_of(gradient)
            taken = min(k, count_above(every.s, gradient, noise))
            if taken == 0:
                last = None
                continue
            here = _short_side(every.leading(taken))
            cell = _alone(every.s, taken, noise)
            projector = in_use.at(step)
            if projector is not None:
                cell["energy_in_projector"] = _energy(gradient, projector)
            if last is not None:
                cell["energy_in_last"] = _energy(gradient, last)
                cell["overlap_with_last"] = subspace_overlap(here, last)
            if first is not None:
                cell["energy_in_first"] = _energy(gradient, first)
                cell["overlap_with_first"] = subspace_overlap(here, first)
            cells[0, t, m] = cell
            first, last = (here if first is None else first), here
    infos = [info for info, _ in matrices]
    return dataset_of_cells(cells, _LONG_NAMES, [schema.GRADIENT], run.steps, infos, k)


def _short_side(leading: Subspaces) -> np.ndarray:
    return leading.right if len(leading.right) <= len(leading.left) else leading.left


def _alone(s: np.ndarray, taken: int, noise: float) -> dict[str, float]:
    gap = float(s[taken - 1] - s[taken]) if taken < s.size else float(s[-1])
    return {
        "energy": float(np.sum(s[:taken] ** 2) / np.sum(s**2)),
        "chance": taken / s.size,
        "rounding": min(1.0, noise / gap) if gap > 0 else 1.0,
        "subspace_dimension": taken,
    }


class _Projectors:
    """The projectors of a weight, each found from what it did to the weight.

    While one is in use, the weight moves within its r directions alone. So the update between the
    first and the last record of that time has rank r, and its singular vectors span them.
    """

    def __init__(self, run: Run, name: str):
        self._run, self._name = run, name
        self._ranks = projectors(run, name)
        self._changes = sorted(self._ranks)
        self._found: dict[int, np.ndarray | None] = {}

    def at(self, step: int) -> np.ndarray | None:
        """(short side, r) orthonormal: what the optimizer step `step` used, None if not known."""
        position = bisect_left(self._changes, step) - 1
        if position < 0:
            return None
        if position not in self._found:
            self._found[position] = self._directions(position)
        return self._found[position]

    def _directions(self, position: int) -> np.ndarray | None:
        since, *later = self._changes[position : position + 2]
        steps = self._run.steps
        steps = steps[(steps >= since) & (steps <= later[0] if later else True)]
        if len(steps) < 2:
            return None
        first, last = int(steps[0]), int(steps[-1])
        before, now = (self._run.read(self._name, each, schema.WEIGHT) for each in (first, last))
        if not isinstance(before, Dense) or not isinstance(now, Dense):
            return None
        update = Difference(now, before, trained_steps=last - first)
        if not is_finite(update):
            return None
        rank = min(self._ranks[since], *update.shape)
        leading = leading_subspaces(update, rank + 1)
        return _short_side(leading) if leading.s.size == rank else None


def _energy(gradient: Matrix | Difference, directions: np.ndarray) -> float:
    assert not isinstance(gradient, Factored)
    values = gradient.values.astype(np.float64)
    inside = values @ directions if len(directions) == values.shape[1] else directions.T @ values
    return float(np.sum(inside**2) / np.sum(values**2))
