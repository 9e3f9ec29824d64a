"""`measure_cells`: what a worker does, in this process or in another one."""

import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from threadpoolctl import threadpool_limits

from dynamics.analysis.cache import content_key, study_key
from dynamics.components import COMPONENTS
from dynamics.components.parameters import Measurable
from dynamics.errors import DynamicsError, FormatError
from dynamics.metrics import study_spectrum
from dynamics.runs.dependencies import Dependency, TracedRun
from dynamics.runs.differences import Difference, is_finite
from dynamics.runs.run import Dense, Factored, Run, Spectrum
from dynamics.schema import Status
from dynamics.spectra.backend import Backend
from dynamics.spectra.gpu_backend import CPU, backend_for
from dynamics.spectra.spectrum import spectrum

# content -> the spectrum of these numbers, if it is known
Recall = Callable[[bytes], Spectrum | None]


@dataclass(frozen=True)
class Task:
    """Cells of one matrix, to be measured by one worker.

    Attributes:
        component: the component that the matrix belongs to.
        name: the matrix.
        cells: (step, kind) of each.
        hashed: whether contents and origins are wanted, for a cache.
        known: content -> spectrum, of what the cells held before.
        study: whether `study_spectrum` of each is wanted, too.
    """

    component: str
    name: str
    cells: tuple[tuple[int, str], ...]
    hashed: bool = False
    known: Mapping[bytes, Spectrum] = field(default_factory=dict)
    study: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of one cell.

    Attributes:
        step: the step of the cell.
        kind: the kind of the cell.
        status: whether the cell was measured, or why not.
        spectrum: None where it was not measured.
        problem: why it was not measured, where that is a problem.
        listed: whether the problem belongs to this cell, and not to another cell that names it.
        content: the hash of the numbers, where `Task.hashed` asks for it.
        trace: what was read for the cell, each with its origin; where `Task.hashed` asks for it.
        study: see `study_spectrum`; where `Task.study` asks for it and there is a matrix.
    """

    step: int
    kind: str
    status: Status
    spectrum: Spectrum | None = None
    problem: DynamicsError | None = None
    listed: bool = False
    content: bytes | None = None
    trace: Mapping[Dependency, str | None] = field(default_factory=dict)
    study: Spectrum | None = None

    @property
    def contents(self) -> dict[bytes, Spectrum]:
        """Content -> spectrum: what a cache keeps of it."""
        if self.content is None or self.spectrum is None:
            return {}
        kept = {self.content: self.spectrum}
        return kept if self.study is None else {**kept, study_key(self.content): self.study}


def measure_cells(
    task: Task, run: TracedRun, read: Measurable, backend: Backend, recall: Recall
) -> Iterator[Outcome]:
    """Measure each cell of a task, one after the other; yields what became of it.

    Args:
        task: the cells.
        run: the run that `read` reads from.
        read: reads the matrix at a step and kind.
        backend: computes with the arrays that the run hands out.
        recall: gives the spectrum of numbers that were measured before.
    """
    steps = sorted({step for step, _ in task.cells})
    following = dict(pairwise(steps))
    for step, kind in task.cells:
        if task.hashed:
            run.start_cell()
        try:
            matrix = read(step, kind)
            if step in following:
                run.read_ahead(step, following[step])
        except FormatError as problem:
            yield Outcome(step, kind, Status.UNREADABLE, problem=problem, listed=True)
            continue
        if isinstance(matrix, Status):
            yield Outcome(step, kind, matrix)
        elif not is_finite(matrix, backend.is_finite):
            text = f"{task.name} ({kind}) at step {step} holds NaN or Inf; it was not measured."
            # Of a difference, the weights themselves are named.
            own = not isinstance(matrix, Difference)
            yield Outcome(step, kind, Status.NON_FINITE, problem=DynamicsError(text), listed=own)
        else:
            yield _measure_cell(task, step, kind, matrix, run, backend, recall)


def _measure_cell(
    task: Task,
    step: int,
    kind: str,
    matrix: Dense | Factored | Difference | Spectrum,
    run: TracedRun,
    backend: Backend,
    recall: Recall,
) -> Outcome:
    if isinstance(matrix, Spectrum):
        return Outcome(step, kind, Status.MEASURED, matrix)
    content = content_key(matrix, backend) if task.hashed else None
    measured = None if content is None else recall(content)
    measured = spectrum(matrix, backend=backend) if measured is None else measured
    study = None
    if task.study:
        study = None if content is None else recall(study_key(content))
        study = study_spectrum(matrix) if study is None else study
    trace = dict(run.trace) if task.hashed else {}
    return Outcome(step, kind, Status.MEASURED, measured, content=content, trace=trace, study=study)


class Workplace:
    """A run in a worker's process, where its tasks are carried out.

    What one task has read is kept for the next one, in each thread apart: several tasks read the
    same matrices, such as the projections of all heads.
    """

    def __init__(self, pickled_run: bytes, device: str = CPU):
        # Never undone: there are as many workers as cores to use. SciPy is imported by now
        # (`dynamics.spectra.spectrum`), so that its BLAS is limited, too.
        threadpool_limits(1)
        self._pickled, self._device = pickled_run, device
        self._thread = threading.local()

    def __reduce__(self) -> tuple[type["Workplace"], tuple[bytes, str]]:
        return Workplace, (self._pickled, self._device)

    def carry_out(self, task: Task) -> list[Outcome]:
        """The outcomes of a task's cells."""
        here = self._thread
        if not hasattr(here, "run"):
            run: Run = pickle.loads(self._pickled)
            here.run, here.backend, here.readers = TracedRun(run), backend_for(self._device), {}
        if task.component not in here.readers:
            here.readers[task.component] = {
                info.name: read for info, read in COMPONENTS[task.component](here.run)
            }
        known = dict(task.known)
        outcomes = []
        read = here.readers[task.component][task.name]
        for each in measure_cells(task, here.run, read, here.backend, known.get):
            known.update(each.contents)
            outcomes.append(each)
        return outcomes
