"""Writing a recording: whole records, one after another, each committed by one small write.

Chunks are written first; the record exists once `Metadata.commit` has replaced the root's document.
xarray and zarr read shapes from there, so that a reader sees whole records only, also while the
next one is written and after the writer was killed. Nothing is synced to disk by force: a record
survives the death of the process, not a power cut.
"""

import asyncio
import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Set
from contextlib import suppress
from functools import partial
from typing import Any, Self

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync
from zarr.storage import LocalStore

from dynamics import schema
from dynamics.errors import DynamicsError, RecordingHeldError
from dynamics.recordings import paths, stores
from dynamics.recordings.beginnings import clear, drop_leftovers, existing_recording
from dynamics.recordings.compression import Compression
from dynamics.recordings.lock import WriterLock
from dynamics.recordings.metadata import Metadata
from dynamics.recordings.reader import Recording
from dynamics.recordings.stored_paths import StoredPaths
from dynamics.recordings.stores import StoreLike
from dynamics.runs.run import Event

_SERIES_CODECS = [ZstdCodec(level=1), Crc32cCodec()]


class RecordingWriter:
    """Appends records to a store. One writer per store at a time; not thread-safe.

    Args:
        store: a path, a URL, any zarr Store, or an Icechunk repository.
        attrs: JSON-like attributes of a new recording; not used when resuming.
        resume: continue an existing recording instead of raising OutputExistsError.
        overwrite: delete an existing recording and begin a new one in its place. Other files in its
            folder stay.
        take_over: take the recording from a writer that holds it. Needed only for one that died on
            another machine; a writer that died on this machine is recognised.
        compression: of new arrays; existing arrays keep theirs.

    Raises:
        OutputExistsError: the store holds a recording, and neither `resume` nor `overwrite` is set.
        RecordingHeldError: another writer has it.
        FormatError: the store holds something that is not a recording.
    """

    def __init__(
        self,
        store: StoreLike,
        attrs: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        take_over: bool = False,
        compression: Compression | None = None,
    ):
        self._store = stores.for_writing(store)
        self._compression = compression or Compression()
        self._arrays: dict[str, zarr.Array] = {}
        self._groups: set[str] = set()
        self._stored_paths = StoredPaths({})
        self._series: dict[str, list[Any]] = {}
        self._uncommitted: set[tuple[str, int]] = (
            set()
        )  # chunks that belong to no commit (any more)
        # One chunk is compressed while another is written. Object stores answer late: more at once.
        self._at_once = 2 if isinstance(self._store, LocalStore) else 8
        self._new_folder = not stores.folder_exists(self._store)
        allowed = {"resume": resume, "overwrite": overwrite}
        existing_recording(self._store, **allowed)
        self._is_new = False
        try:
            self._lock = WriterLock(self._store, take_over=take_over)
        except RecordingHeldError:
            raise  # its folder is another writer's
        except BaseException:
            if self._new_folder:
                stores.remove_folder(self._store)
            raise
        try:
            # Once more: since the first check, another writer may have begun, and even closed.
            recording = existing_recording(self._store, **allowed)
            if recording is None:
                self._is_new = True
                self._create(attrs)
            else:
                self._open(recording)
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                self.discard()
            raise

    def _create(self, attrs: Mapping[str, Any]) -> None:
        clear(self._store)
        attrs = {
            "format": schema.RECORDING_FORMAT,
            "format_version": schema.RECORDING_VERSION,
            **attrs,
        }
        self._root = zarr.create_group(self._store, attributes=attrs, zarr_format=3)
        self._metadata = Metadata(self._store, attrs, partial(_length, self._series))
        self._new_series(paths.STEP, "int64", 0)
        self._new_series(paths.TOKENS, "int64", paths.NO_TOKENS)
        self._new_series(paths.CHECKSUM, "int64", paths.NO_CHECKSUM)
        for column, dtype in zip(paths.EVENT_COLUMNS, ("int64", "str", "str"), strict=True):
            self._new_series(paths.event_path(column), dtype, None)
        self._commit("a recording begins")

    def _open(self, recording: Recording) -> None:
        attrs = {**recording.attrs, "format_version": schema.RECORDING_VERSION}
        self._metadata = Metadata(self._store, attrs, partial(_length, self._series))
        self._root = zarr.open_group(self._store, mode="r+", use_consolidated=False)
        self._stored_paths = recording.stored_paths
        for path in recording.paths:
            self._enter_groups(path, create=False)
            array = self._root[path]
            assert isinstance(array, zarr.Array)
            self._metadata.add_array(path, array)
            self._arrays[path] = _endless(array)
            if not paths.is_matrix(path):
                self._series[path] = recording.series(path).tolist()
        drop_leftovers(self._store, {path: _length(self._series, path) for path in self._arrays})
        if paths.CHECKSUM not in self._arrays:  # of version 1
            self._new_series(paths.CHECKSUM, "int64", paths.NO_CHECKSUM)
            self._series[paths.CHECKSUM] = [paths.NO_CHECKSUM] * len(self.steps)
            self._write_series(paths.CHECKSUM, 0)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the committed records."""
        return tuple(self._series[paths.STEP])

    def append(
        self,
        step: int,
        matrices: Mapping[str, np.ndarray],
        *,
        attrs: Mapping[str, Mapping[str, Any]] | None = None,
        scalars: Mapping[str, float] | None = None,
        tokens: int | None = None,
    ) -> None:
        """Write one record and commit it.

        Args:
            step: optimizer steps done; larger than that of the last record.
            matrices: `matrix_path` or `factor_path` -> (m, n) array.
            attrs: attributes of the arrays that this record creates, by path.
            scalars: name -> value at this step.
            tokens: tokens seen so far.

        Raises:
            DynamicsError: `step` does not follow the last record's, or a shape changed.
            RecordingHeldError: another writer has taken the recording over.
        """
        attrs = {self._stored_paths.choose(path): each for path, each in (attrs or {}).items()}
        matrices = {self._stored_paths.choose(path): values for path, values in matrices.items()}
        self._check(step, matrices)
        self._lock.check()  # before chunks are written where another writer may be at work
        index = len(self.steps)
        for path, values in matrices.items():
            if path not in self._arrays:
                self._new_array(path, values.shape, str(values.dtype), attrs.get(path))
            self._uncommitted.add((path, index))
        self._metadata.make_room(matrices, index + 1)
        sync(self._write_matrices(matrices, index))
        # A dropped record may have left a matrix at this index that this record does not have.
        self._delete_uncommitted(except_for={(path, index) for path in matrices})
        logged = {name: float(value) for name, value in (scalars or {}).items()}
        seen = paths.NO_TOKENS if tokens is None else tokens
        exact = ((path, matrices[path]) for path in sorted(matrices))
        row = {
            paths.STEP: step,
            paths.TOKENS: seen,
            paths.CHECKSUM: paths.record_checksum(step, seen, logged, exact),
            **{
                self._stored_paths.choose(paths.scalar_path(name)): each
                for name, each in logged.items()
            },
        }
        self._add_row(row, index, event=False)
        self._uncommitted.clear()

    def event(self, event: Event) -> None:
        """Write one event and commit it."""
        self._add_row(_event_row(event), len(self._series[paths.event_path("step")]), event=True)

    def rewind(self, step: int, *, event: str | None = None) -> int:
        """Drop the records after `step`, and the events from `step` on.

        Events at `step` are dropped because they happened after the record of that step, and will
        happen again. The shorter lengths are committed before any chunk is deleted.

        Args:
            step: the last step that is kept.
            event: kind of an event at `step` to add in the same commit; its attributes say what was
                dropped.

        Returns:
            How many records were dropped.
        """
        steps = self.steps
        kept = bisect_right(steps, step)
        kept_events = bisect_left(self._series[paths.event_path("step")], step)  # in order
        for path, values in self._series.items():
            del values[kept_events if paths.is_event(path) else kept :]
        self._uncommitted |= {
            (path, index)
            for path in self._arrays
            if paths.is_matrix(path)
            for index in range(kept, len(steps))
        }
        if stores.is_transactional(self._store):
            self._delete_uncommitted()  # readers see nothing of this before the commit
        if event is not None:
            dropped = {"dropped_records": len(steps) - kept, "last_step": max(steps, default=None)}
            self._add_row(_event_row(Event(step, event, dropped)), kept_events, event=True)
        else:
            self._commit(f"rewound to step {step}")
        self._delete_uncommitted()
        return len(steps) - kept

    def close(self) -> None:
        """Bring the own metadata of arrays up to date, and let others write. Safe to call twice."""
        try:
            self._metadata.update_documents()
        finally:
            self.release()

    def discard(self) -> None:
        """Let others write, and delete the recording if it is this writer that began it."""
        try:
            if self._is_new:
                stores.renew(self._store)
                clear(self._store)
                stores.commit(self._store, "the recording did not begin")
                stores.remove_empty_folders(self._store)
        finally:
            self.release()
            if self._new_folder:
                stores.remove_folder(self._store)

    def release(self) -> None:
        """Let others write, and do nothing else; for use after an error."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, step: int, matrices: Mapping[str, np.ndarray]) -> None:
        if self.steps and step <= self.steps[-1]:
            raise DynamicsError(
                f"A record at step {step} cannot follow the last one, at step {self.steps[-1]}; "
                "steps must increase."
            )
        for path, values in matrices.items():
            if path in self._arrays and self._arrays[path].shape[1:] != values.shape:
                raise DynamicsError(
                    f"{paths.decoded(path)} had shape {self._arrays[path].shape[1:]} but has "
                    f"{values.shape} at step {step}; a parameter must keep its shape in a "
                    "recording."
                )

    def _add_row(self, row: Mapping[str, Any], index: int, *, event: bool) -> None:
        for path in row:
            if path not in self._arrays:  # a scalar that is logged for the first time
                self._new_series(path, "float64", float("nan"))
                self._series[path] = [float("nan")] * index
        changed = [path for path in self._series if paths.is_event(path) == event]
        step = row[paths.event_path("step") if event else paths.STEP]
        try:
            self._metadata.make_room(changed, index + 1)
            for path in changed:
                self._series[path].append(row.get(path, float("nan")))
                self._write_series(path, index)
            self._commit(f"{row[paths.event_path('kind')] if event else 'record'} at step {step}")
        except BaseException:
            for path in changed:
                del self._series[path][index:]
            raise

    async def _write_matrices(self, matrices: Mapping[str, np.ndarray], index: int) -> None:
        turn = asyncio.Semaphore(self._at_once)

        async def write(path: str, values: np.ndarray) -> None:
            async with turn:
                # A block of one record is the chunk itself, so it is not copied.
                await self._arrays[path].async_array.setitem(slice(index, index + 1), values[None])

        writes = (write(path, values) for path, values in matrices.items())
        # Wait for all: none may write a chunk after an error was raised here.
        for error in await asyncio.gather(*writes, return_exceptions=True):
            if error is not None:
                raise error

    def _write_series(self, path: str, index: int) -> None:
        """Write whole chunks from that of `index` on, so that no chunk has to be read before."""
        array, values = self._arrays[path], self._series[path]
        size = array.chunks[0]
        first = index // size * size
        padded = values[first:] + [array.fill_value] * (-len(values) % size)
        array[first : first + len(padded)] = np.asarray(padded, dtype=array.dtype)

    def _delete_uncommitted(self, except_for: Set[tuple[str, int]] = frozenset()) -> None:
        for path, index in self._uncommitted - except_for:
            stores.delete(self._store, f"{path}/{paths.chunk_key(self._arrays[path], index)}")
        self._uncommitted &= except_for

    def _new_series(self, path: str, dtype: str, fill: float | None) -> None:
        self._new_array(path, (), dtype, None, fill)
        self._series[path] = []

    def _new_array(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: str,
        attrs: Mapping[str, Any] | None,
        fill: float | None = None,
    ) -> None:
        self._enter_groups(path, create=True)
        if fill is None and dtype.startswith("float"):
            fill = float("nan")
        array = self._root.create_array(
            path,
            shape=(0, *shape),
            chunks=(1 if shape else paths.SERIES_CHUNK, *shape),
            dtype=dtype,
            fill_value=fill,
            dimension_names=paths.dimension_names(path, shape),
            attributes={**(attrs or {}), **self._stored_paths.attributes(path)},
            compressors=self._compression.codecs() if shape else _SERIES_CODECS,
            overwrite=True,  # an uncommitted record may have left one
        )
        self._metadata.add_array(path, array)
        self._arrays[path] = _endless(array)

    def _enter_groups(self, path: str, *, create: bool) -> None:
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            name = "/".join(parts[:depth])
            if name not in self._groups:
                group = self._root.require_group(name) if create else self._root[name]
                assert isinstance(group, zarr.Group)
                self._metadata.add_group(name, group)
                self._groups.add(name)

    def _commit(self, message: str) -> None:
        self._lock.check()
        self._metadata.commit()
        stores.commit(self._store, message)


def _length(series: Mapping[str, list[Any]], path: str) -> int:
    """How many entries an array has: one per event or one per record."""
    return len(series[paths.event_path("step") if paths.is_event(path) else paths.STEP])


def _endless(array: zarr.Array) -> zarr.Array:
    """The same array in memory, with a length above any other, so that it is never resized."""
    assert isinstance(array.metadata, ArrayV3Metadata)
    metadata = array.metadata.update_shape((paths.MOST_RECORDS, *array.shape[1:]))
    # Checking whether a chunk holds fill values only costs more than writing it.
    return zarr.Array(zarr.AsyncArray(metadata, array.store_path, {"write_empty_chunks": True}))


def _event_row(event: Event) -> dict[str, Any]:
    row = {"step": event.step, "kind": event.kind, "attrs": json.dumps(dict(event.attrs))}
    return {paths.event_path(column): value for column, value in row.items()}
