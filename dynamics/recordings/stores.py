"""Stores by path, URL or zarr Store: what they hold, and single objects in them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
    """What zarr opens: it knows paths, URLs and stores.

    Raises:
        DynamicsError: an Icechunk repository without the package.
        FormatError: one that cannot be read.
    """
    if (repository := _repository(store)) is not None:
        return transactions.for_reading(repository)
    return store if isinstance(store, Store) else str(store)


def for_writing(store: StoreLike) -> Store:
    """The zarr Store behind a path or URL; nothing is made.

    Raises:
        DynamicsError: a URL or repository without the packages that it needs, or the store of a
            single session of Icechunk.
        FormatError: a path that is a file, or a URL of an unknown protocol.
    """
    if (repository := _repository(store)) is not None:
        return TransactionalStore(repository)
    if transactions.is_session_store(store):
        raise DynamicsError(
            "A session of Icechunk ends with its first commit: give the Repository itself to the "
            "recorder, which commits every record."
        )
    if isinstance(store, Store):
        return store
    assert not transactions.is_repository(store)
    if "://" not in str(store):
        if Path(store).is_file():
            raise FormatError(f"{store} exists and is no recording; choose another path.")
        return LocalStore(Path(store))
    try:
        # Another process may have written since a listing was kept.
        return FsspecStore.from_url(str(store), storage_options={"use_listings_cache": False})
    except ImportError as missing:
        raise require_extra("remote", missing) from missing
    except ValueError as error:
        raise FormatError(f"{store} cannot be opened: {one_line(error)}.") from error


def told(store: StoreLike) -> str:
    """The store as messages name it."""
    if transactions.is_repository(store):
        return transactions.told(store)
    return str(store.root) if isinstance(store, LocalStore) else str(store)


def opened(store: StoreLike, *, use_consolidated: bool | None = None) -> zarr.Group:
    """The root group, for reading.

    Raises:
        FormatError: there is none.
    """
    try:
        return zarr.open_group(for_reading(store), mode="r", use_consolidated=use_consolidated)
    except Exception as error:  # metadata that make no sense can raise anything
        raise FormatError(
            f"{told(store)} holds no readable Zarr recording: {one_line(error)}."
        ) from error


def commit(store: Store, message: str) -> None:
    """Show what was written where a store has transactions; others show everything at once.

    Raises:
        RecordingHeldError: somebody else has committed in between.
    """
    if isinstance(store, TransactionalStore):
        store.commit(message)


def renew(store: Store) -> None:
    """Forget what was not committed where a store has transactions."""
    if isinstance(store, TransactionalStore):
        store.renew()


def is_transactional(store: Store) -> bool:
    """Whether readers see whole commits only, so that every array tells its own length."""
    return not store.supports_consolidated_metadata


def nodes_of(root: zarr.Group) -> Mapping[str, Any] | None:
    """Path -> metadata of all that a commit shows; None where there was none."""
    if is_transactional(root.store):
        return {path: node.metadata for path, node in root.members(max_depth=None)}
    consolidated = root.metadata.consolidated_metadata
    return None if consolidated is None else consolidated.flattened_metadata


def _repository(store: StoreLike) -> "Repository | None":
    if transactions.is_repository(store):
        return store
    if isinstance(store, Path) or (isinstance(store, str) and "://" not in store):
        path = Path(store)
        return transactions.opened_folder(path) if transactions.is_repository_folder(path) else None
    return None


def holds_zarr(store: Store) -> bool:
    """Whether the store has a root group or array."""
    return bool(sync(store.exists(ROOT)))


def is_occupied(store: Store) -> bool:
    """Whether the store holds anything but a writer's lock."""
    if isinstance(store, LocalStore) and not store.root.is_dir():
        return False
    top = WRITER.split("/")[0]

    async def anything() -> bool:
        names = {name.strip("/") async for name in store.list_dir("")}
        if names - {top}:
            return True
        # Icechunk lists no prefix that does not exist.
        return any([key != WRITER async for key in store.list_prefix(f"{top}/")] if names else [])

    return sync(anything())


def keys_of(store: Store) -> list[str]:
    """Every key of the store."""
    if isinstance(store, FsspecStore):
        store.fs.invalidate_cache()  # listings of an earlier look

    async def listed() -> list[str]:
        return [key async for key in store.list_prefix("")]

    return sorted(sync(listed()))


def get(store: Store, key: str) -> bytes | None:
    """An object's bytes; None where there is none."""
    found = sync(store.get(key, prototype=default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def put(store: Store, key: str, content: bytes) -> None:
    """Write an object as a whole."""
    sync(store.set(key, default_buffer_prototype().buffer.from_bytes(content)))


def put_new(store: Store, key: str, content: bytes) -> None:
    """Write an object unless it exists, at once where the store can do so."""
    buffer = default_buffer_prototype().buffer.from_bytes(content)
    try:
        sync(store.set_if_not_exists(key, buffer))
    except OSError:
        # zarr makes a hard link, which some file systems do not have.
        if not sync(store.exists(key)):
            sync(store.set(key, buffer))


def delete(store: Store, key: str) -> None:
    """Delete an object; it may be gone already."""
    sync(store.delete(key))


@contextmanager
def damaged(what: str, store: StoreLike) -> Iterator[None]:
    """Turns whatever is raised within into a FormatError: damage can raise anything."""
    try:
        yield
    except FormatError:
        raise
    except Exception as error:
        raise FormatError(f"{what} of {told(store)} is damaged: {one_line(error)}.") from error
