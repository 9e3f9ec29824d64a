"""How much of each gradient of an adapted weight the adapter can express, over a recording."""

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
from dynamics.runs.matrix_cache import CachedRun
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
    """Which factors a gradient was compared with. A record's own are those after its step."""

    NONE = 0  # there is no gradient or no adapter, or one of them holds NaN or Inf
    BEFORE = 1  # those of the record one step before: the gradient was taken at these
    RESET = 2  # a merge and a reset came in between: B = 0, and A of the record itself
    AFTER = 3  # those of the record itself, one optimizer step later than the gradient


def gradient_expressibility(
    run: Run | str | Path,
    *,
    steps: Iterable[int] | None = None,
    select: str | Sequence[str] | None = None,
) -> xr.Dataset:
    """The share of each gradient that its adapter can express, over the steps of a recording.

    The gradient of record t was taken at the weights after t − 1 steps, but the factors in record t
    are those after t steps. The variable `factors` says which factors were used:

    - `before`: record t − 1 exists, and nothing was merged in between. Its factors are exactly
      those at which the gradient was taken. To have such records, record pairs of steps, for
      example with every=lambda t: t % 100 in (0, 99).
    - `reset`: a merge stands at t − 1. ReLoRA sets B to zero and deletes its Adam state, so dL/dA
      is zero in step t. The A of record t then spans the same space as the A of the gradient
      (weight decay only scales it). This is exact, too.
    - `after`: otherwise, the factors of record t. One step has moved them towards this gradient.
      The share is therefore a little too high where one step is large compared with the factors,
      as it is soon after a reset.

    Args:
        run: a recording that holds adapters and the gradients of their weights, or its path.
        steps: steps of the run; by default all that have a gradient.
        select: globs over parameter names ("*_proj" matches with or without ".weight").

    Returns:
        A Dataset with dims (step, matrix). Its variables are the attributes of
        `directions.adapter_subspace.Expressibility`, NaN where `factors` is `none`, and `factors`.
        Left and right factor are those of the weight as it is stored: B and A where it is stored
        (out, in), Aᵀ and Bᵀ where it is stored (in, out).

    Raises:
        MissingError: the run has no adapters or no gradients, it holds only spectra, it lacks one
            of the steps, or `select` matches no adapted matrix.
        FormatError: `run` cannot be opened, or one of its files is damaged.

    Example:
        >>> shares = dy.gradient_expressibility("run.zarr", select="*.0.*q_proj")
        >>> shares["share"].dims
        ('step', 'matrix')
        >>> bool((shares["share"] <= shares["best_share"] + 1e-12).all())
        True
    """
    run = CachedRun(run if isinstance(run, Run) else open_run(run))
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
            shares, factors[t, m] = _shares(run, info.name, step)
            if shares is not None:
                for name, value in dataclasses.asdict(shares).items():
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


def _shares(run: Run, name: str, step: int) -> tuple[Expressibility | None, FactorsOf]:
    gradient = run.read(name, step, schema.GRADIENT)
    adapter, which = _factors(run, name, step)
    if gradient is None or adapter is None or not (is_finite(gradient) and is_finite(adapter)):
        return None, FactorsOf.NONE
    assert not isinstance(gradient, Factored)
    return expressibility(gradient.values, adapter.left, adapter.right), which


def _factors(run: Run, name: str, step: int) -> tuple[Factored | None, FactorsOf]:
    """The best known factors for the gradient of record `step`, and which they are."""
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
