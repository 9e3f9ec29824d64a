"""The metadata of a recording: the root's document, which commits, and one document per array.

**Commit.** The root's document holds the shape of every array (Zarr's consolidated metadata). A
record exists as soon as this document is replaced, which is one small write. The document is made
in memory, from the arrays' own documents: `zarr.consolidate_metadata` would list the store, which
takes hundreds of milliseconds.

Where a store has transactions, the own documents of all arrays are part of each transaction
instead.

**Own documents of arrays.** Rewriting them for every record would cost more than the numbers of
small models. They are updated later: whenever the recording has doubled, and on closing. A reader
that ignores the consolidated metadata sees fewer records until then.
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
    """The metadata of a store, as its writer keeps them in memory.

    Args:
        store: of the recording.
        attrs: of its root.
        length: path of an array -> how many of its entries readers shall see.
    """

    def __init__(self, store: Store, attrs: Mapping[str, Any], length: Callable[[str], int]):
        self._store = store
        self._attrs = attrs
        self._length = length
        self._groups: dict[str, Any] = {}
        self._arrays: dict[str, Any] = {}
        self._own_lengths: dict[str, int] = {}  # as in the own documents of the arrays

    def add_group(self, path: str, group: zarr.Group) -> None:
        """Make a group visible from the next commit on."""
        self._groups[path] = _document(group)

    def add_array(self, path: str, array: zarr.Array) -> None:
        """Make an array visible from the next commit on."""
        self._arrays[path] = _document(array)
        self._own_lengths[path] = array.shape[0]

    def make_room(self, of: Iterable[str], length: int) -> None:
        """Set the length of arrays before their chunks are written.

        Icechunk accepts no chunk beyond the end of an array, and shows nothing before a commit.
        """
        if stores.is_transactional(self._store):
            for path in of:
                if self._own_lengths[path] < length:
                    self._put(path, length)

    def commit(self) -> None:
        """Make all that was written visible to readers."""
        if stores.is_transactional(self._store):
            self.update_documents()
            root = {"zarr_format": 3, "node_type": "group", "attributes": self._attrs}
            stores.put(self._store, ROOT, json.dumps(root).encode())
            return
        # Before the commit, so that no reader looks for chunks that are deleted after it.
        self.update_documents(
            path for path, own in self._own_lengths.items() if own > self._length(path)
        )
        members = self._groups | {path: self._of(path, self._length(path)) for path in self._arrays}
        root = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": self._attrs,
            "consolidated_metadata": {
                "kind": "inline",
                "must_understand": False,
                # zarr finds the members of a group only where they are listed side by side.
                "metadata": dict(sorted(members.items(), key=_depth_and_name)),
            },
        }
        stores.put(self._store, ROOT, json.dumps(root).encode())
        self.update_documents(
            path for path, own in self._own_lengths.items() if self._length(path) > 2 * own
        )

    def update_documents(self, of: Iterable[str] | None = None) -> None:
        """Bring the own documents of arrays up to date; by default those of all arrays."""
        for path in list(self._arrays if of is None else of):
            if self._own_lengths[path] != self._length(path):
                self._put(path, self._length(path))

    def _put(self, path: str, length: int) -> None:
        document = json.dumps(self._of(path, length)).encode()
        stores.put(self._store, f"{path}/{ROOT}", document)
        self._own_lengths[path] = length

    def _of(self, path: str, length: int) -> dict[str, Any]:
        document = self._arrays[path]
        return {**document, "shape": [length, *document["shape"][1:]]}


def _depth_and_name(member: tuple[str, Any]) -> tuple[int, str]:
    return member[0].count("/"), member[0]


def _document(node: zarr.Group | zarr.Array) -> Any:
    """The metadata document that zarr itself would write."""
    written = node.metadata.to_buffer_dict(default_buffer_prototype())[ROOT].to_bytes()
    document = json.loads(written)
    document.pop("consolidated_metadata", None)
    return document
