"""Records on their way to the store, and the thread that writes them behind the training loop."""

import queue
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from dynamics.errors import DynamicsError, one_line
from dynamics.recordings import GRADIENT, WEIGHT, RecordingWriter

Job = Callable[[], None]

BLOCK, SKIP = "block", "skip"
_STORABLE = ("float64", "float32", "float16", "bfloat16")


class SkippedRecordWarning(UserWarning):
    """A record was dropped because the storage is slower than the training."""


class StorageOverflowWarning(UserWarning):
    """Numbers of a record are beyond the range of the dtype that it is stored in."""


class BackgroundWriter:
    """Runs jobs one after another in a thread of its own.

    At most `queue_size` records wait, so that memory stays bounded when the storage is slower than
    the training; the jobs of events are small and always wait. After a job fails no other runs,
    and the error is raised in the sender: at its next job, and at `close`.

    Args:
        recording: what the jobs write, closed at the end.
        queue_size: records that may wait, beside the one that is being written.
        when_full: "block" makes the sender of a further record wait, "skip" drops the record.

    Raises:
        DynamicsError: an unknown word in `when_full`, or no room for a record.
    """

    def __init__(self, recording: RecordingWriter, queue_size: int, when_full: str = BLOCK):
        check_policy(queue_size, when_full)
        self._recording = recording
        self._when_full = when_full
        self._room = threading.BoundedSemaphore(queue_size)
        self._jobs: queue.SimpleQueue[tuple[Job, bool] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        # A daemon, so that a training script that dies without closing can still exit.
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a small job."""
        self._raise()
        self._jobs.put((job, False))

    def submit_record(self, job: Job, *, wait: bool = False) -> bool:
        """Queue the job of a record; returns whether there was room; may wait for it."""
        self._raise()
        if not self._room.acquire(blocking=wait or self._when_full == BLOCK):
            return False
        self._jobs.put((job, True))
        return True

    def flush(self) -> None:
        """Wait until what is queued is done; raises what went wrong, if anything."""
        done = threading.Event()
        self._jobs.put((done.set, False))
        # After an error, what is queued is thrown away.
        while not done.wait(0.1) and self._error is None:
            pass
        self._raise()

    def close(self) -> None:
        """Finish what is queued, end the thread and raise what went wrong, if anything."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        if self._error is None:
            self._recording.close()
            return
        with suppress(Exception):  # the first error is what went wrong
            self._recording.release()
        self._raise()

    def _work(self) -> None:
        while (queued := self._jobs.get()) is not None:
            job, is_record = queued
            if is_record:
                self._room.release()
            if self._error is not None:
                continue  # keep emptying the queue: nobody may block on it for ever
            try:
                job()
            except BaseException as error:
                self._error = error

    def _raise(self) -> None:
        if self._error is None:
            return
        what = one_line(self._error) if isinstance(self._error, Exception) else repr(self._error)
        kept = self._recording.steps
        raise RuntimeError(
            f"The recorder could not write: {what}. "
            + (f"The records up to step {kept[-1]} are kept" if kept else "No record is kept")
            + "; training itself goes on without the recorder, and may resume the recording."
        ) from self._error


def check_policy(queue_size: int, when_full: str) -> None:
    """Refuse what no queue can do.

    Raises:
        DynamicsError: an unknown word in `when_full`, or no room for a record.
    """
    if when_full not in (BLOCK, SKIP):
        raise DynamicsError(f"when_full takes {BLOCK!r} or {SKIP!r}; found {when_full!r}.")
    if queue_size < 1:
        raise DynamicsError(f"queue_size takes 1 or more records; found {queue_size!r}.")


def dtype_to_store(name: str | None) -> torch.dtype | None:
    """The dtype that weights and gradients are rounded to for storage; None keeps their own.

    Raises:
        DynamicsError: an unknown name.
    """
    if name is None:
        return None
    if name not in _STORABLE:
        raise DynamicsError(f"storage_dtype takes one of {', '.join(_STORABLE)}; found {name!r}.")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


class Record:
    """Copies of one record's tensors on the CPU, until the writer has them.

    Attributes:
        step: optimizer steps done.
        logged: name -> value of its scalars.
        copied: the events of a GPU after which the copies are there.
        defects: what was seen to be wrong: where -> one line.
    """

    def __init__(self, step: int, logged: dict[str, Any]):
        self.step = step
        self.logged = logged
        self.copied: list[torch.cuda.Event] = []
        self.defects: dict[str, str] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._attrs: dict[str, dict[str, Any]] = {}

    def add(self, path: str, tensor: torch.Tensor, extra: Mapping[str, Any] | None = None) -> None:
        """Keep a tensor for an array of the recording; `extra` are further attributes of it."""
        self._tensors[path] = tensor
        self._attrs[path] = dict(extra or {})

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The copies."""
        return list(self._tensors.values())

    def write(
        self, recording: RecordingWriter, stored_as: torch.dtype | None = None
    ) -> dict[str, np.ndarray]:
        """Append it to the recording, in the writer's thread; returns path -> the numbers it had.

        Args:
            recording: what it becomes a record of.
            stored_as: weights and gradients of more precision are rounded to it. Factors never
                are: they are small, and the base weight is computed from them.
        """
        for event in self.copied:
            event.synchronize()
        matrices, stored = {}, {}
        for path, tensor in self._tensors.items():
            matrices[path] = stored[path] = _as_numpy(tensor)
            dtype = tensor.dtype
            if stored_as is not None and _is_rounded(path, dtype, stored_as):
                stored[path] = _as_numpy(tensor.to(dtype := stored_as))
                self._warn_of_overflow(path, matrices[path], stored[path], dtype)
            self._attrs[path]["source_dtype"] = str(dtype).removeprefix("torch.")
        scalars = {name: float(value) for name, value in self.logged.items()}
        tokens = scalars.pop("tokens", None)
        recording.append(
            self.step,
            stored,
            attrs=self._attrs,
            scalars=scalars,
            tokens=None if tokens is None else int(tokens),
        )
        return matrices

    def _warn_of_overflow(
        self, path: str, numbers: np.ndarray, stored: np.ndarray, dtype: torch.dtype
    ) -> None:
        lost = int(np.count_nonzero(np.isinf(stored) & np.isfinite(numbers)))
        if lost:
            warnings.warn(
                f"Step {self.step}: {lost} numbers of {path} are beyond the range of "
                f"{str(dtype).removeprefix('torch.')} and stored as Inf; record with "
                "storage_dtype='bfloat16'.",
                StorageOverflowWarning,
                stacklevel=2,
            )


def _is_rounded(path: str, dtype: torch.dtype, stored_as: torch.dtype) -> bool:
    """Whether a dtype has more precision than the one to store; the coarser is stored as it is."""
    of_a_weight = path.startswith((f"{WEIGHT}/", f"{GRADIENT}/"))
    return of_a_weight and torch.finfo(dtype).eps < torch.finfo(stored_as).eps


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same numbers in a dtype that Zarr has: bfloat16 and float8 fit float32 exactly."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16):
        tensor = tensor.to(torch.float32)
    return tensor.numpy()
