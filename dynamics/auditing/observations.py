"""What an audit sees of one matrix: a few numbers per record and per pair of records.

Each matrix is read once, record by record, with two records in memory. The judges
(`merges.py`, `weights.py`) look at these numbers only.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from dynamics import schema
from dynamics.auditing.rounding import fitted_scale, frobenius_norm, product_error, rounded
from dynamics.errors import FormatError
from dynamics.runs.run import Dense, Factored, MatrixInfo, Run
from dynamics.spectra.noise import rounding_variance, ulp
from dynamics.spectra.spectrum import singular_values


@dataclass(frozen=True)
class Snapshot:
    """The matrices of one parameter in one record; None where it has none, or holds NaN/Inf."""

    step: int
    weight: Dense | None
    adapter: Factored | None
    gradient: Dense | None


@dataclass(frozen=True)
class MergeSeen:
    """A merge at a record N, and the first record N' after it.

    With W the effective weight, D = s·B·A at N, and the base at N' rounded to its dtype:

    Attributes:
        step: N.
        scaling: s.
        dtype: of the stored weight.
        update: ‖D‖.
        residual: ‖base(N') - W(N)‖ = ‖Δbase - D‖: what the merge did to the function.
        bound: the largest residual that rounding can make.
        tf32_bound: the same, if the products were computed in TF32.
        scale: <Δbase, D> / ‖D‖².
        off_scale: ‖Δbase - scale·D‖.
        lost: ‖round(base + D) - base - D‖ / ‖D‖, what this dtype's rounding takes of the update.
        lost_along: -<round(base + D) - base - D, D> / ‖D‖², the part of it that is a shrinking.
        lost_expected: the same as `lost` by the rounding model, sqrt(Σ ulp²/12) / ‖D‖.
    """

    step: int
    scaling: float
    dtype: str
    update: float
    residual: float = 0.0
    bound: float = 0.0
    tf32_bound: float = 0.0
    scale: float = 1.0
    off_scale: float = 0.0
    lost: float = 0.0
    lost_along: float = 0.0
    lost_expected: float = 0.0


@dataclass(frozen=True)
class RestartSeen:
    """The factors on both sides of a merge; pairs are of the left (rows, r) and right (r, cols).

    Attributes:
        step: the record before it.
        cosines: of the old and the new factor, over all entries.
        agreeing: how many of the r components have <new, old> > 0.
        components: of how many, those left out where either is zero.
        kept: <D', D> / ‖D‖², how much of the old product is in the new one.
    """

    step: int
    cosines: tuple[float, float]
    agreeing: tuple[int, int]
    components: tuple[int, int]
    kept: float


@dataclass
class Observations:
    """All that the judges need to know about one matrix."""

    info: MatrixInfo
    steps: list[int] = field(default_factory=list)  # records with a finite weight or adapter
    adapted: bool = False
    non_finite: list[tuple[int, str]] = field(default_factory=list)  # (step, kind)
    unreadable: dict[str, int] = field(default_factory=dict)  # message -> step
    dead: list[int] = field(default_factory=list)  # records where A and B are both zero
    zero_gradients: list[int] = field(default_factory=list)
    gradients: int = 0
    moved: dict[tuple[int, int], bool] = field(default_factory=dict)  # by pair of records
    merges: list[MergeSeen] = field(default_factory=list)
    unclear: list[MergeSeen] = field(default_factory=list)  # the base changed, was it a merge?
    unchecked: dict[int, str] = field(default_factory=dict)  # merge step -> why not seen
    restarts: list[RestartSeen] = field(default_factory=list)
    drawn: int | None = None  # the factor that a fresh adapter draws: 0 left, 1 right
    drifts: list[tuple[int, float, float]] = field(default_factory=list)  # step, ‖Δbase‖, bound
    rank: tuple[int, int, float, float] | None = None  # step, bound, σ_(bound+1), noise


def observe(run: Run, info: MatrixInfo, merges: tuple[int, ...]) -> Observations:
    """Read every record of a matrix; `merges` are the steps of the run's merge events."""
    seen = Observations(info)
    first: Snapshot | None = None
    before: Snapshot | None = None
    for now in _snapshots(run, seen):
        _look_at(now, seen)
        if before is not None:
            crossed = [step for step in merges if before.step <= step < now.step]
            _look_at_pair(run, before, now, crossed, bool(merges), seen)
        if now.weight is not None and now.adapter is not None:
            first = first or now
        before = now
    if first is not None and before is not None and before.step > first.step and merges:
        seen.rank = _displacement_rank(first, before, merges)
    return seen


def _snapshots(run: Run, seen: Observations) -> Iterator[Snapshot]:
    for step in run.steps.tolist():
        if step in run.problems:
            continue  # the whole checkpoint; reported once
        found: dict[str, Dense | Factored | None] = {}
        try:
            for kind in (schema.WEIGHT, schema.ADAPTER, schema.GRADIENT):
                if kind in run.stored_kinds:
                    found[kind] = run.read(seen.info.name, step, kind)
        except FormatError as problem:
            seen.unreadable.setdefault(str(problem), step)
            continue
        for kind, matrix in found.items():
            if matrix is not None and not _is_finite(matrix):
                seen.non_finite.append((step, kind))
                found[kind] = None
        weight, adapter, gradient = (
            found.get(kind) for kind in (schema.WEIGHT, schema.ADAPTER, schema.GRADIENT)
        )
        assert not isinstance(weight, Factored)
        assert not isinstance(adapter, Dense)
        assert not isinstance(gradient, Factored)
        yield Snapshot(step, weight, adapter, gradient)


def _is_finite(matrix: Dense | Factored) -> bool:
    parts = (matrix.values,) if isinstance(matrix, Dense) else (matrix.left, matrix.right)
    return all(bool(np.isfinite(part).all()) for part in parts)


def _look_at(now: Snapshot, seen: Observations) -> None:
    if now.weight is not None or now.adapter is not None:
        seen.steps.append(now.step)
    if now.gradient is not None:
        seen.gradients += 1
        if not now.gradient.values.any():
            seen.zero_gradients.append(now.step)
    if now.adapter is not None:
        seen.adapted = True
        nonzero = [bool(now.adapter.left.any()), bool(now.adapter.right.any())]
        if not any(nonzero):
            seen.dead.append(now.step)
        elif seen.drawn is None and not all(nonzero):
            seen.drawn = nonzero.index(True)


def _look_at_pair(
    run: Run,
    before: Snapshot,
    now: Snapshot,
    crossed: list[int],
    has_events: bool,
    seen: Observations,
) -> None:
    if before.weight is None or now.weight is None:
        changed = False
    else:
        difference = np.abs(_float64(now.weight) - _float64(before.weight))
        # A merge rounds a weight anew, which is no movement.
        still = ulp(_float64(now.weight), now.weight.dtype) if crossed else 0.0
        seen.moved[before.step, now.step] = bool((difference > still).any())
    if before.adapter is None or now.adapter is None:
        return
    if before.weight is not None and now.weight is not None:
        drift, bound = _base_change(before, now)
        if has_events:
            changed = bool(crossed)
        else:  # the base itself must tell; checkpoints hold it exactly
            changed = drift > bound or bool(
                run.merges_between(seen.info.name, before.step, now.step)
            )
        if has_events and not crossed:
            seen.drifts.append((now.step, drift, bound))
    else:
        changed = bool(crossed)
    if not changed:
        return
    _look_at_merge(before, now, crossed, has_events, seen)
    if before.adapter.left.shape == now.adapter.left.shape:
        seen.restarts.append(_restart(before.step, before.adapter, now.adapter))


def _look_at_merge(
    before: Snapshot, now: Snapshot, crossed: list[int], has_events: bool, seen: Observations
) -> None:
    assert before.adapter is not None
    if before.weight is None or now.weight is None:
        seen.unchecked[before.step] = "no effective weight is recorded beside the adapter"
    elif has_events and crossed != [before.step]:
        reason = (
            f"{len(crossed)} merges lie between the records {before.step} and {now.step}"
            if len(crossed) > 1
            else f"there is no record at the merge step {crossed[0]}; record its multiples too"
        )
        seen.unchecked[crossed[0]] = reason
    elif not before.adapter.left.any() or not before.adapter.right.any():
        seen.unchecked[before.step] = "the adapter was zero: there was nothing to merge"
    else:
        merge = _merge(before, now)
        proportional = merge.off_scale <= merge.tf32_bound
        (seen.merges if has_events or proportional else seen.unclear).append(merge)


def _merge(before: Snapshot, now: Snapshot) -> MergeSeen:
    assert before.weight is not None
    assert before.adapter is not None
    assert now.weight is not None
    assert now.adapter is not None
    dtype = now.weight.dtype
    update = before.adapter.product()
    # A base is on the grid of its dtype; rounding takes away what storing W + D added to it.
    base_before = rounded(_float64(before.weight) - update, dtype)
    base_after = rounded(_float64(now.weight) - now.adapter.product(), dtype)
    expected = rounded(_float64(before.weight), dtype)
    residual = base_after - expected
    # Both were rounded, each within half an ulp of the larger number.
    size = np.maximum(np.abs(expected), np.abs(base_after))
    half_ulps = ulp(np.maximum(size, np.abs(_float64(now.weight))), dtype)
    bounds = [
        half_ulps + product_error(before.adapter, tf32=tf32) + product_error(now.adapter, tf32=tf32)
        for tf32 in (False, True)
    ]
    norm = frobenius_norm(update)
    scale = 1 + fitted_scale(residual, update)
    lost = expected - base_before - update
    return MergeSeen(
        step=before.step,
        scaling=before.adapter.scale,
        dtype=dtype,
        update=norm,
        residual=frobenius_norm(residual),
        bound=frobenius_norm(bounds[0]),
        tf32_bound=frobenius_norm(bounds[1]),
        scale=scale,
        off_scale=frobenius_norm(residual + (1 - scale) * update),
        lost=frobenius_norm(lost) / norm,
        lost_along=-fitted_scale(lost, update),
        lost_expected=float(np.sqrt(rounding_variance(expected, dtype).sum())) / norm,
    )


def _base_change(before: Snapshot, now: Snapshot) -> tuple[float, float]:
    """‖base(now) - base(before)‖ and the largest that rounding alone can make of no change."""
    bases, bound = [], 0.0
    for each in (before, now):
        assert each.weight is not None
        assert each.adapter is not None
        base = rounded(_float64(each.weight) - each.adapter.product(), each.weight.dtype)
        stored = np.maximum(np.abs(_float64(each.weight)), np.abs(base))
        bound += frobenius_norm(
            ulp(stored, each.weight.dtype) + product_error(each.adapter, tf32=True)
        )
        bases.append(base)
    return frobenius_norm(bases[1] - bases[0]), bound


def _restart(step: int, old: Factored, new: Factored) -> RestartSeen:
    # <D', D> = tr((BᵀB')(A'Aᵀ)): the (m, n) products are never formed.
    overlap = np.vdot(old.left.T @ new.left, old.right @ new.right.T)
    size = np.vdot(old.left.T @ old.left, old.right @ old.right.T)
    left = (new.left * old.left).sum(axis=0)  # (r,)
    right = (new.right * old.right).sum(axis=1)  # (r,)
    return RestartSeen(
        step=step,
        cosines=(_cosine(old.left, new.left), _cosine(old.right, new.right)),
        agreeing=(int((left > 0).sum()), int((right > 0).sum())),
        components=(int((left != 0).sum()), int((right != 0).sum())),
        kept=float(new.scale * overlap / (old.scale * size)) if size > 0 else 0.0,
    )


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    norms = frobenius_norm(one) * frobenius_norm(other)
    return float(np.vdot(one, other)) / norms if norms > 0 else 0.0


def _displacement_rank(
    first: Snapshot, last: Snapshot, merges: tuple[int, ...]
) -> tuple[int, int, float, float] | None:
    if last.weight is None or last.adapter is None:
        return None
    assert first.weight is not None
    assert first.adapter is not None
    between = sum(first.step <= step < last.step for step in merges)
    # One product per cycle, and what the adapter held when recording began.
    held = first.adapter.left.any() and first.adapter.right.any()
    bound = last.adapter.rank_bound * (between + 1 + bool(held))
    s = singular_values(_float64(last.weight) - _float64(first.weight))
    if bound >= s.size:
        return None
    noise = 0.0  # every stored weight and every merge rounds once
    for each, times in ((first, 1), (last, 1 + between)):
        assert each.weight is not None
        assert each.adapter is not None
        error = ulp(_float64(each.weight), each.weight.dtype) / 2
        noise += times * frobenius_norm(error + product_error(each.adapter, tf32=True))
    return last.step, bound, float(s[bound]), noise


def _float64(matrix: Dense) -> np.ndarray:
    return matrix.values.astype(np.float64)
