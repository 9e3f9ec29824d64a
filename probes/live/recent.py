"""The last two records, in memory, as if they were a recording that is read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dynamics.formats.recording import RecordingRun
from dynamics.recordings import ADAPTER, WEIGHT, Recording
from dynamics.recordings.stored_paths import StoredPaths
from dynamics.runs.fused import split_fused
from dynamics.runs.run import Event, Run

Arrays = Mapping[str, np.ndarray]
Attrs = Mapping[str, Mapping[str, Any]]


class _Array(NamedTuple):
    """What is asked of an array in a recording, whose shape is (records, m, n)."""

    shape: tuple[int, ...]
    attrs: Mapping[str, Any]


class RecentRecords(Recording):
    """The present record and the one before, with the interface of a `Recording`.

    What is read of it is what would be read of the store: the same numbers, dtypes and attributes.

    Args:
        attrs: of the recording.
        keeps_weights: whether the weights and adapters of a record are kept until the next one, so
            that updates can be measured.
    """

    def __init__(self, attrs: Mapping[str, Any], keeps_weights: bool):
        self.store = "the records in memory"
        self.attrs = dict(attrs)
        self.steps = np.zeros(0, dtype=np.int64)
        self.stored_paths = StoredPaths({})
        self._keeps_weights = keeps_weights
        self._records: list[dict[str, np.ndarray]] = []
        self._array_attrs: dict[str, Mapping[str, Any]] = {}
        self._events: list[Event] = []

    def push(self, step: int, arrays: Arrays, attrs: Attrs) -> None:
        """A record was written; the one before the previous one is forgotten."""
        for path in arrays.keys() - self._array_attrs.keys():
            self._array_attrs[path] = attrs[path]  # an array keeps those that it began with
            self.stored_paths.choose(path)
        self._records = [*self._records[-1:], dict(arrays)]
        self.steps = np.array([*self.steps[-1:], step], dtype=np.int64)

    def forget(self) -> None:
        """Let go of what the next record is not compared with."""
        last = self._records[-1]
        self._records[-1] = {path: last[path] for path in last if self.is_kept(path)}
        if len(self._records) > 1:
            self._records[0] = {}

    def is_kept(self, path: str) -> bool:
        """Whether this array is needed until the next record."""
        return self._keeps_weights and path.startswith((f"{WEIGHT}/", f"{ADAPTER}/"))

    def note(self, event: Event) -> None:
        """Learn of an event; the writer tells them in their order."""
        self._events.append(event)

    def begin_after(self, recording: Recording) -> None:
        """Take the events of a recording that is continued, and the weights of its last record."""
        self._events = list(recording.events)
        if not len(recording.steps):
            return
        for path, place in recording.stored_paths.places.items():
            self._array_attrs[place.path] = dict(recording.array(path).attrs)
            self.stored_paths.choose(place.path)
        index = len(recording.steps) - 1
        kept = {place.path for place in recording.stored_paths.places.values()}
        values = {path: recording.read(path, index) for path in filter(self.is_kept, kept)}
        found = {path: each for path, each in values.items() if each is not None}
        self.push(int(recording.steps[index]), found, {})

    def run(self) -> Run:
        """The two records as a run, as `dynamics.open_run` would open it."""
        return split_fused(RecordingRun(self.store, recording=self))

    # The interface of `Recording`, as far as a run reads it.

    @property
    def paths(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `Recording`."""
        return tuple(dict.fromkeys(path for record in self._records for path in record))

    def array(self, path: str) -> Any:
        """See `Recording.array`."""
        found = next(record[path] for record in reversed(self._records) if path in record)
        return _Array((len(self._records), *found.shape), self._array_attrs[path])

    def attr(self, path: str, name: str, *kinds: type) -> Any:
        """See `Recording.attr`."""
        return self._array_attrs[path][name]

    def read(self, path: str, index: int) -> np.ndarray | None:
        """See `Recording.read`."""
        found = self._records[index].get(path)
        # In the order in memory of what is read of a store, which decides the last digits.
        return None if found is None else np.ascontiguousarray(found)

    def has(self, path: str, index: int) -> bool:
        """See `Recording.has`."""
        return path in self._records[index]

    @property
    def events(self) -> tuple[Event, ...]:
        """See `Recording`."""
        return tuple(self._events)
