"""What an analysis measures: the kinds, steps, matrices and metrics chosen of a run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from dynamics import schema
from dynamics.components import COMPONENTS, DEFAULT_COMPONENTS, check_components
from dynamics.components.parameters import Measurable
from dynamics.errors import MissingError
from dynamics.metrics import Metric, select_metrics
from dynamics.runs.dependencies import TracedRun
from dynamics.runs.parameter_names import matches
from dynamics.runs.run import MatrixInfo, Run

Item = TypeVar("Item")


class Chosen(NamedTuple):
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
    """

    run: TracedRun
    metrics: dict[str, Metric]
    kinds: list[str]
    steps: list[int]
    matrices: list[Chosen]


def selected(
    run: Run,
    *,
    metrics: Iterable[str] | None = None,
    components: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    steps: Iterable[int] | None = None,
    select: str | Sequence[str] | None = None,
) -> Selection:
    """The selection that `analyze` describes.

    Raises:
        MissingError: an unknown metric, component, kind or step, or nothing selected.
    """
    table = select_metrics(metrics)
    names = check_components(_listed("components", components) or list(DEFAULT_COMPONENTS))
    chosen_kinds = _kinds(run, _listed("kinds", kinds))
    wanted_steps = _listed("steps", steps)
    chosen_steps = (
        sorted({run.check_step(int(step)) for step in wanted_steps})
        if wanted_steps is not None
        else run.steps.tolist()
    )
    if not chosen_steps:
        raise MissingError(f"{run.path} has no records yet; nothing to measure.")
    for component in names:
        if component not in DEFAULT_COMPONENTS:
            run.require_matrices(f"Component {component}")
    traced = TracedRun(run)
    offered = [
        Chosen(component, info, read)
        for component in names
        for info, read in COMPONENTS[component](traced)
    ]
    chosen = [each for each in offered if select is None or matches(each.info.name, select)]
    if not chosen:
        raise MissingError(
            f"No matrix of {run.path} matches {select!r}; "
            f"it has {', '.join(each.info.name for each in offered[:4])}, ..."
        )
    return Selection(traced, table, chosen_kinds, chosen_steps, chosen)


def _listed(argument: str, items: Iterable[Item] | None) -> list[Item] | None:
    found = None if items is None else list(items)
    if found == []:
        raise MissingError(f"{argument} is empty: nothing to measure; leave it out for all.")
    return found


def _kinds(run: Run, kinds: list[str] | None) -> list[str]:
    if kinds is None:
        if run.absent_kinds:  # an incomplete run is the user's decision, not ours
            raise MissingError(next(iter(run.absent_kinds.values())))
        return list(run.kinds)
    kinds = list(dict.fromkeys(kinds))
    for kind in kinds:
        if kind not in schema.KINDS:
            raise MissingError(f"No kind {kind!r}; known: {', '.join(schema.KINDS)}.")
        if kind not in run.kinds:
            reason = run.absent_kinds.get(
                kind, f"{run.path} has no {kind} matrices; it has {', '.join(run.kinds)}."
            )
            raise MissingError(reason)
    return kinds
