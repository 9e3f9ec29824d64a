"""analyze(): every metric of every matrix of a run, over its steps, as one xarray Dataset."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Unpack

import xarray as xr
from threadpoolctl import threadpool_limits

from dynamics.analysis.cache import SpectrumCache, study_key
from dynamics.analysis.execution import Execution, ExecutionOptions, execution_with
from dynamics.analysis.results import ResultBuilder
from dynamics.analysis.selection import Selection, Steps, selection_of
from dynamics.analysis.tasks import Outcome, Recall, Task, measure_cells
from dynamics.analysis.workers import TaskOutcomes, measure_by_workers
from dynamics.components import made_of
from dynamics.errors import LeftOutWarning, UnmeasuredWarning
from dynamics.formats import open_run
from dynamics.formats.hub.cost import Cost, expect
from dynamics.runs.run import MatrixInfo, Run
from dynamics.schema import Status
from dynamics.spectra.backend import Backend, NumpyBackend
from dynamics.spectra.gpu_backend import backend_for, backend_version

Progress = Callable[[int, int, str], None]
Agree = Callable[[Cost], object]

# A task should take some seconds. Then little is lost with a worker that dies, and all workers end
# at about the same time. But each task reads the matrices before its own steps and at the first
# step once more.
_TASK_FLOPS = 4e10
_FEWEST_STEPS, _MOST_STEPS = 8, 64


class StoppedError(Exception):
    """An analysis was told to stop before it was done."""


def analyze(
    run: Run | str | Path,
    *,
    metrics: Iterable[str] | None = None,
    components: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    steps: Steps | None = None,
    select: str | Sequence[str] | None = None,
    lag: int | None = None,
    progress: Progress | None = None,
    agree: Agree | None = None,
    execution: Execution | None = None,
    **options: Unpack[ExecutionOptions],
) -> xr.Dataset:
    """Measure a run.

    Args:
        run: a Run, or the path of one.
        metrics: names of `METRICS`, all of which are the default, or of `metrics.STUDY_METRICS`.
        components: names of `COMPONENTS`; `parameters` by default.
        kinds: names of `schema.KINDS`; all that the run has by default.
        steps: steps of the run, or a text of steps and ranges, "0,100,200:400"; all by default.
            `update` and `displacement` refer to the run's previous and first step, whether these
            are selected or not.
        select: globs over parameter names ("*_proj" matches with or without ".weight").
        lag: measure `update` as W_t - W_(t - lag) at each step t, where both are recorded; from
            the previous record by default, so that updates depend on how often a run was recorded.
        progress: called as progress(done, total, matrix name) while it works; done and total count
            matrices at a step, in a kind.
        agree: called with the `Cost` of a run on the hub, before its first tensor is fetched; may
            raise.
        execution: how it is carried out, see `Execution`.
        options: fields of `Execution`: cache, strict, workers, scheduler, device.

    Returns:
        A Dataset with dims (kind, step, matrix), and (..., index) for the singular values. It has
        one variable per metric, `singular_value` padded with NaN, `singular_value_error`,
        `noise_floor`, `status` (see `schema.Status`), and the run's scalars along `step`, as
        `logged_<name>` where the name is one of those above ("train/loss" is `train.loss`). NaN
        means "not measured", and `status` says why. `reference_step` (kind, step) int64 is the step
        of the weight that a difference subtracts, -1 where there is none. `attrs["problems"]` lists
        as JSON what could not be measured; each problem is also an UnmeasuredWarning.

    Raises:
        MissingError: an unknown metric, component, kind or step, or nothing is selected; or no two
            records are `lag` steps apart.
        FormatError: `run` cannot be opened, or with `strict` not read.
        DynamicsError: `cache` is damaged, or is something else; with `strict`, a matrix holds NaN
            or Inf; there are no workers, or they died too often.

    Example:
        >>> ranks = dy.analyze("run.zarr", kinds=["weight"], metrics=["effective_rank"])
        >>> ranks["effective_rank"].dims
        ('kind', 'step', 'matrix')
        >>> over_four_steps = dy.analyze("run.zarr", kinds=["update"], lag=4)
        >>> over_four_steps["reference_step"].sel(kind="update").values.tolist()
        [-1, -1, 0, 2, 4]
    """
    run = run if isinstance(run, Run) else open_run(run)
    chosen = selection_of(
        run,
        metrics=metrics,
        components=components,
        kinds=kinds,
        steps=steps,
        select=select,
        lag=lag,
    )
    return measure(chosen, execution_with(execution, options), progress=progress, agree=agree)


def measure(
    chosen: Selection,
    execution: Execution,
    *,
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
    agree: Agree | None = None,
) -> xr.Dataset:
    """What `analyze` returns for a selection.

    Args:
        chosen: what to measure.
        execution: how.
        progress: see `analyze`.
        stopped: asked again and again whether to give up: before every matrix at every step and
            kind, or with workers before every few.
        agree: see `analyze`.

    Raises:
        StoppedError: `stopped` said so; what was measured is in the cache.
    """
    version = backend_version(execution.device)
    # Before any worker starts: here is the better place to say that there is no such device, and
    # the rates that are measured now are read by all workers of this machine.
    on_cluster = execution.scheduler is not None
    backend = NumpyBackend() if on_cluster else backend_for(execution.device)
    results = ResultBuilder(chosen, version)

    def report(task: Task) -> None:
        if progress is not None:
            progress(results.done, results.total, task.name)

    cache = execution.cache
    # One BLAS thread per worker: more of them help little, get in each other's way as soon as
    # another process wants a core, and change last digits.
    with (
        nullcontext() if cache is None else SpectrumCache(cache, version) as known,
        threadpool_limits(1),
        ExitStack() as ending,
    ):
        tasks = _tasks(chosen, largest_first=not execution.is_local)
        if chosen.run.source is None:
            tasks = _new_tasks(tasks, chosen, known, results, report)
        else:
            tasks = iter(new := list(_new_tasks(tasks, chosen, known, results, lambda _: None)))
            ending.callback(expect, chosen.run, ())  # whatever happens, nothing more is fetched
            cost = _cost(chosen.run, new)
            if cost is not None and agree is not None:
                agree(cost)
        outcomes_of_tasks = (
            _in_this_process(tasks, chosen, backend, known, stopped)
            if execution.is_local
            else measure_by_workers(chosen.run.untraced, tasks, execution, stopped)
        )
        # Closed at once, and not when a traceback that holds it is forgotten: processes end then.
        with closing(outcomes_of_tasks):
            for task, outcomes in outcomes_of_tasks:
                for each in outcomes:
                    if execution.strict and each.problem is not None:
                        raise each.problem
                    if known is not None and each.content is not None:
                        for content, spectrum in each.contents.items():
                            known.put(content, spectrum)
                        cell = chosen.run.cell_key(task.component, task.name, each.step, each.kind)
                        known.put_cell(cell, each.trace, each.content)
                    results.put(task.component, task.name, each)
                report(task)
    if results.done < results.total:
        raise StoppedError(f"The analysis of {chosen.run.path} was stopped.")
    for problem in results.problems:
        warnings.warn(problem, UnmeasuredWarning, stacklevel=3)
    account = chosen.run.account
    if account is not None and (warning := account.warning()):
        warnings.warn(f"{chosen.run.path}: {warning}", LeftOutWarning, stacklevel=3)
    return results.dataset()


def cost_of(chosen: Selection, execution: Execution) -> Cost | None:
    """What measuring a selection will fetch; None for a run that does not lie on the hub."""
    if chosen.run.source is None:
        return None
    version = backend_version(execution.device)
    cache = execution.cache
    with nullcontext() if cache is None else SpectrumCache(cache, version) as known:
        tasks, results = _tasks(chosen, largest_first=False), ResultBuilder(chosen, version)
        return _cost(chosen.run, _new_tasks(tasks, chosen, known, results, lambda _: None))


def _cost(run: Run, tasks: Iterable[Task]) -> Cost | None:
    names = made_of(run)
    return expect(
        run,
        (
            (name, step, kind)
            for task in tasks
            for step, kind in task.cells
            for name in names(task.component, task.name, kind)
        ),
    )


def _tasks(chosen: Selection, *, largest_first: bool) -> Iterator[Task]:
    """The cells of the analysis: each task some steps of one matrix, in all kinds."""
    matrices = chosen.matrices
    if largest_first:  # so that no worker begins with an embedding when the others are done
        matrices = sorted(matrices, key=lambda each: -_flops(each.info))
    for each in matrices:
        at_once = ceil(_TASK_FLOPS / (_flops(each.info) * len(chosen.kinds)))
        at_once = min(max(at_once, _FEWEST_STEPS), _MOST_STEPS)
        for first in range(0, len(chosen.steps), at_once):
            steps = chosen.steps[first : first + at_once]
            cells = tuple((step, kind) for step in steps for kind in chosen.kinds)
            yield Task(each.component, each.info.name, cells, study=chosen.of_study)


def _flops(info: MatrixInfo) -> float:
    m, n = max(info.rows, info.cols), min(info.rows, info.cols)
    return float(m * n**2 + 4 * n**3)


def _new_tasks(
    tasks: Iterator[Task],
    chosen: Selection,
    known: SpectrumCache | None,
    results: ResultBuilder,
    report: Callable[[Task], None],
) -> Iterator[Task]:
    """The tasks without the cells whose spectra are known, which go into the results."""
    run = chosen.run
    for task in tasks:
        if known is None:
            yield task
            continue
        new, before = [], {}
        for step, kind in task.cells:
            cell = run.cell_key(task.component, task.name, step, kind)
            content, unchanged = known.of_cell(cell, run)
            spectrum = None if content is None else known.of_content(content)
            study = known.of_content(study_key(content)) if content and task.study else None
            outcome = Outcome(step, kind, Status.MEASURED, spectrum, content=content, study=study)
            if spectrum is not None and unchanged and (study is not None or not task.study):
                results.put(task.component, task.name, outcome)
                continue
            new.append((step, kind))
            before.update(outcome.contents)  # it may hold the same numbers: a file was touched
        if new:
            yield replace(task, cells=tuple(new), hashed=True, known=before)
        else:
            report(task)


def _in_this_process(
    tasks: Iterator[Task],
    chosen: Selection,
    backend: Backend,
    known: SpectrumCache | None,
    stopped: Callable[[], bool],
) -> TaskOutcomes:
    """The tasks one after the other; each cell is measured when its outcome is asked for."""
    readers = {(each.component, each.info.name): each.read for each in chosen.matrices}
    recall: Recall = (lambda content: None) if known is None else known.of_content
    for task in tasks:
        read = readers[task.component, task.name]
        yield task, _until(stopped, measure_cells(task, chosen.run, read, backend, recall))
        if stopped():
            return


def _until(stopped: Callable[[], bool], outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    while not stopped() and (outcome := next(outcomes, None)) is not None:
        yield outcome
