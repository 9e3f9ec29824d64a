"""One recording while a recorder writes it: from the open store to the end of its writer."""

import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self, SupportsFloat, SupportsInt

import numpy as np

from dynamics import schema
from dynamics.recordings import RecordingWriter
from dynamics.runs.run import Event
from probes.checks import FailedCheckWarning, record_defects
from probes.live.metrics import LiveMetrics
from probes.records.background_writer import BackgroundWriter, SkippedRecordWarning
from probes.records.contents import Contents
from probes.records.opening import Destination
from probes.records.record import Record
from probes.records.rounding import StorageRounding


class Session:
    """Writes the records of a recorder, each when the next step begins.

    Args:
        recording: the open recording; `close` closes it.
        contents: fills the records, and takes back what it has lent them.
        rounding: to the dtype that is stored.
        queue_size: see `BackgroundWriter`.
        when_full: see `BackgroundWriter`.
        live: measures the records after they are written.
    """

    def __init__(
        self,
        recording: RecordingWriter,
        contents: Contents,
        rounding: StorageRounding,
        queue_size: int,
        when_full: str,
        live: LiveMetrics | None = None,
    ):
        self._recording, self._contents, self._rounding = recording, contents, rounding
        self._pending: Record | None = None
        self._warned_of: set[str] = set()
        self._live = live
        self._compared: Record | None = None  # weights that the next record is compared with
        self._writer = BackgroundWriter(recording, queue_size, when_full)

    @classmethod
    def begin(cls, destination: Destination, *settings: Any) -> Self:
        """Open the recording and start its writer; leaves nothing behind if that fails.

        Raises:
            DynamicsError: see `Destination.open`.
        """
        recording = destination.open()
        try:
            return cls(recording, *settings)
        except BaseException:
            recording.discard()
            raise

    def add(self, record: Record) -> None:
        """Take a record; what is logged for its step is added until it is handed over."""
        if record.step in self._recording.steps:  # a resumed recording may hold it already
            self._contents.release(record)
        else:
            self._pending = record

    def log(
        self, step: int, values: Mapping[str, SupportsFloat], tokens: SupportsInt | None
    ) -> bool:
        """Add values to the record of a step; False if it is not (or no longer) the last one."""
        if self._pending is None or self._pending.step != step:
            return False
        self._pending.logged.update(values)
        if tokens is not None:
            self._pending.tokens = tokens
        return True

    def hand_over(self, *, wait: bool = False) -> None:
        """Give the last record to the writer, which may drop it if `wait` is not set.

        Raises:
            RuntimeError: the writer failed.
        """
        record = self._pending
        if record is None:
            return
        try:
            kept = self._writer.submit_record(lambda: self._write(record), wait=wait)
        except RuntimeError:
            self._pending = None
            raise
        self._pending = None
        if not kept:
            self._contents.release(record)
            self.event(Event(record.step, schema.SKIPPED, {}))
            warnings.warn(
                f"Dropped the record at step {record.step}: the storage is slower than the "
                "training. Record less often, or pass when_full='block'.",
                SkippedRecordWarning,
                stacklevel=2,
            )

    def event(self, event: Event) -> None:
        """Write an event, after the records so far.

        Raises:
            RuntimeError: the writer failed.
        """
        self.hand_over()
        self._contents.note(event)
        self._writer.submit(lambda: self._write_event(event))

    def report(self, *, everything: bool = False) -> None:
        """Hand live values to the tracker; see `LiveMetrics.report`."""
        if self._live is not None:
            self._live.report(everything=everything)

    def flush(self) -> None:
        """Wait until every record so far is written.

        Raises:
            RuntimeError: the writer failed.
        """
        self.hand_over(wait=True)
        self._writer.flush()
        self.report(everything=True)

    def close(self) -> None:
        """Write every record so far, and let others write. An interrupted call can be repeated.

        Raises:
            RuntimeError: the writer failed.
        """
        with suppress(RuntimeError):  # the writer says why, once it is closed
            self.hand_over(wait=True)
        try:
            self._writer.close()
        finally:
            self.report(everything=True)

    def discard(self) -> None:
        """End without writing, and leave no new store behind: the recorder could not begin."""
        self._writer.discard()

    def _write(self, record: Record) -> None:
        if record.step in self._recording.steps:
            return  # an interruption came between handing it over and forgetting it
        written = record.write(self._recording, self._rounding)
        try:
            self._warn(record, written)
        except Warning as told:  # a filter makes errors of warnings; the record is written
            sys.stderr.write(f"{type(told).__name__}: {told}\n")
        if self._live is not None:
            self._live.measure(record.step, record.made, record.stored, record.attrs)
            before, self._compared = self._compared, record.taken_out(self._live.is_kept)
            if before is not None:
                self._contents.release(before)
        self._contents.release(record)

    def _write_event(self, event: Event) -> None:
        self._recording.event(event)
        if self._live is not None:
            self._live.note(event)

    def _warn(self, record: Record, written: Mapping[str, np.ndarray]) -> None:
        for loss in record.losses:
            warnings.warn(loss, stacklevel=2)
        for path, defect in (record.defects | record_defects(written)).items():
            if path not in self._warned_of:  # once for each array
                self._warned_of.add(path)
                if self._live is not None:
                    self._live.alarm(record.step, f"{defect}.")
                warnings.warn(f"Step {record.step}: {defect}.", FailedCheckWarning, stacklevel=2)
