"""What an analysis measures: the kinds, steps, matrices and metrics chosen of a run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, TypeVar

from dynamics import schema
from dynamics.components import COMPONENTS, DEFAULT_COMPONENTS, check_components
from dynamics.components.parameters import Measurable
from dynamics.errors import DynamicsError, MissingError, near
from dynamics.metrics import Metric, select_metrics
from dynamics.runs.dependencies import TracedRun
from dynamics.runs.intervals import lagged
from dynamics.runs.parameter_names import matches
from dynamics.runs.run import MatrixInfo, Run, abridged

Item = TypeVar("Item")
# Steps as the command line takes them, "0,100,200:400", or one after the other.
Steps = str | Iterable[int]


class ChosenMatrix(NamedTuple):
    """A matrix to measure: the component it belongs to, what it is, and how it is read."""

    component: str
    info: MatrixInfo
    read: Measurable


@dataclass(frozen=True)
class Selection:
    """What is measured of a run, known before anything is read.

    Attributes:
        run: the run; the matrices are read through it.
        metrics: name -> metric.
        kinds: in the order of the result.
        steps: ascending.
        matrices: in the order of the result.
        lag: the optimizer steps that an update is over, None for those between its records.
    """

    run: TracedRun
    metrics: dict[str, Metric]
    kinds: list[str]
    steps: list[int]
    matrices: list[ChosenMatrix]
    lag: int | None = None

    @property
    def of_study(self) -> bool:
        """Whether a metric needs `study_spectrum`."""
        return any(metric.of_study for metric in self.metrics.values())


class SelectionOptions(TypedDict, total=False):
    """What to measure, as keyword arguments; see `analyze`."""

    metrics: Iterable[str] | None
    components: Iterable[str] | None
    kinds: Iterable[str] | None
    steps: Steps | None
    select: str | Sequence[str] | None
    lag: int | None


def selection_of(
    run: Run,
    *,
    metrics: Iterable[str] | None = None,
    components: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    steps: Steps | None = None,
    select: str | Sequence[str] | None = None,
    lag: int | None = None,
) -> Selection:
    """What `analyze` measures of a run when it is called with these arguments.

    Raises:
        MissingError: an unknown metric, component, kind or step, or nothing is selected; or no two
            records are `lag` steps apart.
        DynamicsError: a text of `steps` holds something else than steps and ranges; or `lag` is
            less than one.
    """
    table = select_metrics(metrics)
    names = check_components(_listed("components", components) or list(DEFAULT_COMPONENTS))
    chosen_kinds = _kinds(run, _listed("kinds", kinds))
    chosen_steps = run.steps.tolist() if steps is None else sorted(set(_steps(run, steps)))
    if not chosen_steps:
        raise MissingError(f"{run.path} has no records yet; there is nothing to measure.")
    if lag is not None:
        run = _lagged(run, lag, chosen_kinds)
    for component in names:
        if component not in DEFAULT_COMPONENTS:
            run.require_matrices(f"Component {component}")
    traced = TracedRun(run)
    offered = [
        ChosenMatrix(component, info, read)
        for component in names
        for info, read in COMPONENTS[component](traced)
    ]
    chosen = [each for each in offered if select is None or matches(each.info.name, select)]
    if not chosen:
        raise MissingError(
            f"No matrix of {run.path} matches {select!r}{_near(select, offered)}; "
            f"it has {', '.join(each.info.name for each in offered[:4])}, ..."
        )
    return Selection(traced, table, chosen_kinds, chosen_steps, chosen, lag)


def _near(select: str | Sequence[str] | None, offered: Sequence[ChosenMatrix]) -> str:
    """The name of a matrix, or the last part of one, that is most like a pattern."""
    names = [each.info.name for each in offered]
    ends = [name.removesuffix(".weight").rpartition(".")[2] for name in names]
    patterns = [select] if isinstance(select, str) else list(select or ())
    found = (near(each.strip("*"), [*names, *ends]) for each in patterns)
    return next(filter(None, found), "")


def _lagged(run: Run, lag: int, kinds: list[str]) -> Run:
    if schema.UPDATE not in kinds:
        raise MissingError(
            f"lag={lag} (--lag) says which updates to measure, and {schema.UPDATE} is not among "
            f"the kinds ({', '.join(kinds)}); add it, or leave lag out."
        )
    return lagged(run, lag)


class StepRange(NamedTuple):
    """A part of "0,100,200:400".

    Attributes:
        text: as it was written.
        first: the first step, None where it was left out.
        last: the last step, likewise; it belongs to the range.
    """

    text: str
    first: int | None
    last: int | None

    def of(self, run: Run) -> list[int]:
        """The steps of the run in this range."""
        return [
            step
            for step in run.steps.tolist()
            if (self.first is None or self.first <= step)
            and (self.last is None or step <= self.last)
        ]


def steps_so_far(run: Run, steps: Steps | None) -> list[int] | None:
    """The steps of `steps` that a run in progress has by now, None for all."""
    if steps is None:
        return None
    if isinstance(steps, str):
        return [step for each in step_ranges(steps) for step in each.of(run)]
    return [int(step) for step in steps if step in run.steps]


def step_ranges(text: str) -> list[StepRange]:
    """The parts of "0,100,200:400".

    Raises:
        MissingError: there are none.
        DynamicsError: a part is neither a step nor a range.
    """
    parts = _listed("steps", [part.strip() for part in text.split(",") if part.strip()])
    return [_step_range(part) for part in parts or ()]


def _step_range(part: str) -> StepRange:
    first, colon, last = part.partition(":")
    try:
        if not colon:
            return StepRange(part, int(part), int(part))
        return StepRange(part, int(first) if first else None, int(last) if last else None)
    except ValueError as error:
        raise DynamicsError(
            f"steps (--steps) takes numbers and ranges FIRST:LAST, found {part!r}."
        ) from error


def _steps(run: Run, steps: Steps) -> list[int]:
    """The steps of `steps`; a range takes those that the run has in it."""
    if not isinstance(steps, str):
        return [run.check_step(int(step)) for step in _listed("steps", steps) or ()]
    chosen: list[int] = []
    for each in step_ranges(steps):
        if ":" not in each.text and each.first is not None:
            chosen.append(run.check_step(each.first))
            continue
        within = each.of(run)
        if not within:
            raise MissingError(
                f"{run.path} has no step in {each.text}; it has {abridged(run.steps.tolist())}."
            )
        chosen += within
    return chosen


def _listed(argument: str, items: Iterable[Item] | None) -> list[Item] | None:
    listed = None if items is None else list(items)
    if listed == []:
        raise MissingError(
            f"{argument} (--{argument}) is empty: there is nothing to measure; leave it out for "
            "all."
        )
    return listed


def _kinds(run: Run, kinds: list[str] | None) -> list[str]:
    if kinds is None:
        if run.absent_kinds:  # to measure an incomplete run is the user's decision
            raise MissingError(next(iter(run.absent_kinds.values())))
        return list(run.kinds)
    kinds = list(dict.fromkeys(kinds))
    for kind in kinds:
        if kind not in schema.KINDS:
            raise MissingError(
                f"No kind {kind!r}{near(kind, schema.KINDS)}; known: {', '.join(schema.KINDS)}."
            )
        if kind not in run.kinds:
            reason = run.absent_kinds.get(
                kind, f"{run.path} has no {kind} matrices; it has {', '.join(run.kinds)}."
            )
            raise MissingError(reason)
    return kinds
