"""The metadata of a recording's arrays: one document that commits, and one that follows per array.

**Commit.** The root's document holds the shape of every array (Zarr's consolidated metadata), and
a record exists once it is replaced, by one small write. It is made from the arrays' own documents
in memory: `zarr.consolidate_metadata` lists the store, which takes hundreds of milliseconds.

Where a store has transactions, all arrays' own documents are part of each instead.

**Arrays' own documents.** Rewriting them for every record would cost more than the numbers of
small models. They follow the commits: whenever the recording has doubled, and on closing. A reader
that passes the consolidated metadata over sees fewer records until then.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype

from dynamics.recordings import stores
from dynamics.recordings.paths import ROOT


class Metadata:
    """What a writer knows of its store's metadata.

    Args:
        store: of the recording.
        attrs: of its root.
        length: path of an array -> how many entries of it are to be shown.
    """

    def __init__(self, store: Store, attrs: Mapping[str, Any], length: Callable[[str], int]):
        self._store = store
        self._attrs = attrs
        self._length = length
        self._groups: dict[str, Any] = {}
        self._arrays: dict[str, Any] = {}
        self._told: dict[str, int] = {}  # lengths as the arrays' own documents have them

    def add_group(self, path: str, group: zarr.Group) -> None:
        """Show a group from the next commit on."""
        self._groups[path] = _document(group)

    def add_array(self, path: str, array: zarr.Array) -> None:
        """Show an array from the next commit on."""
        self._arrays[path] = _document(array)
        self._told[path] = array.shape[0]

    def make_room(self, of: Iterable[str], length: int) -> None:
        """Let arrays have this length before their chunks are written.

        Icechunk takes no chunk beyond an array's end, and shows nothing before its commit anyway.
        """
        if stores.is_transactional(self._store):
            for path in of:
                if self._told[path] < length:
                    self._put(path, length)

    def commit(self) -> None:
        """Show what is written."""
        if stores.is_transactional(self._store):
            self.tell()
            root = {"zarr_format": 3, "node_type": "group", "attributes": self._attrs}
            stores.put(self._store, ROOT, json.dumps(root).encode())
            return
        # Before the commit, so that nobody looks for chunks that are deleted after it.
        self.tell(path for path, told in self._told.items() if told > self._length(path))
        members = self._groups | {path: self._of(path, self._length(path)) for path in self._arrays}
        root = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": self._attrs,
            "consolidated_metadata": {
                "kind": "inline",
                "must_understand": False,
                # zarr finds the members of a group only where they stand side by side.
                "metadata": dict(sorted(members.items(), key=_depth_and_name)),
            },
        }
        stores.put(self._store, ROOT, json.dumps(root).encode())
        self.tell(path for path, told in self._told.items() if self._length(path) > 2 * told)

    def tell(self, of: Iterable[str] | None = None) -> None:
        """Bring the own documents of arrays up to date; of all by default."""
        for path in list(self._arrays if of is None else of):
            if self._told[path] != self._length(path):
                self._put(path, self._length(path))

    def _put(self, path: str, length: int) -> None:
        document = json.dumps(self._of(path, length)).encode()
        stores.put(self._store, f"{path}/{ROOT}", document)
        self._told[path] = length

    def _of(self, path: str, length: int) -> dict[str, Any]:
        document = self._arrays[path]
        return {**document, "shape": [length, *document["shape"][1:]]}


def _depth_and_name(member: tuple[str, Any]) -> tuple[int, str]:
    return member[0].count("/"), member[0]


def _document(node: zarr.Group | zarr.Array) -> Any:
    """What zarr itself would write."""
    written = node.metadata.to_buffer_dict(default_buffer_prototype())[ROOT].to_bytes()
    document = json.loads(written)
    document.pop("consolidated_metadata", None)
    return document
