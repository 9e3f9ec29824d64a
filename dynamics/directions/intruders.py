"""Intruder dimensions: directions of a trained weight that the weight before did not have."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.components.rank_bounds import difference_rank_bound
from dynamics.directions.subspaces import dataset_of_cells, measurable, selected_matrices
from dynamics.errors import MissingError, RandomReferenceWarning
from dynamics.formats import open_run
from dynamics.runs.differences import Difference
from dynamics.runs.run import Factored, Matrix, Run

_DRAWS = 4
_LONG_NAMES = {
    "intruders": "leading directions that none of the weight before is near to",
    "intruders_of_noise": "the same for a random change of equal norm and rank",
    "closest": "mean over the leading directions of the largest cosine with one before",
}


def intruders(
    run: Run | str | Path,
    *,
    since: int | None = None,
    k: int = 10,
    epsilon: float = 0.5,
    select: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """How many of a weight's k leading directions are far from all directions that it had before.

    A left singular vector y_j of the weight, j <= k, is an intruder if max_i |cos(y_j, x_i)| <
    epsilon over all left singular vectors x_i of the weight before (Shuttleworth et al. 2024, arXiv
    2410.21228; PEFT counts the same way). Fine-tuning by LoRA makes more of them than full
    fine-tuning does. Any large change makes some: compare with `intruders_of_noise`.

    The weight before must have learned something. A random start has no directions worth keeping,
    and nearly every direction of a trained weight is an intruder to it.

    Args:
        run: a run, or its path.
        since: the step of the weight before; by default the first record, with a warning.
        k: directions of each later weight.
        epsilon: the cosine below which a direction is far from another one.
        select: globs over parameter names ("*_proj" matches with or without ".weight").

    Returns:
        A Dataset with dims (kind, step, matrix), kind "weight" alone, NaN at `since` and before it:

        - `intruders`: the count, 0 to k.
        - `intruders_of_noise`: the mean count over 4 seeded random changes of the weight before.
          Each is Gaussian with the Frobenius norm of the true change; where adapters made the
          change, it is a product of Gaussian factors with the largest rank that they allow.
        - `closest`: the mean over the k directions of max_i |cos(y_j, x_i)|.

    Raises:
        MissingError: the run has no weights or holds only spectra, has no step `since`, or `select`
            matches nothing.
        FormatError: `run` cannot be opened, or one of its files is damaged.

    Example:
        >>> found = dy.intruders("run.zarr", since=4, k=2, select="*q_proj")
        >>> found["intruders"].sel(step=8).values.max() <= 2
        np.True_
    """
    run = run if isinstance(run, Run) else open_run(run)
    if schema.WEIGHT not in {*run.stored_kinds, *run.spectrum_kinds}:
        raise MissingError(f"{run.path} has no weights; it has {', '.join(run.kinds)}.")
    matrices = selected_matrices(run, select)
    if since is None:
        since = int(run.steps[0])
        warnings.warn(
            f"Intruders are counted against step {since}, the first of {run.path}. If the model "
            "was not pretrained then, its directions are random, and the count says nothing: "
            "choose since=STEP.",
            RandomReferenceWarning,
            stacklevel=2,
        )
    since = run.check_step(since)
    cells: dict[tuple[int, int, int], dict[str, float]] = {}
    for m, (_, read) in enumerate(matrices):
        before = _values(measurable(read, since, schema.WEIGHT))
        if before is None:
            continue
        known = np.linalg.svd(before, full_matrices=False)[0]
        for t, step in enumerate(run.steps.tolist()):
            now = _values(measurable(read, step, schema.WEIGHT)) if step > since else None
            if now is None or now.shape != before.shape:
                continue
            closest = _closest(now, known, k)
            rank = difference_rank_bound(run, matrices[m][0].name, since, step)
            noise = [
                np.sum(_closest(before + each, known, k) < epsilon)
                for each in _random_changes(now - before, rank)
            ]
            cells[0, t, m] = {
                "intruders": float(np.sum(closest < epsilon)),
                "intruders_of_noise": float(np.mean(noise)),
                "closest": float(closest.mean()),
            }
    infos = [info for info, _ in matrices]
    return dataset_of_cells(cells, _LONG_NAMES, [schema.WEIGHT], run.steps, infos, k)


def _values(matrix: Matrix | Difference | None) -> np.ndarray | None:
    assert not isinstance(matrix, Factored)
    return None if matrix is None else matrix.values.astype(np.float64)


def _closest(weight: np.ndarray, known: np.ndarray, k: int) -> np.ndarray:
    leading = np.linalg.svd(weight, full_matrices=False)[0][:, :k]
    nearest: np.ndarray = np.abs(known.T @ leading).max(axis=0)
    return nearest


def _random_changes(change: np.ndarray, rank: int | None) -> list[np.ndarray]:
    rng, norm = np.random.default_rng(0), np.linalg.norm(change)
    rows, cols = change.shape
    draws = []
    for _ in range(_DRAWS):
        if rank is None:
            noise = rng.standard_normal(change.shape)
        else:
            noise = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols))
        draws.append(noise * (norm / np.linalg.norm(noise)))
    return draws
