"""Kinds that are made from weights: differences of two stored matrices, and sums of adapters."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dynamics import schema
from dynamics.runs.run import Dense, Factored, Matrix, Run, Spectrum, Stored


@dataclass(frozen=True)
class Difference:
    """now - before, computed in float64.

    Its noise is the rounding of both terms, and of every merge in between: each stored
    W + s·B·A rounds the weight anew. Where an adapter is part of the later weight, the product
    s·B·A was rounded before it was added, in float32 at each of its r partial sums: those of a
    sum of independent terms have (r + 1)/2 times the variance of its last rounding. The errors of
    one quantised base are in both terms and cancel.

    A weight that is trained in place is rounded by each optimizer step, too: T + 1 roundings are
    behind a difference over T steps. Where a dtype shorter than float32 is stored, they are those
    of float32, because such weights are trained with a float32 copy.

    Attributes:
        now: the later matrix.
        before: the earlier one.
        merges: how often an adapter was merged into the weight between the two.
        rank_bound: the largest rank it can have, where adapters alone moved the weight.
        adapter: what `now` is the sum of, beside its base.
        trained_steps: how many optimizer steps trained the weight in place between the two.
    """

    now: Dense
    before: Dense
    merges: int = 0
    rank_bound: int | None = None
    adapter: Factored | None = None
    trained_steps: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return self.now.shape

    @property
    def values(self) -> np.ndarray:
        """(rows, cols) float64."""
        return np.subtract(self.now.values, self.before.values, dtype=np.float64)

    @property
    def stored(self) -> tuple[Stored, ...]:
        """The stored numbers that its noise comes from."""
        now, before = self.now, self.before
        if now.errors is not None and now.errors.are_of(before.errors):
            # One quantised base in both: its errors cancel. What was added to it is known better.
            now, before = replace(now, errors=None), replace(before, errors=None)
        sums: tuple[Stored, ...] = (*now.stored * (1 + self.merges), *before.stored)
        if self.adapter is None:
            return sums
        product = (self.adapter.product(), self.now.dtype)
        return (*sums, *((product,) * product_roundings(self.adapter.rank_bound, self.now.dtype)))

    @property
    def rounded_in_training(self) -> tuple[Stored, int] | None:
        """What the optimizer steps rounded, and how often beyond `stored`; None for never."""
        if self.now.errors is not None:
            return None
        dtype, times = training_roundings(self.now.dtype, self.trained_steps)
        return ((self.now.values, dtype), times) if times > 0 else None


def training_roundings(dtype: str, steps: int) -> tuple[str, int]:
    """(In which dtype, how often) `steps` optimizer steps round a weight, storing it aside.

    Storing a float32 or float64 weight rounds nothing that the last step has not rounded. Shorter
    dtypes are roundings of a float32 weight; pure bfloat16 training is not told from it.

    Example:
        >>> training_roundings("float32", 100), training_roundings("bfloat16", 100)
        (('float32', 99), ('float32', 100))
    """
    if dtype in ("float32", "float64"):
        return dtype, max(steps - 1, 0)
    return "float32", steps


def trained_steps(run: Run, name: str, before: int, now: int) -> int:
    """How many optimizer steps trained a weight in place between two records.

    None of those of a weight that an adapter changes, or that is frozen. Where the run does not
    tell, a weight without an adapter counts as trained.
    """
    trains = run.trains(name)
    if trains is None:
        adapted = schema.ADAPTER in run.stored_kinds and any(
            run.read(name, step, schema.ADAPTER) is not None for step in (before, now)
        )
        trains = not adapted
    return now - before if trains else 0


def product_roundings(rank: int, dtype: str) -> int:
    """How often a product B·A of this rank counts as rounded to `dtype`, see `Difference`.

    Products in a shorter dtype are summed up in float32 and rounded once.
    """
    return (rank + 2) // 2 if dtype in ("float32", "float64") else 1


def is_finite(
    matrix: Matrix | Difference | Spectrum,
    array_is_finite: Callable[[np.ndarray], bool] = lambda array: bool(np.isfinite(array).all()),
) -> bool:
    """Whether all the numbers that a matrix is made of are finite."""
    if isinstance(matrix, Factored):
        parts = [matrix.left, matrix.right]
    elif isinstance(matrix, Spectrum):
        parts = [matrix.s]
    elif isinstance(matrix, Dense):
        parts = [matrix.values]
    else:
        parts = [matrix.now.values, matrix.before.values]
    return all(array_is_finite(part) for part in parts)


def reference_step(run: Run, name: str, step: int, kind: str) -> int | None:
    """The step whose weight a derived kind subtracts, None where there is no such step.

    - `update`: the run's previous record, or what a view of the run puts in its place
      (`Run.update_reference`). It is the same whichever steps an analysis selects, so that the
      value does not depend on the selection.
    - `displacement`: the first record.
    - `optimizer_update`: the step before, if that is recorded.
    - `cycle_update`: the latest record at or before the last merge; the first record where there
      was no merge yet. None for a weight without an adapter.
    """
    steps = run.steps
    position = int(np.searchsorted(steps, step))
    if position == 0:
        return None
    if kind == schema.UPDATE:
        return run.update_reference(step)
    if kind == schema.OPTIMIZER_UPDATE:
        return step - 1 if steps[position - 1] == step - 1 else None
    if kind == schema.CYCLE_UPDATE:
        if run.read(name, step, schema.ADAPTER) is None:
            return None  # nothing is ever merged into this weight
        return cycle_start(run, name, step)
    return int(steps[0])


def cycle_start(run: Run, name: str, step: int) -> int:
    """The latest record at or before the last merge into a weight, else the first record."""
    before = max(int(np.searchsorted(run.steps, step)) - 1, 0)
    while before > 0 and not run.merges_between(name, int(run.steps[before]), step):
        before -= 1
    return int(run.steps[before])


def difference_rank_bound(run: Run, name: str, before: int, now: int) -> int | None:
    """The largest rank of W_now - W_before, None where nothing bounds it.

    Adapters bound it (`cycles_rank_bound`), and so does an optimizer that moves a weight within a
    projector's directions alone: GaLore, whose recording has an event at each new projector.
    """
    if schema.ADAPTER not in run.stored_kinds:
        return _projections_rank_bound(run, name, before, now)
    if run.trains(name):  # the base itself, beside its adapter
        return None
    adapter, earlier = (run.read(name, step, schema.ADAPTER) for step in (now, before))
    if not isinstance(adapter, Factored) or not isinstance(earlier, Factored):
        return None
    merged_there = any(event.kind == schema.MERGE and event.step == before for event in run.events)
    is_zero = not (earlier.left.any() and earlier.right.any())
    bound = cycles_rank_bound(
        adapter.rank_bound,
        0 if is_zero else earlier.rank_bound,
        run.merges_between(name, before, now),
        merged_there=merged_there,
    )
    return min(bound, *adapter.shape)


def cycles_rank_bound(rank: int, earlier: int, merges: int, *, merged_there: bool) -> int:
    """The largest rank of a difference of two weights between which only adapters changed.

    Every merge in between adds the s·B·A of one cycle, of rank r, and the present adapter adds one
    more: r·(merges + 1). The earlier adapter is subtracted, which adds its rank, too. It does not
    if it was merged at that very step: then it cancels against the first merge. It cancels only if
    the merge added what it should, so a merge that leaves out s exceeds this bound.

    Args:
        rank: r of the present adapter.
        earlier: the rank of the adapter at the earlier step, 0 where that adapter was zero.
        merges: how many there were from the earlier step to the present one.
        merged_there: whether the first of them happened at the earlier step.
    """
    return rank * merges if merged_there else rank * (merges + 1) + earlier


def projectors(run: Run, name: str) -> dict[int, int]:
    """Step -> rank of each projector within whose directions alone the next steps move a weight.

    It is in use from the step after until the step at which the next one is taken.
    """
    return {  # a run that was resumed may have told one twice
        event.step: event.attrs["rank"]
        for event in run.events
        if event.kind == schema.PROJECTION
        and event.attrs.get("bounded") is True
        and isinstance(event.attrs.get("rank"), int)
        and isinstance(event.attrs.get("matrices"), list)
        and name in event.attrs["matrices"]
    }


def _projections_rank_bound(run: Run, name: str, before: int, now: int) -> int | None:
    ranks = {step: rank for step, rank in projectors(run, name).items() if step < now}
    used = [rank for step, rank in ranks.items() if step >= before]
    if before not in ranks:  # the projector before goes on
        earlier = [step for step in ranks if step < before]
        if not earlier:
            return None
        used.append(ranks[max(earlier)])
    info = run.matrices[name]
    return min(sum(used), info.rows, info.cols)


def accumulated_adapter(run: Run, name: str, step: int) -> Factored | None:
    """Σ s·B·A over the cycles that ended before `step` and the present one, as factors.

    The factors of K cycles stand side by side, [s₁B₁ … s_K B_K] and [A₁; …; A_K], so that the
    sum has rank K·r at most and is never multiplied out. It is what the adapters added to the
    weight, without the rounding that each merge causes.

    Returns:
        None where the weight has no adapter at this step, or a merge happened at a step that
        was not recorded, so that its factors are unknown.
    """
    merges = [each.step for each in run.events if each.kind == schema.MERGE and each.step < step]
    if any(merge not in run.steps for merge in merges):
        return None
    cycles = [run.read(name, each, schema.ADAPTER) for each in (*merges, step)]
    factors = [each for each in cycles if isinstance(each, Factored)]
    if len(factors) < len(cycles):
        return None
    left = np.hstack([each.scale * each.left.astype(np.float64) for each in factors])
    right = np.vstack([each.right.astype(np.float64) for each in factors])
    return Factored(left, right, 1.0, factors[-1].dtype)
