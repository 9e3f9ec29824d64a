"""What killed writers leave in a store: chunks without a commit, and temporary files."""

import re
from collections.abc import Mapping

from zarr.abc.store import Store

from dynamics import schema
from dynamics.recordings import paths, stores

# zarr first writes a local file under such a name, beside its final one.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.partial$")
_CHUNK = re.compile(r"(?P<path>.+)/c/(?P<index>\d+)(/0)*$")


def leftovers(keys: list[str], lengths: Mapping[str, int]) -> list[str]:
    """The keys of a store that belong to no commit, so that no reader sees them.

    Args:
        keys: all keys of the store.
        lengths: path of each committed array -> its committed length.
    """
    unseen = []
    for key in keys:
        chunk = _CHUNK.match(key)
        if _TEMPORARY.search(key):
            unseen.append(key)
        elif chunk is not None:
            path, index = chunk["path"], int(chunk["index"])
            size = 1 if paths.is_matrix(path) else paths.SERIES_CHUNK
            if index * size >= lengths.get(path, 0):
                unseen.append(key)
    return unseen


def drop_leftovers(store: Store, lengths: Mapping[str, int]) -> None:
    """Delete the leftovers. Only the writer may: a leftover may be its next record."""
    for key in leftovers(stores.keys_of(store), lengths):
        stores.delete(store, key)


def was_never_begun(store: Store) -> bool:
    """Whether a writer died before its first commit, so that nothing has to be kept."""
    if (
        stores.open_root(store, use_consolidated=False).attrs.get("format")
        != schema.RECORDING_FORMAT
    ):
        return False
    if stores.nodes_of(stores.open_root(store)) is not None:
        return False
    return not any(key.startswith(f"{paths.STEP}/c/") for key in stores.keys_of(store))


def clear(store: Store) -> None:
    """Delete everything but the lock."""
    for key in stores.keys_of(store):
        if key != paths.WRITER:
            stores.delete(store, key)
