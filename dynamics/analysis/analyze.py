"""analyze(): every metric of every matrix of a run, over its steps, as one xarray Dataset."""

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from math import ceil
from pathlib import Path

import xarray as xr
from threadpoolctl import threadpool_limits

from dynamics.analysis.cache import SpectrumCache
from dynamics.analysis.results import Results
from dynamics.analysis.selection import Selection, selected
from dynamics.analysis.tasks import Outcome, Recall, Task, measured
from dynamics.analysis.workers import in_processes, in_threads, on_cluster
from dynamics.errors import DynamicsError
from dynamics.formats import open_run
from dynamics.runs.run import MatrixInfo, Run
from dynamics.schema import Status
from dynamics.spectra.backend import Backend, NumpyBackend
from dynamics.spectra.gpu_backend import CPU, backend_for, backend_version

Progress = Callable[[int, int, str], None]

# A task should take some seconds, so that what is lost with a worker is little and all end at about
# the same time; but each reads the matrices before its own and at the first step once more.
_TASK_FLOPS = 4e10
_FEWEST_STEPS, _MOST_STEPS = 8, 64


class StoppedError(Exception):
    """An analysis was told to stop before it was done."""


class UnmeasuredWarning(UserWarning):
    """A matrix or a checkpoint could not be measured; the rest was."""


def analyze(
    run: Run | str | Path,
    *,
    metrics: Iterable[str] | None = None,
    components: Iterable[str] | None = None,
    kinds: Iterable[str] | None = None,
    steps: Iterable[int] | None = None,
    select: str | Sequence[str] | None = None,
    progress: Progress | None = None,
    cache: str | Path | None = None,
    strict: bool = False,
    workers: int = 1,
    scheduler: str | None = None,
    device: str = CPU,
) -> xr.Dataset:
    """Measure a run.

    Args:
        run: a Run, or the path of one.
        metrics: names of `METRICS`; all by default.
        components: names of `COMPONENTS`; `parameters` by default.
        kinds: names of `schema.KINDS`; all that the run has by default.
        steps: steps of the run; all by default. `update` and `displacement` refer to the run's
            previous and first step, whether these are selected or not.
        select: globs over parameter names ("*_proj" matches with or without ".weight").
        progress: called as progress(done, total, matrix name) while it works; done and total count
            matrices at a step, in a kind.
        cache: a file that keeps the spectra, made if it is missing. What it has is not measured
            again, and not even read where nothing changed (`Run.origin`); the result is the same.
        strict: raise at the first matrix that is unreadable or not finite, instead of listing it.
        workers: how many processes measure, with a GPU how many threads. A script that asks for
            more than one needs `if __name__ == "__main__":`.
        scheduler: the address of a Dask scheduler, or its file (.json), whose workers measure
            instead. Whoever measures, and in whatever order, the result is the same to the last
            bit.
        device: "cuda" or "cuda:N" measures on that GPU, of each worker's machine, what it is faster
            at than a core of its CPU. Last digits differ from the CPU's, within
            `singular_value_error`, and each of the two has spectra of its own in the cache.

    Returns:
        A Dataset with dims (kind, step, matrix) and (..., index) for the singular values: one
        variable per metric, `singular_value` padded with NaN, `singular_value_error`,
        `noise_floor`, `status` (see `schema.Status`), and the run's scalars along `step`, as
        `logged_<name>` where the name is one of those above ("train/loss" is `train.loss`). NaN is
        "not measured", and `status` says why. `attrs["problems"]` lists as JSON what was found
        unmeasurable; each is also an UnmeasuredWarning.

    Raises:
        MissingError: an unknown metric, component, kind or step, or nothing selected.
        FormatError: `run` cannot be opened, or with `strict` not read.
        DynamicsError: `cache` is damaged or no cache; with `strict`, a matrix holds NaN or Inf;
            workers cannot be had, or died too often.
    """
    run = run if isinstance(run, Run) else open_run(run)
    chosen = selected(
        run, metrics=metrics, components=components, kinds=kinds, steps=steps, select=select
    )
    return measure(
        chosen,
        cache=cache,
        strict=strict,
        workers=workers,
        scheduler=scheduler,
        device=device,
        progress=progress,
    )


def measure(
    chosen: Selection,
    *,
    cache: str | Path | None = None,
    strict: bool = False,
    workers: int = 1,
    scheduler: str | None = None,
    device: str = CPU,
    progress: Progress | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> xr.Dataset:
    """What `analyze` returns for a selection.

    Args:
        chosen: what to measure.
        cache: see `analyze`.
        strict: see `analyze`.
        workers: see `analyze`.
        scheduler: see `analyze`.
        device: see `analyze`.
        progress: see `analyze`.
        stopped: asked again and again whether to give up: before every matrix at every step and
            kind, or with workers before every few.

    Raises:
        StoppedError: `stopped` said so; what was measured is in the cache.
    """
    if workers < 1:
        raise DynamicsError(f"workers is {workers}; at least 1 is needed.")
    by = backend_version(device)
    # Before any worker: one that would fail, and the rates that all of this machine read then.
    backend = NumpyBackend() if scheduler is not None else backend_for(device)
    run, results = chosen.run, Results(chosen, by)

    def report(task: Task) -> None:
        if progress is not None:
            progress(results.done, results.total, task.name)

    # One BLAS thread per worker: more of them help little, get in each other's way as soon as
    # another process wants a core, and change last digits.
    keeper = nullcontext() if cache is None else SpectrumCache(cache, by)
    with keeper as known, threadpool_limits(1):
        alone = workers == 1 and scheduler is None
        tasks = _tasks(chosen, largest_first=not alone)
        tasks = _new_tasks(tasks, chosen, known, results, report)
        carried_out: Generator[tuple[Task, Iterable[Outcome]], None, None]
        if alone:
            carried_out = _in_this_process(tasks, chosen, backend, known, stopped)
        elif scheduler is not None:
            carried_out = on_cluster(run.untraced, tasks, scheduler, device, stopped)
        elif device == CPU:
            carried_out = in_processes(run.untraced, tasks, workers, stopped)
        else:
            carried_out = in_threads(run.untraced, tasks, workers, device, stopped)
        # At once, and not when a traceback that holds it is forgotten: processes end with it.
        with closing(carried_out):
            for task, outcomes in carried_out:
                for each in outcomes:
                    if strict and each.problem is not None:
                        raise each.problem
                    if known is not None and each.content is not None and each.spectrum is not None:
                        known.put(each.content, each.spectrum)
                        cell = run.cell_key(task.component, task.name, each.step, each.kind)
                        known.put_cell(cell, each.trace, each.content)
                    results.put(task.component, task.name, each)
                report(task)
    if results.done < results.total:
        raise StoppedError(f"The analysis of {run.path} was stopped.")
    for problem in results.problems:
        warnings.warn(problem, UnmeasuredWarning, stacklevel=3)
    return results.dataset()


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
            yield Task(each.component, each.info.name, cells)


def _flops(info: MatrixInfo) -> float:
    m, n = max(info.rows, info.cols), min(info.rows, info.cols)
    return float(m * n**2 + 4 * n**3)


def _new_tasks(
    tasks: Iterator[Task],
    chosen: Selection,
    known: SpectrumCache | None,
    results: Results,
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
            if spectrum is not None and unchanged:
                outcome = Outcome(step, kind, Status.MEASURED, spectrum)
                results.put(task.component, task.name, outcome)
                continue
            new.append((step, kind))
            if content is not None and spectrum is not None:
                before[content] = spectrum  # it may hold the same numbers: a file was touched
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
) -> Generator[tuple[Task, Iterator[Outcome]], None, None]:
    """The tasks one after the other; each cell is measured when its outcome is asked for."""
    readers = {(each.component, each.info.name): each.read for each in chosen.matrices}
    recall: Recall = (lambda content: None) if known is None else known.of_content
    for task in tasks:
        read = readers[task.component, task.name]
        yield task, _until(stopped, measured(task, chosen.run, read, backend, recall))
        if stopped():
            return


def _until(stopped: Callable[[], bool], outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    while not stopped() and (outcome := next(outcomes, None)) is not None:
        yield outcome
