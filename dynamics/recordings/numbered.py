"""Recordings side by side: run.zarr, run-2.zarr, run-3.zarr, ..."""

import re
from collections.abc import Iterable
from pathlib import Path

from zarr.core.sync import sync
from zarr.storage import LocalStore

from dynamics.errors import FormatError
from dynamics.recordings import lock, stores
from dynamics.recordings.reader import Recording
from dynamics.recordings.stores import StoreLike


def can_be_numbered(store: StoreLike) -> bool:
    """Whether there can be stores beside this one: paths, URLs and local stores have names."""
    return isinstance(store, (str, Path, LocalStore))


def numbered(store: StoreLike, number: int) -> StoreLike:
    """The store of a number; 1 is the store itself.

    >>> numbered("s3://bucket/run.zarr", 2)
    's3://bucket/run-2.zarr'
    """
    if number == 1:
        return store
    if isinstance(store, LocalStore):
        root = numbered(store.root, number)
        assert isinstance(root, Path)
        return LocalStore(root)
    if isinstance(store, Path):
        return store.with_name(f"{store.stem}-{number}{store.suffix}")
    folder, slash, name = str(store).rstrip("/").rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    return f"{folder}{slash}{stem or suffix}-{number}{dot + suffix if stem else ''}"


def existing_numbers(store: StoreLike) -> list[int]:
    """The numbers of the stores that are there, ascending. What they hold is not looked at."""
    folder, name = _folder_and_name(store)
    stem, dot, suffix = name.rpartition(".")
    stem, ending = (stem, dot + suffix) if stem else (suffix, "")
    pattern = re.compile(rf"{re.escape(stem)}(?:-([1-9]\d*))?{re.escape(ending)}")
    matches = map(pattern.fullmatch, _names_in(folder))
    return sorted({int(match[1] or 1) for match in matches if match and match[1] != "1"})


def name_of(store: StoreLike) -> str:
    """The name of a store in its folder; "" for one that has none."""
    return _folder_and_name(store)[1] if can_be_numbered(store) else ""


def recording_to_continue(
    store: StoreLike, latest: Iterable[int], name: str | None = None
) -> StoreLike | None:
    """The one of the numbered recordings that a resumed training continues.

    It is the one that is called `name`. Without a name, or where that one is gone, it is the newest
    one that reaches up to the step at which training resumes.

    Args:
        store: the store with number 1.
        latest: the last steps that a recording of this training should hold. The writer may have
            died before it wrote all of them: a recording that holds or passes one of them fits.
        name: of the store that the interrupted training recorded to, if that is known.

    Returns:
        None if none of them fits, or another writer is at work in the one that does.
    """
    reached = min(latest, default=-1)
    candidates = [numbered(store, number) for number in reversed(existing_numbers(store))]
    candidates.sort(key=lambda each: name_of(each) != name)  # stable: the newest stay first
    for candidate in candidates:
        try:
            steps = Recording(candidate).steps
        except FormatError:
            continue
        if name_of(candidate) == name or (len(steps) and steps[-1] >= reached):
            return None if lock.held_by(stores.for_writing(candidate)) else candidate
    return None


def _folder_and_name(store: StoreLike) -> tuple[str, str]:
    path = store.root if isinstance(store, LocalStore) else store
    folder, slash, name = str(path).rstrip("/").rpartition("/")
    return folder + slash, name


def _names_in(folder: str) -> list[str]:
    if "://" not in folder:
        path = Path(folder)
        return [each.name for each in path.iterdir()] if path.is_dir() else []
    store = stores.for_writing(folder.rstrip("/"))

    async def listed() -> list[str]:
        return [name.strip("/") async for name in store.list_dir("")]

    return sync(listed())
