"""Reading a recording as of its last commit."""

import json
from typing import Any

import numpy as np
import zarr
from zarr.core.sync import sync
from zarr.storage import LocalStore

from dynamics import schema
from dynamics.errors import FormatError
from dynamics.recordings import paths, stores
from dynamics.recordings.stored_paths import StoredPaths
from dynamics.recordings.stores import StoreLike
from dynamics.runs.origins import ABSENT, file_origin
from dynamics.runs.run import Event


class Recording:
    """A recording as of its last commit, for reading.

    Args:
        store: a path, a URL, any zarr Store, or an Icechunk repository.
        until: show the recording as `RecordingWriter.rewind` to this step would leave it.

    Raises:
        FormatError: the store holds no recording, a damaged one, or one of a newer version.
    """

    def __init__(self, store: StoreLike, *, until: int | None = None):
        self.store, self._until = store, until
        where = stores.store_name(store)
        self._root = stores.open_root(store)
        with stores.reporting_damage("The attributes", self.store):
            self.attrs: dict[str, Any] = dict(self._root.attrs)
        format, version = self.attrs.get("format"), self.attrs.get("format_version")
        if format != schema.RECORDING_FORMAT:
            raise FormatError(f"{where} is a Zarr store of format {format!r}, not a recording.")
        if version not in range(1, schema.RECORDING_VERSION + 1):
            raise FormatError(
                f"{where} is a recording of version {version}; this release reads 1 to "
                f"{schema.RECORDING_VERSION}. Install a matching release."
            )
        with stores.reporting_damage("The metadata", self.store):
            nodes = stores.nodes_of(self._root)
        if nodes is None:
            raise FormatError(
                f"{where} is a recording without a commit: its root metadata lists no arrays "
                "(no consolidated metadata). Its writer died at once, or another tool changed it; "
                "record again."
            )
        self._arrays: dict[str, zarr.Array] = {}
        shapes = {path: node.shape for path, node in nodes.items() if hasattr(node, "shape")}
        self.paths: tuple[str, ...] = tuple(shapes)
        self.stored_paths = StoredPaths({path: nodes[path] for path in self.paths})
        for path, shape in shapes.items():
            paths.check_shape(f"{path} of {where}", path, shape)
        self.steps: np.ndarray = self.series(paths.STEP)
        if self.steps.dtype.kind != "i" or (np.diff(self.steps) <= 0).any():
            raise FormatError(f"The steps of {where} do not increase; its metadata are damaged.")
        if until is not None:
            self.steps = self.steps[self.steps <= until]

    def array(self, path: str) -> zarr.Array:
        """The array at a path."""
        path = self.stored_paths.find(path)
        if path not in self._arrays:
            node = self._root.get(path)
            if not isinstance(node, zarr.Array):
                raise FormatError(
                    f"{stores.store_name(self.store)} has no array {path}; its metadata are "
                    "damaged."
                )
            self._arrays[path] = node
        return self._arrays[path]

    def attr(self, path: str, name: str, *kinds: type) -> Any:
        """An attribute of an array.

        Raises:
            FormatError: it is missing, or not of one of the `kinds`.
        """
        with stores.reporting_damage(path, self.store):
            value = dict(self.array(path).attrs).get(name)
        if not isinstance(value, kinds):
            raise FormatError(
                f"{path} of {stores.store_name(self.store)} has {name} {value!r}; its metadata are "
                "damaged."
            )
        return value

    def series(self, path: str) -> np.ndarray:
        """The numbers of an array with one number per record, or one per event."""
        with stores.reporting_damage(path, self.store):
            return np.asarray(self.array(path)[:])

    def parameters(self, group: str) -> list[str]:
        """Names of the parameters in the group `weight`, `gradient` or `adapter`."""
        names = (place.name for place in self.stored_paths.places.values() if place.group == group)
        return list(dict.fromkeys(names))

    def read(self, path: str, index: int) -> np.ndarray | None:
        """The (m, n) matrix of record `index`; None where the record has none."""
        path = self.stored_paths.find(path)
        if path not in self.paths:
            return None
        array = self.array(path)
        with stores.reporting_damage(f"The chunk of {path} in record {index}", self.store):
            # Looked up first: zarr reads a missing chunk as a matrix of fill values.
            return np.asarray(array[index]) if _has_chunk(array, index) else None

    def has(self, path: str, index: int) -> bool:
        """Whether record `index` has this matrix."""
        path = self.stored_paths.find(path)
        return path in self.paths and _has_chunk(self.array(path), index)

    def origin(self, path: str, index: int) -> str | None:
        """A token of the chunk that `read` reads; see `Run.origin`.

        None where the store is not a local directory.
        """
        path = self.stored_paths.find(path)
        if path not in self.paths:
            return ABSENT
        array = self.array(path)
        store = array.store_path.store
        if not isinstance(store, LocalStore):
            return None
        file = file_origin(store.root / array.store_path.path / paths.chunk_key(array, index))
        made_with = json.dumps(dict(array.attrs), sort_keys=True)  # source dtype, scaling
        return None if file is None else f"{file}|{array.dtype}|{array.shape[1:]}|{made_with}"

    @property
    def scalars(self) -> dict[str, np.ndarray]:
        """Series along the steps, float64; `tokens` among them where they were recorded."""
        series = {
            place.name: self.series(path)
            for path, place in self.stored_paths.places.items()
            if place.group == paths.SCALARS
        }
        tokens = self.series(paths.TOKENS)
        if (tokens != paths.NO_TOKENS).any():
            series["tokens"] = np.where(tokens == paths.NO_TOKENS, np.nan, tokens)
        return series

    @property
    def events(self) -> tuple[Event, ...]:
        """What happened during the run, in order."""
        columns = [self.series(paths.event_path(column)) for column in paths.EVENT_COLUMNS]
        with stores.reporting_damage(paths.EVENTS, self.store):
            return tuple(
                Event(int(step), str(kind), json.loads(str(attrs)))
                for step, kind, attrs in zip(*columns, strict=True)
                if self._until is None or step < self._until
            )


def _has_chunk(array: zarr.Array, index: int) -> bool:
    return bool(sync((array.store_path / paths.chunk_key(array, index)).exists()))
