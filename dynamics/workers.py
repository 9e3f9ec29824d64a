"""Who carries out the tasks of an analysis: processes of this machine, or a Dask cluster.

Both run the same function on the same tasks, each with one BLAS thread, so that results are those
of a serial analysis to the last bit. Tasks change nothing, so one whose worker died is simply
carried out again. A bounded number is in flight; results come as they are ready.

Processes, not threads: `np.linalg.eigvalsh` of a single matrix of n <= 500 holds the GIL. Threads
with stacks of four equal shapes overlap as well, but stacks were no faster by themselves (9.4 ms
against 7.4 for each of four 384 x 384 matrices: together they leave the cache), and the metrics,
hashes and reads in between are Python.
"""

import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from dynamics.errors import DynamicsError, one_line, require_extra
from dynamics.measuring import Outcome, Task, Workplace
from dynamics.run import Run

Results = Iterator[tuple[Task, list[Outcome]]]

_NAP = 0.2  # seconds between two looks at `stopped`
_RETRIES = 3
_AHEAD = 3  # tasks in flight per worker
_SECONDS_TO_CONNECT = 20

_workplace: Workplace  # of a worker process


def in_processes(
    run: Run, tasks: Iterator[Task], workers: int, stopped: Callable[[], bool]
) -> Results:
    """The outcomes of the tasks, in the order in which `workers` processes have them ready.

    Ends early where `stopped` says so. Where a process dies, all are started anew with what was not
    done yet.

    Raises:
        DynamicsError: the run cannot be sent to another process, or processes died four times.
    """
    pickled = _pickled(run)
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["dynamics.formats", "dynamics.workers"])  # once for all workers
    unfinished: deque[Task] = deque()
    for retry in range(_RETRIES + 1):
        pool = ProcessPoolExecutor(workers, context, _begin, (pickled,))
        try:
            yield from _results(
                lambda task, pool=pool: pool.submit(_carry_out, task),  # type: ignore[misc]
                tasks,
                _AHEAD * workers,
                stopped,
                unfinished,
            )
            return
        except BrokenProcessPool as broken:
            if retry == _RETRIES:
                raise DynamicsError(
                    f"Worker processes died {_RETRIES + 1} times, at last while they measured "
                    f"{', '.join({task.name for task in unfinished})}. If memory is short, use "
                    "fewer workers; a script that uses them needs if __name__ == '__main__'."
                ) from broken
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def on_cluster(
    run: Run, tasks: Iterator[Task], address: str, stopped: Callable[[], bool]
) -> Results:
    """The outcomes of the tasks, in the order in which a Dask cluster has them ready.

    The workers read the run's files by the same paths. Ends early where `stopped` says so.

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
        client = Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise DynamicsError(
            f"No Dask scheduler answers at {address}: {one_line(error)}. "
            "Start one with 'dask scheduler', or use workers on this machine."
        ) from error
    with client:
        # A task of its own, not scattered data: it is made again where its worker died.
        workplace = client.submit(Workplace, pickled)
        executor = client.get_executor(pure=False, retries=_RETRIES)
        threads = sum(client.nthreads().values())
        unfinished: deque[Task] = deque()
        try:
            yield from _results(
                lambda task: executor.submit(Workplace.carry_out, workplace, task),
                tasks,
                _AHEAD * max(threads, 4),
                stopped,
                unfinished,
            )
        except KilledWorker as error:
            raise DynamicsError(
                f"Workers of {address} died too often of one task: {one_line(error)} "
                "Give them more memory, or see their logs."
            ) from error
        finally:
            executor.shutdown(wait=False)


def _results(
    submit: Callable[[Task], "Future[list[Outcome]]"],
    tasks: Iterator[Task],
    at_most: int,
    stopped: Callable[[], bool],
    unfinished: deque[Task],
) -> Results:
    """Carry out `unfinished`, then `tasks`; after an exception the former has what is not done."""
    flying: dict[Future[list[Outcome]], Task] = {}
    try:
        while not stopped():
            while len(flying) < at_most:
                task = unfinished.popleft() if unfinished else next(tasks, None)
                if task is None:
                    break
                unfinished.appendleft(task)  # until it flies: `submit` may fail
                flying[submit(task)] = unfinished.popleft()
            if not flying:
                return
            done, _ = wait(flying, timeout=_NAP, return_when=FIRST_COMPLETED)
            for future in done:
                outcomes = future.result()
                yield flying.pop(future), outcomes
    finally:
        unfinished.extend(flying.values())
        for future in flying:
            future.cancel()


def _pickled(run: Run) -> bytes:
    try:
        return pickle.dumps(run, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # whatever a store's client objects raise
        raise DynamicsError(
            f"{run.path} cannot be sent to workers: {one_line(error)}. Measure it without."
        ) from error


def _begin(pickled: bytes) -> None:
    global _workplace
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's to stop
    _workplace = Workplace(pickled)


def _carry_out(task: Task) -> list[Outcome]:
    return _workplace.carry_out(task)
