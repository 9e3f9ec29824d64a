"""Stores by path, URL or zarr Store: opening them, and reading and writing single objects."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from dynamics.errors import DynamicsError, FormatError, one_line, require_extra
from dynamics.recordings import transactions
from dynamics.recordings.paths import ROOT, WRITER
from dynamics.recordings.transactions import TransactionalStore

if TYPE_CHECKING:
    from icechunk import Repository

# A path, a URL, a zarr Store, or an Icechunk repository.
StoreLike = Union[str, Path, Store, "Repository"]


def for_reading(store: StoreLike) -> str | Store:
    """What to give to zarr, which opens paths, URLs and stores.

    Raises:
        DynamicsError: the store is an Icechunk repository, and icechunk is not installed.
        FormatError: the repository cannot be read.
    """
    if (repository := _repository(store)) is not None:
        return transactions.for_reading(repository)
    return store if isinstance(store, Store) else str(store)


def for_writing(store: StoreLike) -> Store:
    """The zarr Store at a path or URL; nothing is created yet.

    Raises:
        DynamicsError: the packages for a URL or repository are not installed, or it is the store of
            a single session of Icechunk.
        FormatError: the path is a file, or the URL has an unknown protocol.
    """
    if (repository := _repository(store)) is not None:
        return TransactionalStore(repository)
    if transactions.is_session_store(store):
        raise DynamicsError(
            "A session of Icechunk ends with its first commit, and the recorder commits every "
            "record; give the Repository instead."
        )
    if isinstance(store, Store):
        if store.read_only:
            raise DynamicsError(f"{store_name(store)} was opened for reading only; open it anew.")
        return store
    assert not transactions.is_repository(store)
    if "://" not in str(store):
        if Path(store).is_file():
            raise FormatError(f"{store} exists and is not a recording; choose another path.")
        return LocalStore(Path(store))
    try:
        # Another process may have written since the last listing.
        return FsspecStore.from_url(str(store), storage_options={"use_listings_cache": False})
    except ImportError as missing:
        raise require_extra("remote", missing) from missing
    except ValueError as error:
        raise FormatError(f"{store} cannot be opened: {one_line(error)}.") from error


def absolute(store: object) -> StoreLike:
    """The same store, at a path that does not depend on the current directory.

    Raises:
        DynamicsError: it is none of the things that can be a store.
    """
    if isinstance(store, LocalStore) and type(store) is LocalStore and not store.root.is_absolute():
        return LocalStore(store.root.absolute(), read_only=store.read_only)
    if isinstance(store, Store) or transactions.is_repository(store):
        return store
    text = os.fspath(store) if isinstance(store, (str, os.PathLike)) else ""
    if not isinstance(text, str) or not text.strip():
        raise DynamicsError(
            "store takes a path, a URL, a zarr Store or an Icechunk repository; found "
            f"{store if isinstance(store, Path) else repr(store)}."
        )
    if "://" in text and isinstance(store, str):
        return store
    if not isinstance(store, str) and re.match(r"[a-z][a-z0-9+]+:/", text):
        raise DynamicsError(
            f"store takes a URL as text, because a Path loses one of its slashes; found {text}."
        )
    return Path(os.path.abspath(text))


def store_name(store: StoreLike) -> str:
    """How messages call the store: its path or URL."""
    if transactions.is_repository(store):
        return transactions.repository_name(store)
    return str(store.root) if isinstance(store, LocalStore) else str(store)


def open_root(store: StoreLike, *, use_consolidated: bool | None = None) -> zarr.Group:
    """The root group of a store, for reading.

    Raises:
        FormatError: the store has no readable root group.
    """
    try:
        return zarr.open_group(for_reading(store), mode="r", use_consolidated=use_consolidated)
    except Exception as error:  # damaged metadata can raise anything
        raise FormatError(
            f"{store_name(store)} holds no readable Zarr recording: {one_line(error)}."
        ) from error


def commit(store: Store, message: str) -> None:
    """Commit the transaction of a store that has them; other stores show every write at once.

    Raises:
        RecordingHeldError: another writer has committed in between.
    """
    if isinstance(store, TransactionalStore):
        store.commit(message)


def renew(store: Store) -> None:
    """Drop what was not committed, in a store that has transactions."""
    if isinstance(store, TransactionalStore):
        store.renew()


def is_transactional(store: Store) -> bool:
    """Whether the store has transactions; the own document of an array then has its length."""
    return not store.supports_consolidated_metadata


def nodes_of(root: zarr.Group) -> Mapping[str, Any] | None:
    """Path -> metadata of each group and array; None where nothing was committed yet."""
    if is_transactional(root.store):
        return {path: node.metadata for path, node in root.members(max_depth=None)}
    consolidated = root.metadata.consolidated_metadata
    return None if consolidated is None else consolidated.flattened_metadata


def _repository(store: StoreLike) -> "Repository | None":
    if transactions.is_repository(store):
        return store
    if isinstance(store, Path) or (isinstance(store, str) and "://" not in store):
        path = Path(store)
        return transactions.open_folder(path) if transactions.is_repository_folder(path) else None
    return None


def holds_zarr(store: Store) -> bool:
    """Whether the store has a root group or array."""
    return bool(sync(store.exists(ROOT)))


def is_occupied(store: Store) -> bool:
    """Whether the store holds anything besides a writer's lock."""
    if isinstance(store, LocalStore) and not store.root.is_dir():
        return False
    top = WRITER.split("/")[0]

    async def anything() -> bool:
        names = {name.strip("/") async for name in store.list_dir("")}
        if names - {top}:
            return True
        # Icechunk cannot list a prefix that does not exist.
        return any([key != WRITER async for key in store.list_prefix(f"{top}/")] if names else [])

    return sync(anything())


def keys_of(store: Store) -> list[str]:
    """Every key of the store."""
    if isinstance(store, FsspecStore):
        store.fs.invalidate_cache()  # earlier listings may be old

    async def listed() -> list[str]:
        return [key async for key in store.list_prefix("")]

    return sorted(sync(listed()))


def get(store: Store, key: str) -> bytes | None:
    """The bytes of an object; None where it does not exist."""
    content = sync(store.get(key, prototype=default_buffer_prototype()))
    return None if content is None else content.to_bytes()


def put(store: Store, key: str, content: bytes) -> None:
    """Write a whole object."""
    sync(store.set(key, default_buffer_prototype().buffer.from_bytes(content)))


def put_new(store: Store, key: str, content: bytes) -> None:
    """Write an object unless it exists; atomic where the store supports that."""
    buffer = default_buffer_prototype().buffer.from_bytes(content)
    try:
        sync(store.set_if_not_exists(key, buffer))
    except OSError:
        # zarr makes a hard link; some file systems do not support them.
        if not sync(store.exists(key)):
            sync(store.set(key, buffer))


def delete(store: Store, key: str) -> None:
    """Delete an object, if it exists."""
    sync(store.delete(key))


def folder_exists(store: Store) -> bool:
    """Whether the folder of a local store is there; False for other stores, which have none."""
    return isinstance(store, LocalStore) and store.root.is_dir()


def remove_empty_folders(store: Store) -> None:
    """Remove the folders in the folder of a local store in which no file lies; it stays itself.

    Only the holder of the lock may: another writer may have made a folder for its next file.
    """
    if isinstance(store, LocalStore):
        for folder, _, _ in os.walk(store.root, topdown=False):
            if Path(folder) != store.root:
                with suppress(OSError):  # not empty
                    os.rmdir(folder)


def remove_folder(store: Store) -> None:
    """Remove the folder of a local store, if nothing but the empty one of the lock lies in it."""
    if isinstance(store, LocalStore):
        for folder in (store.root / WRITER.split("/")[0], store.root):
            with suppress(OSError):  # not empty, or not there
                os.rmdir(folder)


@contextmanager
def reporting_damage(what: str, store: StoreLike) -> Iterator[None]:
    """Turn any error within the block into a FormatError: damaged data can raise anything."""
    try:
        yield
    except FormatError:
        raise
    except Exception as error:
        raise FormatError(
            f"{what} of {store_name(store)} is damaged: {one_line(error)}."
        ) from error
