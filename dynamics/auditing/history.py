"""What happened to one matrix over the records of a run, as the few numbers that the checks need.

Each matrix is read once, record by record, with four records in memory. The judges (`merges.py`,
`weights.py`) look at these numbers only.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse.linalg import svds

from dynamics import schema
from dynamics.auditing.record_pairs import (
    AdaptedWeight,
    Merge,
    Restart,
    base_change,
    displacement_beyond_bound,
    merge_between,
    product_beyond_bound,
    restart_between,
    update_beyond_bound,
    weight_moved,
)
from dynamics.components.rank_bounds import difference_rank_bound
from dynamics.errors import FormatError
from dynamics.runs.run import Dense, Factored, MatrixInfo, Run
from dynamics.spectra.random_matrices import TRACY_WIDOM_999, largest_singular_value

_FEWEST_DIRECTIONS = 16


@dataclass(frozen=True)
class Snapshot:
    """The matrices of one parameter in one record; None where one is absent or holds NaN or Inf."""

    step: int
    weight: Dense | None
    adapter: Factored | None
    gradient: Dense | None
    base: Dense | None = None  # where it is sparse and trains

    @property
    def adapted(self) -> AdaptedWeight | None:
        """Weight and adapter, where both are present."""
        if self.weight is None or self.adapter is None:
            return None
        return AdaptedWeight(self.step, self.weight, self.adapter)


@dataclass
class MatrixHistory:
    """All that the judges need to know about one matrix."""

    info: MatrixInfo
    adapted: bool = False
    trains: bool | None = None  # see `Run.trains`
    non_finite: list[tuple[int, str]] = field(default_factory=list)  # (step, kind)
    unreadable: dict[str, int] = field(default_factory=dict)  # message -> step
    dead: list[int] = field(default_factory=list)  # records where A and B are both zero
    zero_gradients: list[int] = field(default_factory=list)
    gradients: int = 0
    moved: dict[tuple[int, int], bool] = field(default_factory=dict)  # by pair of records
    merges: list[Merge] = field(default_factory=list)
    unclear: list[Merge] = field(default_factory=list)  # the base changed; perhaps a merge
    unchecked: dict[int, str] = field(default_factory=dict)  # merge step -> why not checked
    restarts: list[Restart] = field(default_factory=list)
    drawn: int | None = None  # the factor that a fresh adapter draws: 0 left, 1 right
    drifts: list[tuple[int, float, float]] = field(default_factory=list)  # step, ‖Δbase‖, bound
    digests: dict[int, str] = field(default_factory=dict)  # step -> hash of its numbers
    # (step, step of one of the next two records) -> squared Frobenius norm of the difference
    distances: dict[tuple[int, int], float] = field(default_factory=dict)
    squares: dict[int, float] = field(default_factory=dict)  # step -> squared norm of the weight
    # step -> squared norm of its difference from the first record
    from_first: dict[int, float] = field(default_factory=dict)
    beyond_chance: float | None = None  # of the first record; see `beyond_chance`
    rank: tuple[int, int, float, float] | None = None  # see `displacement_beyond_bound`
    # (step, bound, σ beyond it, noise) of the update or the product that exceeds its bound most
    of_projectors: tuple[int, int, float, float] | None = None  # see `update_beyond_bound`
    of_product: tuple[int, int, float, float] | None = None  # see `product_beyond_bound`
    sparse_entries: int | None = None  # see `Run.sparse_entries`
    places: dict[int, int] = field(default_factory=dict)  # step -> places of S used until then


def read_history(run: Run, info: MatrixInfo, merges: tuple[int, ...]) -> MatrixHistory:
    """Read every record of a matrix; `merges` are the steps of the run's merge events."""
    history = MatrixHistory(
        info, trains=run.trains(info.name), sparse_entries=run.sparse_entries(info.name)
    )
    used: np.ndarray | None = None
    first: AdaptedWeight | None = None
    before: Snapshot | None = None
    earlier: Snapshot | None = None
    origin: Snapshot | None = None
    for now in _snapshots(run, history):
        _add_record(now, history)
        if now.base is not None:
            used = _add_base(now, now.base, used, history)
        for each in (earlier, before):
            if (square := _distance(each, now)) is not None and each is not None:
                history.distances[each.step, now.step] = square
        origin = origin or now
        if (square := _distance(origin, now)) is not None:
            history.from_first[now.step] = square
        if before is not None and _changes_shape(before, now):  # an embedding that was resized
            history.moved[before.step, now.step] = True
            first = None
        elif before is not None:
            crossed = [step for step in merges if before.step <= step < now.step]
            _add_pair(run, before, now, crossed, bool(merges), history)
            _add_projected(run, before, now, history)
        first = first or now.adapted
        earlier, before = before, now
    last = before.adapted if before is not None else None
    is_frozen = history.sparse_entries is None
    if is_frozen and first is not None and last is not None and last.step > first.step and merges:
        history.rank = displacement_beyond_bound(first, last, merges)
    return history


def _distance(before: Snapshot | None, now: Snapshot) -> float | None:
    """The squared norm of the difference; None where there is none."""
    if before is None or before.weight is None or now.weight is None:
        return None
    if before.weight.shape != now.weight.shape:
        return None
    if before is now:
        return 0.0
    change = np.subtract(now.weight.values, before.weight.values, dtype=_wide(now.weight))
    return float(np.vdot(change, change))


def _wide(weight: Dense) -> np.dtype:
    """A dtype in which lengths can be compared: float16 would overflow."""
    return np.result_type(weight.values.dtype, np.float32)


def _changes_shape(before: Snapshot, now: Snapshot) -> bool:
    """Whether two records of a weight cannot be compared entry by entry."""
    if before.weight is None or now.weight is None:
        return False
    return before.weight.shape != now.weight.shape


def _snapshots(run: Run, history: MatrixHistory) -> Iterator[Snapshot]:
    for step in run.steps.tolist():
        if step in run.problems:
            continue  # the whole checkpoint is unreadable; `judge_readable` reports it once
        matrices: dict[str, Dense | Factored | None] = {}
        try:
            for kind in (schema.WEIGHT, schema.ADAPTER, schema.GRADIENT, schema.BASE):
                if kind in run.stored_kinds and (kind != schema.BASE or history.sparse_entries):
                    matrices[kind] = run.read(history.info.name, step, kind)
        except FormatError as problem:
            history.unreadable.setdefault(str(problem), step)
            continue
        for kind, matrix in matrices.items():
            if matrix is not None and not _is_finite(matrix):
                history.non_finite.append((step, kind))
                matrices[kind] = None
        weight, adapter, gradient, base = (
            matrices.get(kind)
            for kind in (schema.WEIGHT, schema.ADAPTER, schema.GRADIENT, schema.BASE)
        )
        assert not isinstance(base, Factored)
        assert not isinstance(weight, Factored)
        assert not isinstance(adapter, Dense)
        assert not isinstance(gradient, Factored)
        yield Snapshot(step, weight, adapter, gradient, base)


def digest(values: np.ndarray) -> str:
    """A hash of numbers; zero has no sign."""
    return hashlib.blake2b(np.ascontiguousarray(values + 0.0).tobytes(), digest_size=12).hexdigest()


def beyond_chance(values: np.ndarray) -> float | None:
    """The largest singular value over that of independent entries of the same mean square.

    The latter is the 99.9 % point of its distribution (Johnstone 2001; `largest_singular_value`).
    None for a matrix that has hardly a spectrum, is zero, or is sparse: the largest singular value
    of few entries is that of the row that has most of them.
    """
    rows, cols = values.shape
    if np.count_nonzero(values) < values.size / 2:
        return None
    size = float(np.linalg.norm(values)) / (rows * cols) ** 0.5
    if min(rows, cols) < _FEWEST_DIRECTIONS or size == 0:
        return None
    (largest,) = svds(values, k=1, return_singular_vectors=False, tol=0.01, rng=0)
    return float(largest) / (size * largest_singular_value(rows, cols, TRACY_WIDOM_999))


def _is_finite(matrix: Dense | Factored) -> bool:
    parts = (matrix.values,) if isinstance(matrix, Dense) else (matrix.left, matrix.right)
    return all(bool(np.isfinite(part).all()) for part in parts)


def _add_record(now: Snapshot, history: MatrixHistory) -> None:
    if now.weight is not None:
        values = now.weight.values.astype(_wide(now.weight), copy=False)
        history.squares[now.step] = float(np.vdot(values, values))
        if not history.digests:
            history.beyond_chance = beyond_chance(values)
        history.digests[now.step] = digest(now.weight.values)
    elif now.adapter is not None:
        parts = (now.adapter.left, now.adapter.right)
        history.digests[now.step] = "".join(digest(each) for each in parts)
    if now.gradient is not None:
        history.gradients += 1
        if not now.gradient.values.any():
            history.zero_gradients.append(now.step)
    if now.adapter is not None:
        history.adapted = True
        nonzero = [bool(now.adapter.left.any()), bool(now.adapter.right.any())]
        if not any(nonzero):
            history.dead.append(now.step)
        elif history.drawn is None and not all(nonzero):
            history.drawn = nonzero.index(True)


def _add_pair(
    run: Run,
    before: Snapshot,
    now: Snapshot,
    crossed: list[int],
    has_events: bool,
    history: MatrixHistory,
) -> None:
    if before.weight is not None and now.weight is not None:
        pair = before.step, now.step
        history.moved[pair] = weight_moved(before.weight, now.weight, merged=bool(crossed))
    if before.adapter is None or now.adapter is None or history.sparse_entries is not None:
        return  # a base that trains is never merged into
    merged = bool(crossed)
    old, new = before.adapted, now.adapted
    if old is not None and new is not None:
        drift, bound = base_change(old, new)
        if not has_events:  # only the base can show a merge; checkpoints store it exactly
            merged = drift > bound or bool(
                run.merges_between(history.info.name, before.step, now.step)
            )
        elif not crossed:
            history.drifts.append((now.step, drift, bound))
    if not merged:
        return
    if old is None or new is None:
        history.unchecked[before.step] = "no effective weight is recorded beside the adapter"
    else:
        _add_merge(old, new, crossed, has_events, history)
    if before.adapter.left.shape == now.adapter.left.shape:
        history.restarts.append(restart_between(before.step, before.adapter, now.adapter))


def _add_base(
    now: Snapshot, base: Dense, used: np.ndarray | None, history: MatrixHistory
) -> np.ndarray:
    """Count the places of a sparse base that any record up to this one uses."""
    places = base.values != 0
    used = places if used is None or used.shape != places.shape else used | places
    history.places[now.step] = int(np.count_nonzero(used))
    if now.adapted is not None and now.adapted.weight.shape == base.shape:
        found = product_beyond_bound(now.adapted.weight, base, now.adapted.adapter)
        if found is not None:
            fact = (now.step, now.adapted.adapter.rank_bound, *found)
            history.of_product = _worse(history.of_product, fact)
    return used


def _add_projected(run: Run, before: Snapshot, now: Snapshot, history: MatrixHistory) -> None:
    if before.weight is None or now.weight is None or schema.ADAPTER in run.stored_kinds:
        return
    bound = difference_rank_bound(run, history.info.name, before.step, now.step)
    if bound is not None:
        steps = now.step - before.step
        found = update_beyond_bound(before.weight, now.weight, bound, steps)
        if found is not None:
            history.of_projectors = _worse(history.of_projectors, (now.step, bound, *found))


def _worse(
    known: tuple[int, int, float, float] | None, found: tuple[int, int, float, float]
) -> tuple[int, int, float, float]:
    if known is None or found[2] - found[3] > known[2] - known[3]:
        return found
    return known


def _add_merge(
    before: AdaptedWeight,
    now: AdaptedWeight,
    crossed: list[int],
    has_events: bool,
    history: MatrixHistory,
) -> None:
    if has_events and crossed != [before.step]:
        history.unchecked[crossed[0]] = (
            f"{len(crossed)} merges lie between the records {before.step} and {now.step}"
            if len(crossed) > 1
            else f"there is no record at the merge step {crossed[0]}; record this step too (let "
            "`every` divide the cycle)"
        )
    elif not before.adapter.left.any() or not before.adapter.right.any():
        history.unchecked[before.step] = "the adapter was zero, so there was nothing to merge"
    else:
        merge = merge_between(before, now)
        proportional = merge.off_scale <= merge.tf32_bound
        (history.merges if has_events or proportional else history.unclear).append(merge)
