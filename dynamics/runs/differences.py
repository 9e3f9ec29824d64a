"""Kinds that are made from weights: differences of two stored matrices, and sums of adapters."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from dynamics import schema
from dynamics.runs.run import Dense, Factored, Matrix, Run, Spectrum, Stored

Array = Any  # of NumPy or torch


@dataclass(frozen=True)
class Difference:
    """now - before, computed in float64.

    Its noise is the rounding of both terms, and of every merge in between: each stored
    W + s·B·A rounds the weight anew. The products s·B·A were rounded, too, before they were added:
    see `rounded_products`. The errors of one quantised base are in both terms and cancel.

    A weight that is trained in place is rounded by each optimizer step, too: T + 1 roundings are
    behind a difference over T steps. Where a dtype shorter than float32 is stored, they are those
    of float32, because such weights are trained with a float32 copy.

    Attributes:
        now: the later matrix.
        before: the earlier one.
        merges: how often an adapter was merged into the weight between the two.
        rank_bound: the largest rank it can have, where adapters alone moved the weight.
        adapters: what `now` and `before` are sums of, beside their bases; None for no adapter.
        trained_steps: how many optimizer steps trained the weight in place between the two.
    """

    now: Dense
    before: Dense
    merges: int = 0
    rank_bound: int | None = None
    adapters: tuple[Factored | None, Factored | None] = (None, None)
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
        known = self.without_common_errors()
        return (*known.rounded_since, *known.before.stored)

    @property
    def rounded_since(self) -> tuple[Stored, ...]:
        """Those of `stored` that were rounded after `before` was: `now`, merges and products."""
        sums = self.now.stored * (1 + self.merges)
        adapter = self.adapters[0] or self.adapters[1]
        if adapter is None:
            return sums
        products = [each and each.product() for each in self.adapters]
        rounded = (rounded_products(self.values, *products, merges=self.merges), self.now.dtype)
        times = product_roundings(adapter.rank_bound, adapter.scale, self.now.dtype)
        return (*sums, *((rounded,) * times))

    def without_common_errors(self) -> "Difference":
        """The same without the errors of one quantised base in both; itself where there is none.

        They cancel. What was added to the base is known better.
        """
        if self.now.errors is None or not self.now.errors.are_of(self.before.errors):
            return self
        now, before = replace(self.now, errors=None), replace(self.before, errors=None)
        return replace(self, now=now, before=before)

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


def adapters_of(
    run: Run, name: str, now: int, before: int
) -> tuple[Factored | None, Factored | None]:
    """The adapters of a weight at the later and at the earlier of two records."""
    if schema.ADAPTER not in run.stored_kinds:
        return None, None
    last, first = (run.read(name, step, schema.ADAPTER) for step in (now, before))
    return (
        last if isinstance(last, Factored) else None,
        first if isinstance(first, Factored) else None,
    )


def rounded_products(
    change: Array, now: Array | None, before: Array | None, *, merges: int
) -> Array:
    """One matrix whose rounding has the variances of that of all products behind a difference.

    These are the s·B·A of the later weight, that of the earlier one, and those that were merged in
    between. Roundings of different products are independent, so their variances add up, and a
    variance goes with the square of what is rounded: the matrix is the root of the sum of squares.
    What the merges added together, change - now + before, counts as one product. This is right for
    one merge, and for several whose products are orthogonal. It is too much where they agree, and
    too little where later ones take back what earlier ones added.

    Args:
        change: (rows, cols) float64, the later weight minus the earlier one; array or tensor.
        now: the product in the later weight, None where that has no adapter.
        before: the product in the earlier weight, likewise.
        merges: how many merges there were in between.
    """
    merged = change if now is None else change - now
    merged = merged if before is None else merged + before
    products = [now, before, merged if merges else None]
    return reduce(_hypot, [each for each in products if each is not None])


def _hypot(x: Array, y: Array) -> Array:
    return np.hypot(x, y) if isinstance(x, np.ndarray) else x.hypot(y)  # squares may overflow


def product_roundings(rank: int, scale: float, dtype: str) -> int:
    """How often a product s·(B·A) of this rank counts as rounded to `dtype`.

    float32 and float64 round B·A at each of its r partial sums, which makes (r + 1)/2 times the
    variance of one rounding. Products in a shorter dtype are summed up in float32 and rounded once.
    The scale s rounds once more, unless it is a power of two.

    Example:
        >>> product_roundings(8, 2.0, "float32"), product_roundings(8, 1.5, "bfloat16")
        (5, 2)
    """
    once = math.frexp(scale)[0] not in (0.5, -0.5)
    return (((rank + 2) // 2) if dtype in ("float32", "float64") else 1) + once


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
