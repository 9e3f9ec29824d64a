"""Updates between other records than neighbouring ones: a given lag, or what several runs share."""

from bisect import bisect_left
from collections.abc import Collection, Mapping

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError
from dynamics.runs.run import Matrix, Run, Spectrum, abridged
from dynamics.runs.run_view import RunView

# step -> the step whose weight the update there subtracts, None where there is none
References = Mapping[int, int | None]


class IntervalRun(RunView):
    """A run whose updates begin at given records.

    Spectra of updates that were measured while the model trained stay what they are: they are
    there where the recorded interval is the one that is asked for.
    """

    def __init__(self, inner: Run, references: References):
        super().__init__(inner)
        self._references = references

    def update_reference(self, step: int) -> int | None:
        """See `Run.update_reference`."""
        return self._references.get(int(step))

    def read_spectrum(self, name: str, step: int, kind: str) -> Spectrum | None:
        """See `Run.read_spectrum`."""
        if kind == schema.UPDATE and not self.is_recorded(step):
            return None
        return self.inner.read_spectrum(name, step, kind)

    def is_recorded(self, step: int) -> bool:
        """Whether the update at this step begins where it does in the run itself."""
        return self.update_reference(step) == self.inner.update_reference(step)

    # Forwarded, because `read` is: a fused matrix is read once for all its parts.
    def group_of(self, name: str) -> tuple[str, ...]:
        """See `Run.group_of`."""
        return self.inner.group_of(name)

    def read_group(self, name: str, step: int, kind: str) -> dict[str, Matrix | None]:
        """See `Run.read_group`."""
        return self.inner.read_group(name, step, kind)


def own_references(run: Run) -> dict[int, int | None]:
    """Where the update at each record of a run begins."""
    return {step: run.update_reference(step) for step in run.steps.tolist()}


def lagged(run: Run, lag: int) -> IntervalRun:
    """The run with updates over `lag` optimizer steps, undefined where W_{t - lag} is not recorded.

    Raises:
        DynamicsError: `lag` is less than one.
        MissingError: the run has no two records that are so far apart.
    """
    if lag < 1:
        raise DynamicsError(f"lag is {lag}; an update takes one optimizer step or more.")
    steps = set(run.steps.tolist())
    view = IntervalRun(run, {step: step - lag if step - lag in steps else None for step in steps})
    defined = [step for step in run.steps.tolist() if view.update_reference(step) is not None]
    if not defined:
        raise MissingError(
            f"{run.path} has no two records that are lag={lag} (--lag) optimizer steps apart; it "
            f"has {abridged(run.steps.tolist())}."
        )
    if schema.UPDATE in run.spectrum_kinds and not any(map(view.is_recorded, defined)):
        raise MissingError(
            f"{run.path} holds the singular values of updates from each record to the next one, "
            f"and none is over lag={lag} (--lag) optimizer steps; record matrices, or leave "
            "lag out."
        )
    return view


def common_references(
    own: Mapping[str, References], fixed: Collection[str]
) -> dict[str, dict[int, int | None]]:
    """Where updates of several runs begin, so that at each step they are over one interval.

    At a step, the runs that have an update there take the last step before it that all of them
    have recorded. Where there is no such step, each keeps its own interval. A run that does not
    have the step, or begins with it, has no say.

    Args:
        own: label -> where the updates of the run begin by themselves, for every recorded step.
        fixed: the labels whose intervals cannot be changed. Where they agree on an interval that
            all others have recorded, it is theirs.
    """
    found = {label: dict(references) for label, references in own.items()}
    shared: dict[tuple[str, ...], list[int]] = {}  # group of runs -> steps that all of it have
    for step in sorted({step for references in own.values() for step in references}):
        group = tuple(label for label, each in own.items() if each.get(step) is not None)
        if len(group) < 2:
            continue
        if group not in shared:
            shared[group] = sorted(set.intersection(*(set(own[label]) for label in group)))
        steps = shared[group]
        position = bisect_left(steps, step)
        before = steps[position - 1] if position else None
        given = {own[label][step] for label in group if label in fixed}
        if len(given) == 1:
            (start,) = given
            assert start is not None
            at = bisect_left(steps, start)
            before = start if at < len(steps) and steps[at] == start else before
        if before is not None:
            for label in group:
                found[label][step] = before
    return found
