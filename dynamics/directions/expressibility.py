"""How much of the gradient that reaches each adapted weight its adapter could express."""

import dataclasses
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.analysis.results import matrix_coords
from dynamics.directions.adapter_subspace import Expressibility, expressibility
from dynamics.errors import MissingError
from dynamics.formats import open_run
from dynamics.runs.differences import is_finite
from dynamics.runs.parameter_names import matches
from dynamics.runs.run import Factored, Run

_LONG_NAMES = {
    "share": "share of the gradient that the adapter can express",
    "left_share": "share that the right factor alone can express, the left one fixed",
    "right_share": "share that the left factor alone can express, the right one fixed",
    "best_share": "share that the best factors of this rank could express",
    "best_one_sided_share": "share that one factor could express beside the best other one",
    "random_share": "share that random factors would express on average",
    "left_rank": "rank of the left factor",
    "right_rank": "rank of the right factor",
}


class FactorsOf(IntEnum):
    """Which factors a gradient was compared with; the record's own are those after its step."""

    NONE = 0  # no gradient, no adapter, or NaN in one of them
    BEFORE = 1  # the record one step before: the factors that the gradient was taken at
    RESET = 2  # a merge and reset came between: B was zero and A is the record's
    AFTER = 3  # the record's own, one optimizer step later than the gradient


def gradient_expressibility(
    run: Run | str | Path,
    *,
    steps: Iterable[int] | None = None,
    select: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """The shares of each gradient that its adapter can express, over the steps of a recording.

    The gradient of record t was taken at the weights after t − 1 steps, and the factors of
    record t are those after t steps. `factors` says what was compared:

    - `before`: record t − 1 exists and nothing was merged in between; its factors are exactly
      those of the gradient. Record pairs of steps for it, e.g. every=lambda t: t % 100 in (0, 99).
    - `reset`: a merge stands at t − 1. ReLoRA resets B to zero and forgets its Adam state; dL/dA
      is then zero, and the record's A spans what the gradient's A did (weight decay only scales
      it). Exact too.
    - `after`: else the record's own factors. One step has moved them towards this gradient, so
      that the share is a little high where a step is large beside the factors, as soon after a
      reset.

    Args:
        run: a recording that holds adapters and the gradients of their weights, or its path.
        steps: of the run; all that have a gradient by default.
        select: globs over parameter names.

    Returns:
        A Dataset with dims (step, matrix): the attributes of
        `metrics.adapter_subspace.Expressibility` as variables, with left and right factor as
        the weight is stored: B and A for (out, in), Aᵀ and Bᵀ for (in, out); and `factors`.

    Raises:
        MissingError: the run has no adapters or no gradients, or nothing is selected.
    """
    run = run if isinstance(run, Run) else open_run(run)
    run.require_matrices("The expressibility of gradients")
    for kind, advice in (
        (schema.ADAPTER, "only runs with LoRA adapters can be measured"),
        (schema.GRADIENT, "record 'probed_gradient'"),
    ):
        if kind not in run.stored_kinds:
            raise MissingError(
                f"{run.path} has no {kind} matrices; it has {', '.join(run.kinds)}: {advice}."
            )
    chosen = [
        info
        for name, info in run.matrices.items()
        if (select is None or matches(name, select)) and _is_adapted(run, name)
    ]
    if not chosen:
        raise MissingError(f"No adapted matrix of {run.path} matches {select!r}.")
    wanted = run.steps.tolist() if steps is None else sorted({run.check_step(s) for s in steps})
    shape = len(wanted), len(chosen)
    values = {name: np.full(shape, np.nan) for name in _LONG_NAMES}
    factors = np.zeros(shape, dtype=np.int8)
    for m, info in enumerate(chosen):
        for t, step in enumerate(wanted):
            measured, factors[t, m] = _measured(run, info.name, step)
            if measured is not None:
                for name, value in dataclasses.asdict(measured).items():
                    values[name][t, m] = value
    used = (
        np.ones(len(wanted), dtype=bool)
        if steps is not None
        else (factors != FactorsOf.NONE).any(axis=1)
    )
    dims = (schema.STEP, schema.MATRIX)
    variables: dict[str, tuple] = {
        name: (dims, array[used], {"long_name": _LONG_NAMES[name], "units": "1"})
        for name, array in values.items()
    }
    variables["factors"] = (
        dims,
        factors[used],
        {
            "long_name": "which factors the gradient was compared with",
            "flag_values": [int(each) for each in FactorsOf],
            "flag_meanings": " ".join(each.name.lower() for each in FactorsOf),
        },
    )
    return xr.Dataset(
        variables,
        coords={
            schema.STEP: np.array(wanted, dtype=np.int64)[used],
            **matrix_coords([("parameters", info) for info in chosen]),
        },
        attrs={"source": run.path},
    )


def _is_adapted(run: Run, name: str) -> bool:
    return any(run.read(name, step, schema.ADAPTER) is not None for step in run.steps.tolist())


def _measured(run: Run, name: str, step: int) -> tuple[Expressibility | None, FactorsOf]:
    gradient = run.read(name, step, schema.GRADIENT)
    adapter, which = _factors(run, name, step)
    if gradient is None or adapter is None or not (is_finite(gradient) and is_finite(adapter)):
        return None, FactorsOf.NONE
    assert not isinstance(gradient, Factored)
    return expressibility(gradient.values, adapter.left, adapter.right), which


def _factors(run: Run, name: str, step: int) -> tuple[Factored | None, FactorsOf]:
    """The factors that the gradient of record `step` was taken at, as nearly as they are known."""
    merged = run.merges_between(name, step - 1, step) > 0
    if not merged and step - 1 in run.steps:
        before = run.read(name, step - 1, schema.ADAPTER)
        if isinstance(before, Factored):
            return before, FactorsOf.BEFORE
    after = run.read(name, step, schema.ADAPTER)
    if not isinstance(after, Factored):
        return None, FactorsOf.NONE
    if not merged:
        return after, FactorsOf.AFTER
    reset = "right" if after.transposed else "left"
    zero = np.zeros_like(getattr(after, reset))
    return dataclasses.replace(after, **{reset: zero}), FactorsOf.RESET
