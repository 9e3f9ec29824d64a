"""Where updates point, compared with the weights they change, earlier cycles, or another run.

`subspace_overlaps` is about one run, `run_alignment` about two. Both return a Dataset with the
dimensions `kind, step, matrix` of an analysis.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.analysis.results import matrix_coords
from dynamics.components.parameters import Measurable, parameters
from dynamics.directions.pairwise import (
    Subspaces,
    alignment,
    energy_in_subspaces,
    leading_subspaces,
    subspace_overlap,
)
from dynamics.errors import MissingError
from dynamics.formats import open_run
from dynamics.runs.differences import Difference, is_finite, reference_step
from dynamics.runs.matrix_cache import CachedRun
from dynamics.runs.parameter_names import matches
from dynamics.runs.run import Matrix, MatrixInfo, Run, Spectrum
from dynamics.schema import Status

# (kind, step, matrix) -> the values measured there
Cells = dict[tuple[int, int, int], dict[str, float]]

_UPDATES = (
    schema.ADAPTER,
    schema.UPDATE,
    schema.DISPLACEMENT,
    schema.CYCLE_UPDATE,
    schema.OPTIMIZER_UPDATE,
)
_LONG_NAMES = {
    "left_overlap_with_weight": "overlap of the left subspaces of update and weight",
    "right_overlap_with_weight": "overlap of the right subspaces of update and weight",
    "energy_in_weight": "share of the update within the weight's leading subspaces",
    "left_overlap_with_last_cycle": "overlap of the left subspaces of this cycle and the last",
    "right_overlap_with_last_cycle": "overlap of the right subspaces of this cycle and the last",
    "alignment": "cosine between the two runs' matrices",
    "left_overlap": "overlap of the two runs' left subspaces",
    "right_overlap": "overlap of the two runs' right subspaces",
    "subspace_dimension": "dimension of the smaller subspace",
}


def subspace_overlaps(
    run: Run | str | Path,
    *,
    k: int = 16,
    kinds: Iterable[str] | None = None,
    select: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """How updates overlap with the weights they change, and each cycle with the cycle before.

    A subspace is spanned by the k leading singular directions above the noise floor, or by fewer
    where fewer are above it. An overlap is the mean cos² of the principal angles
    (`directions.pairwise.subspace_overlap`; Hu et al. 2021, arXiv 2106.09685, equation 4).

    Args:
        run: a run, or its path.
        k: directions.
        kinds: of adapter, update, displacement, cycle_update, optimizer_update; by default those
            that the run has.
        select: globs over parameter names ("*_proj" matches with or without ".weight").

    Returns:
        A Dataset with dims (kind, step, matrix), NaN where nothing could be compared:

        - `left_overlap_with_weight`, `right_overlap_with_weight`: the overlap of an update with the
          weight from which it started.
        - `energy_in_weight`: the share of the update's energy within that weight's leading
          subspaces.
        - `left_overlap_with_last_cycle`, `right_overlap_with_last_cycle` (kind `adapter`): the
          overlap of the adapter with the adapter that was merged last. Random subspaces of
          dimension r in n dimensions overlap by r/n; a reset that explores new directions stays
          near this value.

        Variables for which the run has no values at all are left out.

    Raises:
        MissingError: one of `kinds` is none of the above or the run lacks it, `select` matches
            nothing, or the run holds only spectra.
        FormatError: `run` cannot be opened, or one of its files is damaged.

    Example:
        >>> overlaps = dy.subspace_overlaps("run.zarr", k=2, kinds=["adapter"], select="*q_proj")
        >>> overlaps["left_overlap_with_weight"].dims
        ('kind', 'step', 'matrix')
        >>> cycles = overlaps["left_overlap_with_last_cycle"].dropna("step", how="all")
        >>> cycles["step"].values.tolist()  # the merge came after step 4
        [6, 8]
    """
    run = run if isinstance(run, Run) else open_run(run)
    chosen = _chosen_kinds(run, kinds)
    merges = sorted({each.step for each in run.events if each.kind == schema.MERGE})
    cells: Cells = {}
    matrices = selected_matrices(run, select)
    for m, (info, read) in enumerate(matrices):
        leading = lru_cache(maxsize=None)(partial(_leading, read, k))
        for t, step in enumerate(run.steps.tolist()):
            last_merge = max((merge for merge in merges if merge < step), default=None)
            for i, kind in enumerate(chosen):
                matrix, update = measurable(read, step, kind), leading(step, kind)
                if matrix is None or update is None:
                    continue
                weight = leading(_start(run, info.name, step, kind), schema.WEIGHT)
                if weight is not None:
                    cells[i, t, m] = {
                        "left_overlap_with_weight": subspace_overlap(update.left, weight.left),
                        "right_overlap_with_weight": subspace_overlap(update.right, weight.right),
                        "energy_in_weight": energy_in_subspaces(matrix, weight.left, weight.right),
                    }
                if kind == schema.ADAPTER and last_merge is not None and last_merge in run.steps:
                    before = leading(last_merge, kind)
                    if before is not None:
                        cells.setdefault((i, t, m), {}).update(
                            left_overlap_with_last_cycle=subspace_overlap(before.left, update.left),
                            right_overlap_with_last_cycle=subspace_overlap(
                                before.right, update.right
                            ),
                        )
    infos = [info for info, _ in matrices]
    return dataset_of_cells(cells, _LONG_NAMES, chosen, run.steps, infos, k)


def run_alignment(
    one: Run | str | Path,
    other: Run | str | Path,
    *,
    kind: str = schema.DISPLACEMENT,
    k: int = 16,
    select: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """How far two runs move their weights in the same directions.

    They are compared at the steps that both recorded, for the matrices that both have in the same
    shape.

    Args:
        one: a run, or its path.
        other: likewise.
        kind: of the matrices that are compared.
        k: directions.
        select: globs over parameter names ("*_proj" matches with or without ".weight").

    Returns:
        A Dataset with dims (kind, step, matrix), NaN where a run has no such matrix or it is not
        finite:

        - `alignment`: the cosine between the two matrices, between -1 and 1; NaN for zero ones.
        - `left_overlap`, `right_overlap`: the overlap of their k leading directions above the noise
          floor, the mean cos² of the principal angles; NaN where one has none.
        - `subspace_dimension`: the dimension of the smaller of the two subspaces.

    Raises:
        MissingError: the runs have no step or no matrix of one shape in common, one of them lacks
            the kind or holds only spectra, or `select` matches nothing.
        FormatError: a run cannot be opened, or one of its files is damaged.

    Example:
        >>> both = dy.run_alignment("full/run.zarr", "relora/run.zarr", k=2)
        >>> sorted(both.data_vars)
        ['alignment', 'left_overlap', 'right_overlap', 'subspace_dimension']
        >>> itself = dy.run_alignment("full/run.zarr", "full/run.zarr")["alignment"]
        >>> bool((abs(itself.dropna("step", how="all") - 1) < 1e-12).all())
        True
    """
    one, other = (run if isinstance(run, Run) else open_run(run) for run in (one, other))
    for run in (one, other):
        if kind not in run.kinds:
            raise MissingError(f"{run.path} has no {kind}; it has {', '.join(run.kinds)}.")
    steps = np.intersect1d(one.steps, other.steps)
    theirs = dict(selected_matrices(other, select))
    common = [(info, read) for info, read in selected_matrices(one, select) if info in theirs]
    if not steps.size or not common:
        raise MissingError(f"{one.path} and {other.path} have no step or no matrix in common.")
    cells: Cells = {}
    for m, (info, read) in enumerate(common):
        for t, step in enumerate(steps.tolist()):
            ours, other_one = measurable(read, step, kind), measurable(theirs[info], step, kind)
            if ours is None or other_one is None:
                continue
            a, b = (leading_subspaces(each, k) for each in (ours, other_one))
            cells[0, t, m] = {
                "alignment": alignment(ours, other_one),
                "left_overlap": subspace_overlap(a.left, b.left),
                "right_overlap": subspace_overlap(a.right, b.right),
                "subspace_dimension": min(a.s.size, b.s.size),
            }
    infos = [info for info, _ in common]
    return dataset_of_cells(cells, _LONG_NAMES, [kind], steps, infos, k)


def _chosen_kinds(run: Run, kinds: Iterable[str] | None) -> list[str]:
    if kinds is None:
        return [kind for kind in _UPDATES if kind in run.kinds]
    chosen = list(kinds)
    for kind in chosen:
        if kind not in _UPDATES or kind not in run.kinds:
            known = ", ".join(each for each in _UPDATES if each in run.kinds)
            raise MissingError(f"No update of kind {kind!r} in {run.path}; it has {known}.")
    return chosen


def selected_matrices(
    run: Run, select: str | Sequence[str] | None
) -> list[tuple[MatrixInfo, Measurable]]:
    """The parameters of a run that `select` matches, each with its reader.

    Raises:
        MissingError: there is none, or the run holds only spectra.
    """
    run.require_matrices("The overlap of subspaces")
    offered = parameters(CachedRun(run))  # which keeps what several kinds read
    chosen = [each for each in offered if select is None or matches(each[0].name, select)]
    if not chosen:
        raise MissingError(f"No matrix of {run.path} matches {select!r}.")
    return chosen


def _start(run: Run, name: str, step: int, kind: str) -> int:
    """The step of the weight from which an update started; `step` itself where none is earlier."""
    like = schema.CYCLE_UPDATE if kind == schema.ADAPTER else kind
    start = reference_step(run, name, step, like)
    return step if start is None else start


def measurable(read: Measurable, step: int, kind: str) -> Matrix | Difference | None:
    """A matrix of a run, None where there is none or it holds NaN or Inf."""
    matrix = read(step, kind)
    assert not isinstance(matrix, Spectrum), "refused by require_matrices"
    return None if isinstance(matrix, Status) or not is_finite(matrix) else matrix


def _leading(read: Measurable, k: int, step: int, kind: str) -> Subspaces | None:
    matrix = measurable(read, step, kind)
    return None if matrix is None else leading_subspaces(matrix, k)


def dataset_of_cells(
    cells: Cells,
    long_names: Mapping[str, str],
    kinds: list[str],
    steps: np.ndarray,
    infos: list[MatrixInfo],
    k: int,
) -> xr.Dataset:
    """The cells as a Dataset (kind, step, matrix), NaN elsewhere; only variables with a value."""
    names = [name for name in long_names if any(name in cell for cell in cells.values())]
    values = {name: np.full((len(kinds), len(steps), len(infos)), np.nan) for name in names}
    for position, cell in cells.items():
        for name, value in cell.items():
            values[name][position] = value
    dims = (schema.KIND, schema.STEP, schema.MATRIX)
    return xr.Dataset(
        {
            name: (dims, array, {"long_name": long_names[name], "units": "1"})
            for name, array in values.items()
        },
        coords={
            schema.KIND: kinds,
            schema.STEP: steps,
            **matrix_coords([("parameters", info) for info in infos]),
        },
        attrs={"directions": k},
    )
