"""What the benchmarks of this directory share: timing, tables, one BLAS thread."""

import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))


def one_thread():
    """Limit BLAS and torch to one thread: ratios then are those of work, not of luck."""
    import scipy.linalg  # noqa: F401  its BLAS is limited only once it is there
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)


def best(
    function: Callable[[], object],
    at_least: float = 1.0,
    most: int = 20,
    clock: Callable[[], float] = time.process_time,
) -> float:
    """The shortest of several runs, seconds: what else the machine did is in the others.

    Of CPU time by default: with one thread that is the time on a machine of one's own.
    """
    times: list[float] = []
    while len(times) < 2 or (sum(times) < at_least and len(times) < most):
        started = clock()
        function()
        times.append(clock() - started)
    return min(times)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table as Markdown."""
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(flush=True)


def peak_memory() -> float:
    """The peak resident memory of this process so far, MB, of Linux.

    Not getrusage's: that of a new process begins with its parent's.
    """
    status = Path("/proc/self/status").read_text("utf-8")
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 1024
