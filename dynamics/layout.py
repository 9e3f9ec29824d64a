"""The recording layout: one Zarr v3 store per run, appended record by record.

    run.zarr/               attrs: format, format_version, definitions, configuration, versions
      step      (step,)     int64, optimizer steps done
      tokens    (step,)     int64, tokens seen, -1 where unknown
      scalars/<name>        (step,) float64, NaN where nothing was logged
      weight/<parameter>    (step, out, in), one chunk per record, attrs: source_dtype
      gradient/<parameter>  the same
      adapter/<parameter>/  A (step, r, in), B (step, out, r), attrs: scaling, transposed
      events/               step, kind, attrs (JSON) along `event`

**Commit.** Chunks are written first, the arrays' own metadata with them; the record exists once
the store's root metadata is replaced, a single small object that holds the shape of every array
(Zarr's consolidated metadata). xarray and zarr read shapes from there, so that a reader sees whole
records only, also while the next one is written and after the writer was killed. Nothing is
synced to disk by force: a record survives the death of the process, not a power cut.

**Missing.** An array that got no matrix in a record has no chunk there, and reads as NaN.

bfloat16 and float8 have no Zarr data type that every reader knows; they are stored as float32,
which holds them exactly, and `source_dtype` says what they were.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import ConsolidatedMetadata, GroupMetadata
from zarr.core.sync import sync
from zarr.storage import LocalStore

from dynamics import schema
from dynamics.errors import DynamicsError, FormatError, OutputExistsError, one_line
from dynamics.origins import ABSENT, file_origin
from dynamics.run import Event

WEIGHT, GRADIENT, ADAPTER = "weight", "gradient", "adapter"
_SCALARS, _EVENTS = "scalars", "events"
_SERIES_CHUNK = 1024
_NO_TOKENS = -1
# More than any recording has: what damaged metadata may ask memory for at most.
_MOST_RECORDS, _LARGEST_MATRIX = 2**20, 2**36

StoreLike = str | Path | Store


def matrix_path(group: str, parameter: str) -> str:
    """Path of a parameter's matrices: "weight/<parameter>" or "gradient/<parameter>"."""
    return f"{group}/{parameter}"


def factor_path(parameter: str, factor: str) -> str:
    """Path of a LoRA factor, "A" or "B"."""
    return f"{ADAPTER}/{parameter}/{factor}"


class RecordingWriter:
    """Appends records to a store. One writer per store at a time; not thread-safe.

    Args:
        store: a path, or any zarr Store.
        attrs: JSON-like attributes of a new recording; ignored where an old one goes on.
        resume: go on with an existing recording instead of refusing it.

    Raises:
        OutputExistsError: the store holds a recording and `resume` is False.
        FormatError: the store holds something else.
    """

    def __init__(self, store: StoreLike, attrs: Mapping[str, Any], *, resume: bool = False):
        self._arrays: dict[str, zarr.Array] = {}
        self._groups: dict[str, zarr.Group] = {}
        if _holds_zarr(store) and not _creation_was_interrupted(store):
            recording = Recording(store)
            if not resume:
                raise OutputExistsError(
                    f"{store} already holds a recording of {len(recording.steps)} records; "
                    "resume it (resume=True) or record to another path."
                )
            self._open(recording)
        else:
            self._create(store, attrs)

    def _create(self, store: StoreLike, attrs: Mapping[str, Any]) -> None:
        if not _holds_zarr(store) and _is_occupied(store):
            raise FormatError(f"{store} exists and is no recording; choose another path.")
        self._attrs = {
            "format": schema.RECORDING_FORMAT,
            "format_version": schema.RECORDING_VERSION,
            **attrs,
        }
        self._root = zarr.create_group(_for_zarr(store), attributes=self._attrs, overwrite=True)
        self._steps: list[int] = []
        self._events = 0
        self._series("step", "int64", 0)
        self._series("tokens", "int64", _NO_TOKENS)
        for name, dtype in (("step", "int64"), ("kind", "str"), ("attrs", "str")):
            self._array(f"{_EVENTS}/{name}", (), dtype, ("event",), _SERIES_CHUNK)
        self._commit()

    def _open(self, recording: "Recording") -> None:
        self._attrs = dict(recording.attrs)
        self._steps, self._events = recording.steps.tolist(), len(recording.events)
        self._root = zarr.open_group(recording.store, mode="r+", use_consolidated=False)
        for path in recording.paths:
            self._enter_groups(path, create=False)
            array = self._root[path]
            assert isinstance(array, zarr.Array)
            self._arrays[path] = array
        self._drop_uncommitted()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of the committed records."""
        return tuple(self._steps)

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
        """
        if self._steps and step <= self._steps[-1]:
            raise DynamicsError(
                f"A record at step {step} must follow the last one, at step {self._steps[-1]}."
            )
        for path, values in matrices.items():
            if path in self._arrays and self._arrays[path].shape[1:] != values.shape:
                raise DynamicsError(
                    f"{path} had shape {self._arrays[path].shape[1:]} and now has {values.shape} "
                    f"at step {step}; a recording keeps one shape per parameter."
                )
        self._drop_uncommitted()
        for path, values in matrices.items():
            if path not in self._arrays:
                dims = ("step", *_dims(path, values.shape))
                attributes = (attrs or {}).get(path, {})
                self._array(path, values.shape, str(values.dtype), dims, 1, attributes)
        series = {f"{_SCALARS}/{name}": value for name, value in (scalars or {}).items()}
        for path in series:
            if path not in self._arrays:
                self._series(path, "float64", float("nan"))
        series |= {"step": step, "tokens": _NO_TOKENS if tokens is None else tokens}
        length = len(self._steps) + 1
        for path, array in self._arrays.items():
            if path.startswith(f"{_EVENTS}/"):
                continue
            self._resize(array, length)
            if path in matrices:
                array[length - 1] = matrices[path]
            elif len(array.shape) == 1:
                # Also where nothing was logged: the chunk may hold a dropped record's value here.
                array[length - 1] = np.asarray(series.get(path, np.nan))
        self._steps.append(step)
        self._commit()

    def event(self, event: Event) -> None:
        """Write one event and commit it."""
        row = {"step": event.step, "kind": event.kind, "attrs": json.dumps(dict(event.attrs))}
        for name, value in row.items():
            array = self._arrays[f"{_EVENTS}/{name}"]
            self._resize(array, self._events + 1)
            array[self._events] = np.asarray(value, dtype=array.dtype)
        self._events += 1
        self._commit()

    def rewind(self, step: int) -> int:
        """Drop the records after `step`, and the events from `step` on; returns how many records.

        An event at `step` happened after that step's record and will happen again. The shorter
        lengths are committed before any chunk is deleted.
        """
        kept = bisect_right(self._steps, step)
        dropped = len(self._steps) - kept
        del self._steps[kept:]
        event_steps = np.asarray(self._arrays[f"{_EVENTS}/step"][:])
        self._events = int(np.count_nonzero(event_steps < step))  # they are in order
        self._commit()
        self._drop_uncommitted()
        return dropped

    def _drop_uncommitted(self) -> None:
        """Delete the chunks behind the last commit: a killed or failed writer may leave some."""
        for path, array in self._arrays.items():
            if array.shape[0] > self._committed_length(path):
                self._resize(array, self._committed_length(path))

    def _committed_length(self, path: str) -> int:
        return self._events if path.startswith(f"{_EVENTS}/") else len(self._steps)

    def _series(self, path: str, dtype: str, fill: float) -> None:
        self._array(path, (), dtype, ("step",), _SERIES_CHUNK, fill=fill)

    def _array(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: str,
        dims: tuple[str, ...],
        chunk: int,
        attrs: Mapping[str, Any] | None = None,
        fill: float | None = None,
    ) -> None:
        self._enter_groups(path, create=True)
        if fill is None and dtype.startswith("float"):
            fill = float("nan")
        self._arrays[path] = self._root.create_array(
            path,
            shape=(0, *shape),
            chunks=(chunk, *shape),
            dtype=dtype,
            fill_value=fill,
            dimension_names=dims,
            attributes=dict(attrs or {}),
            compressors=BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")
            if shape
            else "auto",
            # Looking whether a chunk is all fill value costs more than writing it.
            config={"write_empty_chunks": True},
            overwrite=True,  # what an uncommitted record left behind
        )

    def _enter_groups(self, path: str, *, create: bool) -> None:
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            name = "/".join(parts[:depth])
            if name not in self._groups:
                group = self._root.require_group(name) if create else self._root[name]
                assert isinstance(group, zarr.Group)
                self._groups[name] = group

    @staticmethod
    def _resize(array: zarr.Array, length: int) -> None:
        if array.shape[0] != length:
            array.resize((length, *array.shape[1:]))

    def _commit(self) -> None:
        members: dict[str, Any] = {name: group.metadata for name, group in self._groups.items()}
        for path, array in self._arrays.items():
            shape = (self._committed_length(path), *array.shape[1:])
            members[path] = array.metadata.update_shape(shape)
        root = GroupMetadata(
            attributes=self._attrs,
            zarr_format=3,
            consolidated_metadata=ConsolidatedMetadata(metadata=members),
        )
        document = root.to_buffer_dict(default_buffer_prototype())["zarr.json"]
        sync((self._root.store_path / "zarr.json").set(document))


class Recording:
    """A recording as its last commit shows it, for reading.

    Raises:
        FormatError: the store holds no recording, or one of a newer version.
    """

    def __init__(self, store: StoreLike):
        self.store = _for_zarr(store)
        self._root = _opened(store)
        with self._damaged("The attributes"):
            self.attrs: dict[str, Any] = dict(self._root.attrs)
        found, version = self.attrs.get("format"), self.attrs.get("format_version")
        if found != schema.RECORDING_FORMAT:
            raise FormatError(f"{store} is a Zarr store of format {found!r}, not a recording.")
        if version != schema.RECORDING_VERSION:
            raise FormatError(
                f"{store} is a recording of version {version}; this release reads "
                f"{schema.RECORDING_VERSION}. Install a matching release."
            )
        metadata = self._root.metadata.consolidated_metadata
        if metadata is None:
            raise FormatError(
                f"{store} is a recording without a commit: its root metadata lists no arrays "
                "(no consolidated metadata). Its writer died at once, or another tool changed it."
            )
        self._arrays: dict[str, zarr.Array] = {}
        nodes = metadata.flattened_metadata.items()
        shapes = {path: node.shape for path, node in nodes if hasattr(node, "shape")}
        self.paths: tuple[str, ...] = tuple(shapes)
        for path, shape in shapes.items():
            _check_shape(f"{path} of {store}", path, shape)
        self.steps: np.ndarray = self._series("step")
        if self.steps.dtype.kind != "i" or (np.diff(self.steps) <= 0).any():
            raise FormatError(f"The steps of {store} do not increase; its metadata are damaged.")

    def array(self, path: str) -> zarr.Array:
        """The array at a path."""
        if path not in self._arrays:
            found = self._root.get(path)
            if not isinstance(found, zarr.Array):
                raise FormatError(f"{self.store} has no array {path}; its metadata are damaged.")
            self._arrays[path] = found
        return self._arrays[path]

    def attr(self, path: str, name: str, *kinds: type) -> Any:
        """An attribute of an array.

        Raises:
            FormatError: it is missing or none of the `kinds`.
        """
        with self._damaged(path):
            found = dict(self.array(path).attrs).get(name)
        if not isinstance(found, kinds):
            raise FormatError(
                f"{path} of {self.store} has {name} {found!r}; its metadata are damaged."
            )
        return found

    def _series(self, path: str) -> np.ndarray:
        with self._damaged(path):
            return np.asarray(self.array(path)[:])

    @contextmanager
    def _damaged(self, what: str) -> Iterator[None]:
        try:
            yield
        except FormatError:
            raise
        except Exception as error:  # metadata that make no sense can raise anything
            raise FormatError(f"{what} of {self.store} is damaged: {one_line(error)}.") from error

    def parameters(self, group: str) -> list[str]:
        """The parameters that `weight`, `gradient` or `adapter` holds."""
        names = (path.split("/", 2)[1] for path in self.paths if path.startswith(f"{group}/"))
        return list(dict.fromkeys(names))

    def read(self, path: str, index: int) -> np.ndarray | None:
        """The (m, n) matrix of record `index`, None where the record has none."""
        if path not in self.paths:
            return None
        array = self.array(path)
        with self._damaged(f"The chunk of {path} in record {index}"):
            # Its absence first: it would be read as a matrix of the fill value.
            return np.asarray(array[index]) if _has_chunk(array, index) else None

    def origin(self, path: str, index: int) -> str | None:
        """A token of the chunk that `read` takes its matrix from; see `Run.origin`.

        None where the store is no local directory.
        """
        if path not in self.paths:
            return ABSENT
        array = self.array(path)
        store = array.store_path.store
        if not isinstance(store, LocalStore):
            return None
        found = file_origin(store.root / array.store_path.path / _chunk_key(array, index))
        made_with = json.dumps(dict(array.attrs), sort_keys=True)  # source dtype, scaling
        return None if found is None else f"{found}|{array.dtype}|{array.shape[1:]}|{made_with}"

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """Series along the steps, float64; `tokens` among them where they were recorded."""
        series = {
            path.removeprefix(f"{_SCALARS}/"): self._series(path)
            for path in self.paths
            if path.startswith(f"{_SCALARS}/")
        }
        tokens = self._series("tokens")
        if (tokens != _NO_TOKENS).any():
            series["tokens"] = np.where(tokens == _NO_TOKENS, np.nan, tokens)
        return series

    @property
    def events(self) -> tuple[Event, ...]:
        """What happened during the run, in order."""
        columns = [self._series(f"{_EVENTS}/{name}") for name in ("step", "kind", "attrs")]
        with self._damaged(_EVENTS):
            return tuple(
                Event(int(step), str(kind), json.loads(str(attrs)))
                for step, kind, attrs in zip(*columns, strict=True)
            )


def _for_zarr(store: StoreLike) -> str | Store:
    return store if isinstance(store, Store) else str(store)


def _is_occupied(store: StoreLike) -> bool:
    if isinstance(store, Store):
        return not sync(store.is_empty(""))
    path = Path(store)
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _creation_was_interrupted(store: StoreLike) -> bool:
    """Whether a writer died before its first commit, so that there is nothing to keep."""
    root = _opened(store, use_consolidated=False)
    if root.attrs.get("format") != schema.RECORDING_FORMAT:
        return False
    steps = root.get("step")
    empty = steps is None or (isinstance(steps, zarr.Array) and steps.shape == (0,))
    return empty and _opened(store).metadata.consolidated_metadata is None


def _opened(store: StoreLike, *, use_consolidated: bool | None = None) -> zarr.Group:
    try:
        return zarr.open_group(_for_zarr(store), mode="r", use_consolidated=use_consolidated)
    except Exception as error:  # metadata that make no sense can raise anything
        raise FormatError(
            f"{store} holds no readable Zarr recording: {one_line(error)}."
        ) from error


def _holds_zarr(store: StoreLike) -> bool:
    if isinstance(store, Store):
        return bool(sync(store.exists("zarr.json")))
    return (Path(store) / "zarr.json").is_file()


def _check_shape(what: str, path: str, shape: tuple[int, ...]) -> None:
    """Refuse shapes that no recording has, before memory is asked for."""
    is_matrix = path.split("/")[0] in (WEIGHT, GRADIENT, ADAPTER)
    wanted = 3 if is_matrix else 1
    if len(shape) != wanted or shape[0] > _MOST_RECORDS or prod(shape[1:]) > _LARGEST_MATRIX:
        raise FormatError(f"{what} has the absurd shape {shape}; its metadata are damaged.")


def _has_chunk(array: zarr.Array, index: int) -> bool:
    return bool(sync((array.store_path / _chunk_key(array, index)).exists()))


def _chunk_key(array: zarr.Array, index: int) -> str:
    return array.metadata.encode_chunk_key((index, *(0 for _ in array.shape[1:])))


def _dims(path: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    rows, cols = shape
    if path.startswith(f"{ADAPTER}/"):
        return (
            (f"rank_{rows}", f"in_{cols}")
            if path.endswith("/A")
            else (f"out_{rows}", f"rank_{cols}")
        )
    return f"out_{rows}", f"in_{cols}"
