"""The component `parameters`: every two-dimensional parameter, in every kind."""

from collections.abc import Callable

from dynamics import schema
from dynamics.components.rank_bounds import difference_rank_bound
from dynamics.errors import FormatError
from dynamics.runs.differences import (
    Difference,
    accumulated_adapter,
    adapters_of,
    reference_step,
    trained_steps,
)
from dynamics.runs.run import Dense, Matrix, MatrixInfo, Run, Spectrum
from dynamics.schema import Status

# (step, kind) -> the matrix, or its spectrum, or why there is none
Measurable = Callable[[int, str], Matrix | Difference | Spectrum | Status]


def parameters(run: Run) -> list[tuple[MatrixInfo, Measurable]]:
    """The two-dimensional parameters of a run, each with its reader."""
    return [(info, _reader(run, name)) for name, info in run.matrices.items()]


def _reader(run: Run, name: str) -> Measurable:
    def matrix(step: int, kind: str) -> Matrix | Difference | Spectrum | Status:
        if kind in run.spectrum_kinds:
            nothing = _is_undefined(run, step, kind)
            found = run.read_spectrum(name, step, kind)
            return found or (Status.UNDEFINED if nothing else Status.NOT_RECORDED)
        if kind == schema.ACCUMULATED_ADAPTER:
            return accumulated_adapter(run, name, step) or Status.NOT_RECORDED
        if kind not in schema.DIFFERENCES:
            stored = run.read(name, step, kind)
            return Status.NOT_RECORDED if stored is None else stored
        before_step = reference_step(run, name, step, kind)
        if before_step is None:
            return Status.UNDEFINED
        before, now = (run.read(name, each, schema.WEIGHT) for each in (before_step, step))
        if before is None or now is None:
            return Status.NOT_RECORDED
        assert isinstance(now, Dense)
        assert isinstance(before, Dense)
        if before.shape != now.shape:
            raise FormatError(
                f"{run.path} has {name} in shape {before.shape} at step {before_step} and in shape "
                f"{now.shape} at step {step}, so there is no {kind}; measure kinds=['weight'] "
                "(--kinds weight), or the steps after the change."
            )
        merges = run.merges_between(name, before_step, step)
        bound = difference_rank_bound(run, name, before_step, step)
        adapters = adapters_of(run, name, step, before_step)
        steps = trained_steps(run, name, before_step, step)
        return Difference(now, before, merges, bound, adapters, steps)

    return matrix


def _is_undefined(run: Run, step: int, kind: str) -> bool:
    """Whether a difference whose spectrum would be recorded has nothing to subtract."""
    if kind == schema.UPDATE:
        return run.update_reference(step) is None
    return kind in schema.DIFFERENCES and step == run.steps[0]
