"""Stores by path, URL or zarr Store: what they hold, and single objects in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore

from dynamics.errors import FormatError, one_line, require_extra
from dynamics.layout.paths import ROOT, WRITER

StoreLike = str | Path | Store


def for_reading(store: StoreLike) -> str | Store:
    """What zarr opens: it knows paths, URLs and stores."""
    return store if isinstance(store, Store) else str(store)


def for_writing(store: StoreLike) -> Store:
    """The zarr Store behind a path or URL; nothing is made.

    Raises:
        DynamicsError: a URL without the packages that it needs.
        FormatError: a path that is a file, or a URL of an unknown protocol.
    """
    if isinstance(store, Store):
        return store
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


def holds_zarr(store: Store) -> bool:
    """Whether the store has a root group or array."""
    return bool(sync(store.exists(ROOT)))


def is_occupied(store: Store) -> bool:
    """Whether the store holds anything but a writer's lock."""
    if isinstance(store, LocalStore) and not store.root.is_dir():
        return False
    top = WRITER.split("/")[0]

    async def anything() -> bool:
        async for name in store.list_dir(""):
            if name.strip("/") != top:
                return True
        async for key in store.list_prefix(f"{top}/"):
            if key != WRITER:
                return True
        return False

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
