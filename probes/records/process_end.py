"""What becomes of attached recorders when the process ends, or when it forks.

Python ends in this order. The main thread returns. `threading` runs the functions that were given
to `threading._register_atexit`, the last one first, and waits for the threads. `atexit` runs. One
of the functions of `threading` is that of `concurrent.futures`: from then on no pool takes work any
more, and zarr writes through a pool. `atexit` is therefore too late to write anything, and it is
not run at all in processes that `multiprocessing` starts. There is no public way to come earlier.
"""

import atexit
import concurrent.futures.thread as pools  # must register itself before `_watch` does
import os
import sys
import threading
from contextlib import suppress
from typing import Protocol

from dynamics.errors import one_line


class Attached(Protocol):
    """A recorder that is attached."""

    @property
    def thread(self) -> threading.Thread:
        """The one that trains."""
        ...

    def close(self) -> None:
        """Write what is there, and end."""

    def forget(self) -> None:
        """End without a word: the process is a fork, and its parent writes."""


_attached: dict[Attached, None] = {}  # in the order in which they came
_watching = False


def add(recorder: Attached) -> None:
    """Close this recorder when the process ends, unless it is removed before."""
    global _watching
    if not _watching:
        _watching = True
        _watch()
    _attached[recorder] = None


def remove(recorder: Attached) -> None:
    """The recorder is closed."""
    _attached.pop(recorder, None)


def _watch() -> None:
    try:
        threading._register_atexit(_close_all)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # a Python without it, or one that is ending
        atexit.register(_close_all)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_all)


def _close_all() -> None:
    for recorder in list(_attached):
        try:
            _wait_for(recorder.thread)
            recorder.close()
        except BaseException as error:
            what = one_line(error) if isinstance(error, Exception) else type(error).__name__
            with suppress(Exception):
                sys.stderr.write(f"probes.Recorder, when the process ended: {what}\n")
        remove(recorder)


def _wait_for(training: threading.Thread) -> None:
    """Wait for a thread that still trains, as Python would do it a moment later."""
    is_waited_for = not training.daemon and training not in pools._threads_queues
    if is_waited_for and training is not threading.current_thread():
        training.join()


def _forget_all() -> None:
    for recorder in list(_attached):
        with suppress(Exception):
            recorder.forget()
    _attached.clear()
