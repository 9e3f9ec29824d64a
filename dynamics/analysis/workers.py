"""Workers: processes of this machine, threads that share a GPU, or a Dask cluster.

All of them run the same function on the same tasks, each with one BLAS thread. The results are
therefore those of a serial analysis to the last bit. A task changes nothing, so a task whose worker
died is simply carried out again. A bounded number of tasks is in flight at a time, and results come
as they are ready.

Why processes and not threads: `np.linalg.eigvalsh` of a single matrix with n <= 500 holds the GIL.
Threads would overlap if they worked on stacks of four equal shapes. But stacks were not faster by
themselves (9.4 ms against 7.4 ms for each of four 384 x 384 matrices: together they do not fit into
the processor's cache), and the metrics, hashes and reads in between are Python.

Why threads with a GPU: they wait for the GPU without the GIL, and the GPU does not run the requests
of several processes at the same time.
"""

import json
import multiprocessing
import pickle
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from math import inf
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

from dynamics.analysis.execution import Execution
from dynamics.analysis.tasks import Outcome, Task, Workplace
from dynamics.errors import DynamicsError, one_line, require_extra
from dynamics.runs.run import Run
from dynamics.spectra.gpu_backend import CPU

TaskOutcomes = Generator[tuple[Task, Iterable[Outcome]], None, None]

_NAP = 0.2  # seconds between two looks at `stopped`
_RETRIES = 3
_AHEAD = 3  # tasks in flight per worker
_SECONDS_TO_CONNECT = 20


def measure_by_workers(
    run: Run, tasks: Iterator[Task], execution: Execution, stopped: Callable[[], bool]
) -> TaskOutcomes:
    """The outcomes of the tasks, in the order in which workers have them ready.

    Ends early where `stopped` says so.

    Raises:
        DynamicsError: the run cannot be sent to workers, there are none, or they died too often.
    """
    if execution.scheduler is not None:
        return on_cluster(run, tasks, execution.scheduler, execution.device, stopped)
    if execution.device == CPU:
        return in_processes(run, tasks, execution.workers, stopped)
    return in_threads(run, tasks, execution.workers, execution.device, stopped)


def in_threads(
    run: Run, tasks: Iterator[Task], workers: int, device: str, stopped: Callable[[], bool]
) -> TaskOutcomes:
    """The outcomes of the tasks, in the order in which `workers` threads and a GPU have them ready.

    Ends early where `stopped` says so.

    Raises:
        DynamicsError: the run cannot be opened a second time.
    """
    workplace = Workplace(_pickled(run), device)
    with ThreadPoolExecutor(workers) as threads:
        yield from _in_order_of_completion(
            lambda task: threads.submit(workplace.carry_out, task), tasks, lambda: workers, stopped
        )


def in_processes(
    run: Run, tasks: Iterator[Task], workers: int, stopped: Callable[[], bool]
) -> TaskOutcomes:
    """The outcomes of the tasks, in the order in which `workers` processes have them ready.

    Ends early where `stopped` says so. A process that dies is replaced, and its task carried out
    again.

    Raises:
        DynamicsError: the run cannot be sent to another process, or processes died four times of
            one task.
    """
    processes = _Processes(_pickled(run))
    # A thread per process, which sends it tasks and waits for it.
    with ThreadPoolExecutor(workers) as threads:
        try:
            yield from _in_order_of_completion(
                lambda task: threads.submit(processes.carry_out, task),
                tasks,
                lambda: workers,
                stopped,
            )
        finally:
            processes.kill()


class _Processes:
    """One worker process for each thread that asks for something.

    Not a `ProcessPoolExecutor`: all of its processes answer through one pipe, and the parent waits
    for ever for the rest of an answer whose sender was killed. Here each has its own pipe, which
    ends with it.
    """

    def __init__(self, pickled_run: bytes):
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        # Imported once for all processes.
        context.set_forkserver_preload(["dynamics.formats", "dynamics.analysis.workers"])
        if "forkserver" in methods:
            _start_server()
        self._context: BaseContext = context
        self._pickled = pickled_run
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._started: list[multiprocessing.process.BaseProcess] = []
        self._closed = False

    def carry_out(self, task: Task) -> list[Outcome]:
        for _ in range(_RETRIES + 1):
            try:
                if not hasattr(self._of_thread, "pipe"):
                    self._of_thread.pipe = self._start()
                pipe: Connection = self._of_thread.pipe
                pipe.send(task)
                answer: list[Outcome] | Exception = pipe.recv()
            except (EOFError, OSError):  # it died
                if self._closed:
                    return []
                vars(self._of_thread).clear()
                continue
            if isinstance(answer, Exception):
                raise answer
            return answer
        raise DynamicsError(
            f"Worker processes died {_RETRIES + 1} times while they measured {task.name}. If "
            "memory is short, use fewer workers; a script that uses them needs if __name__ == "
            "'__main__'."
        )

    def _start(self) -> Connection:
        here, there = self._context.Pipe()
        with self._lock:  # none is started after `kill`
            if self._closed:
                raise EOFError
            process = self._context.Process(  # type: ignore[attr-defined]
                target=_work, args=(there, self._pickled), daemon=True
            )
            process.start()
            self._started.append(process)
        there.close()  # so that the pipe ends with the process
        return here

    def kill(self) -> None:
        """End all of them, whatever they are doing."""
        with self._lock:
            self._closed = True
            for each in self._started:
                each.kill()
        for each in self._started:
            each.join()


def _start_server() -> None:
    """Start what starts processes, without SIGINT: Ctrl-C goes to all processes of a terminal.

    It ignores the signal only after its imports, and would print a traceback until then.
    """
    from multiprocessing import forkserver, resource_tracker

    resource_tracker.ensure_running()  # it unblocks SIGINT itself, once it has started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, pickled_run: bytes) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's to stop
    if "fork" in multiprocessing.get_all_start_methods():
        # Locks of libraries (Blosc has one) then have no name that a killed process would leave.
        multiprocessing.set_start_method("fork", force=True)
    workplace = Workplace(pickled_run)
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            task = pipe.recv()
            answer: list[Outcome] | Exception
            try:
                answer = workplace.carry_out(task)
            except Exception as error:
                answer = error
            pipe.send(answer)


def on_cluster(
    run: Run, tasks: Iterator[Task], scheduler: str, device: str, stopped: Callable[[], bool]
) -> TaskOutcomes:
    """The outcomes of the tasks, in the order in which a Dask cluster has them ready.

    `scheduler` is its address, or the file (.json) in which it writes that. Workers may join at any
    time; they read the run's files by the same paths. Ends early where `stopped` says so.

    Raises:
        DynamicsError: dask.distributed is not installed, no scheduler answers, or workers died too
            often of the same task.
    """
    try:
        from distributed import Client
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise require_extra("distributed", error) from error
    pickled = _pickled(run)
    try:
        address = _scheduler_address(scheduler)
        client = Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DynamicsError(
            f"No Dask scheduler answers at {scheduler}: {one_line(error)}. "
            "Start one with 'dask scheduler', or use workers on this machine."
        ) from error
    with client:
        # A task of its own, not scattered data: it is made again where its worker died.
        workplace = client.submit(Workplace, pickled, device)
        executor = client.get_executor(pure=False, retries=_RETRIES)
        try:
            yield from _in_order_of_completion(
                lambda task: executor.submit(Workplace.carry_out, workplace, task),
                tasks,
                lambda: sum(client.nthreads().values()),
                stopped,
            )
        except KilledWorker as error:
            raise DynamicsError(
                f"Workers of {scheduler} died too often of one task: {one_line(error)} "
                "Give them more memory, or see their logs."
            ) from error
        finally:
            executor.shutdown(wait=False)


def _in_order_of_completion(
    submit: Callable[[Task], "Future[list[Outcome]]"],
    tasks: Iterator[Task],
    workers: Callable[[], int],
    stopped: Callable[[], bool],
) -> TaskOutcomes:
    """Each task with its outcomes, as they are ready; a few per worker are submitted at a time.

    How many workers there are is asked once a second, for they come and go.
    """
    flying: dict[Future[list[Outcome]], Task] = {}
    at_most, asked = 0, -inf
    try:
        while not stopped():
            if time.monotonic() - asked > 1:
                at_most, asked = _AHEAD * max(workers(), 1), time.monotonic()
            while len(flying) < at_most and (task := next(tasks, None)) is not None:
                flying[submit(task)] = task
            if not flying:
                return
            done, _ = wait(flying, timeout=_NAP, return_when=FIRST_COMPLETED)
            for future in done:
                yield flying.pop(future), future.result()
    finally:
        for future in flying:
            future.cancel()


def _scheduler_address(scheduler: str) -> str:
    """The address of a scheduler, from its file if it is given by that.

    The file may not be written yet; it is waited for.
    """
    if not scheduler.endswith(".json"):
        return scheduler
    end = time.monotonic() + _SECONDS_TO_CONNECT
    while True:
        try:
            return str(json.loads(Path(scheduler).read_text("utf-8"))["address"])
        except (OSError, ValueError):
            if time.monotonic() > end:
                raise
        time.sleep(_NAP)


def _pickled(run: Run) -> bytes:
    try:
        return pickle.dumps(run, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # whatever a store's client objects raise
        raise DynamicsError(
            f"{run.path} cannot be sent to workers: {one_line(error)}. Measure it without."
        ) from error
