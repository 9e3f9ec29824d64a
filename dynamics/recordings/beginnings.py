"""What a store holds when a writer comes: nothing, a recording, or what a killed writer left."""

import json
import re
from collections.abc import Mapping

from zarr.abc.store import Store

from dynamics import schema
from dynamics.errors import FormatError, OutputExistsError
from dynamics.recordings import paths, stores
from dynamics.recordings.reader import Recording

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


def existing_recording(
    store: Store, *, resume: bool = False, overwrite: bool = False
) -> Recording | None:
    """The recording in a store that shall be continued; None where a new one may begin.

    Args:
        store: opened for writing. Nothing is written.
        resume: whether a recording may be continued.
        overwrite: whether it may be replaced, also where it is damaged.

    Raises:
        OutputExistsError: there is a recording, and neither is allowed.
        FormatError: there is something else, or what shall be continued is damaged.
    """
    name = stores.store_name(store)
    if not stores.holds_zarr(store):
        if stores.is_occupied(store):
            raise FormatError(f"{name} exists and is not a recording; choose another path.")
        return None
    if _was_never_begun(store) or (overwrite and _is_recording(store)):
        return None
    recording = Recording(store)
    if not resume:
        raise OutputExistsError(
            f"{name} already holds a recording of {len(recording.steps)} records; resume it "
            "(resume_at=STEP), choose if_exists='next' or 'overwrite', or record to another path."
        )
    return recording


def _was_never_begun(store: Store) -> bool:
    """Whether a writer died before its first commit, so that nothing has to be kept."""
    if not _is_recording(store):
        return False
    if stores.nodes_of(stores.open_root(store)) is not None:
        return False
    return not any(key.startswith(f"{paths.STEP}/c/") for key in stores.keys_of(store))


def _is_recording(store: Store) -> bool:
    """Whether the root says so, be the rest sound or damaged."""
    root = stores.open_root(store, use_consolidated=False)
    return bool(root.attrs.get("format") == schema.RECORDING_FORMAT)


def clear(store: Store) -> None:
    """Delete the recording, but not the lock, and nothing that is not of a recording."""
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"format": schema.RECORDING_FORMAT},
    }
    # In this order, a writer that dies meanwhile leaves a recording that was never begun.
    if stores.holds_zarr(store):
        stores.put(store, paths.ROOT, json.dumps(root).encode())
    ours = [
        key
        for key in stores.keys_of(store)
        if key.split("/")[0] in paths.MEMBERS or _TEMPORARY.search(key)
    ]
    for key in sorted(ours, key=lambda key: not key.startswith(f"{paths.STEP}/")):
        stores.delete(store, key)
    if stores.holds_zarr(store):
        stores.delete(store, paths.ROOT)
