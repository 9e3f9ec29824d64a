"""The thread that writes records while training continues."""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from numbers import Integral

from dynamics.errors import DynamicsError, one_line
from dynamics.recordings import RecordingWriter

Job = Callable[[], None]

BLOCK, SKIP = "block", "skip"


class SkippedRecordWarning(UserWarning):
    """The recorder dropped a record because the storage is slower than the training."""


class BackgroundWriter:
    """Runs jobs one after another in a thread of its own.

    At most `queue_size` records wait, so memory stays bounded when the storage is slower than the
    training. Jobs of events are small; any number of them may wait. After a job fails, no other
    job runs, and the sender gets the error at its next job and at `close`.

    Args:
        recording: what the jobs write; `close` closes it.
        queue_size: how many records may wait, besides the one that is being written.
        when_full: what happens to one more record: "block" makes the sender wait, "skip" drops it.

    Raises:
        DynamicsError: an unknown word in `when_full`, or `queue_size` is below 1.
    """

    def __init__(self, recording: RecordingWriter, queue_size: int, when_full: str = BLOCK):
        check_policy(queue_size, when_full)
        self._recording = recording
        self._when_full = when_full
        self._room = threading.BoundedSemaphore(queue_size)
        self._jobs: queue.SimpleQueue[tuple[Job, bool] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._done = threading.Event()
        # A daemon, so that a training script that dies without closing can still exit.
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a small job."""
        self._raise()
        self._jobs.put((job, False))

    def submit_record(self, job: Job, *, wait: bool = False) -> bool:
        """Queue the job of a record.

        Args:
            job: writes the record.
            wait: wait for room in the queue, whatever `when_full` says.

        Returns:
            False if the queue was full and the record is dropped.
        """
        self._raise()
        if not self._room.acquire(blocking=wait or self._when_full == BLOCK):
            return False
        self._jobs.put((job, True))
        return True

    def flush(self) -> None:
        """Wait until all queued jobs are done.

        Raises:
            RuntimeError: a job failed.
        """
        done = threading.Event()
        self._jobs.put((done.set, False))
        # After an error the thread discards queued jobs, this one too.
        while not done.wait(0.1) and self._error is None:
            pass
        self._raise()

    def close(self) -> None:
        """Finish all queued jobs and end the thread. An interrupted call can be repeated.

        Raises:
            RuntimeError: a job failed.
        """
        self._end()
        if self._error is None:
            self._recording.close()
            return
        with suppress(Exception):  # the first error is the one to report
            self._recording.release()
        self._raise()

    def discard(self) -> None:
        """End the thread and discard a recording that it began; for use before the first job."""
        self._end()
        self._recording.discard()

    def _end(self) -> None:
        # Not by Thread.join: where Ctrl-C interrupts it, the thread counts as ended (bpo-45274).
        if not self._done.is_set():
            self._jobs.put(None)
            self._done.wait()

    def _work(self) -> None:
        while (queued := self._jobs.get()) is not None:
            job, is_record = queued
            if is_record:
                self._room.release()
            if self._error is not None:
                continue  # keep emptying the queue, or its sender could block forever
            try:
                job()
            except BaseException as error:
                self._error = error
        self._done.set()

    def _raise(self) -> None:
        if self._error is None:
            return
        what = one_line(self._error) if isinstance(self._error, Exception) else repr(self._error)
        kept = self._recording.steps
        raise RuntimeError(
            f"The recorder could not write: {what}. "
            + (f"The records up to step {kept[-1]} are kept" if kept else "No record is kept")
            + "; training can go on without the recorder, or resume the recording later."
        ) from self._error


def check_policy(queue_size: int, when_full: str) -> None:
    """Check the settings of a `BackgroundWriter`.

    Raises:
        DynamicsError: an unknown word in `when_full`, or `queue_size` is below 1.
    """
    if when_full not in (BLOCK, SKIP):
        raise DynamicsError(f"when_full takes {BLOCK!r} or {SKIP!r}; found {when_full!r}.")
    if not isinstance(queue_size, Integral) or isinstance(queue_size, bool) or queue_size < 1:
        raise DynamicsError(f"queue_size takes 1 or more records; found {queue_size!r}.")
