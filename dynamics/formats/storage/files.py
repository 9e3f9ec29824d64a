"""Files of a run, on a disk or behind a URL: list them, keep inside the run, read byte ranges.

A URL (s3://, gs://, https://) becomes a `universal_pathlib.UPath`, which offers pathlib's
methods on top of fsspec, and hf:// a `HubPath`. Everything else is a `pathlib.Path`. Formats use
the methods that all have. They read the bytes of tensors with `read_range`, so that only the needed
bytes are fetched.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, cast

from dynamics.errors import DynamicsError, FormatError, one_line, require_extra
from dynamics.formats.storage.hub.path import HubPath, hub_path
from dynamics.runs.origins import file_origin

_LISTINGS: ContextVar[dict[Path, list["Entry"]] | None] = ContextVar("listings", default=None)
# How a file begins that Git LFS put in the place of another, and how long it is at most.
_POINTER, _LONGEST_POINTER = b"version https://git-lfs.github.com/spec/v1\n", 1024
# A local file system raises these where a file is missing, forbidden, or not text.
_UNREADABLE = (OSError, ValueError)


def located(path: str | Path) -> Path:
    """The path as formats use it: a Path, or a UPath for a URL.

    Raises:
        DynamicsError: the packages that a URL needs are not installed.
        FormatError: a URL has an unknown protocol.
    """
    if not isinstance(path, str) or "://" not in path:
        return Path(path) if isinstance(path, str) else path
    if (on_hub := hub_path(path)) is not None:
        return cast(Path, on_hub)
    try:
        from upath import UPath

        url = UPath(path)
        url.fs.invalidate_cache()  # a run in progress grows: earlier listings may be old
    except ImportError as missing:
        if missing.name is not None:
            raise require_extra("remote", missing) from missing
        raise FormatError(  # fsspec's message names the package for the protocol
            f"{path} cannot be opened: {one_line(missing)}; "
            "pip install 'learning-dynamics[remote]'."
        ) from missing
    except Exception as error:
        raise FormatError(f"{path} cannot be opened: {one_line(error)}.") from error
    return cast(Path, url)


def is_remote(path: Path) -> bool:
    """Whether `path` stands for a URL."""
    return not isinstance(path, Path)


@contextmanager
def reporting_unreadable(path: Path) -> Iterator[None]:
    """Turn errors of the file system within the block into a FormatError that names `path`."""
    try:
        yield
    except DynamicsError:
        raise
    except _UNREADABLE as error:
        raise unreadable_error(path, error) from error
    except Exception as error:
        if not is_remote(path):
            raise
        raise unreadable_error(path, error) from error  # remote back ends raise errors of their own


def root_of(path: Path) -> Path:
    """The directory that no file of a run at `path` may lead out of.

    Usually `path` itself. For a snapshot in a Hugging Face cache it is the folder of the
    repository, because the files of a snapshot are links to its `blobs/`.
    """
    above = path.parent.parent
    if path.parent.name == "snapshots" and (above / "blobs").is_dir():
        return above
    return path


def contained(path: Path, root: Path) -> Path:
    """`path`, after a check that it leads to a file within `root`.

    Raises:
        FormatError: a link, or a name with `..`, leads outside.
    """
    if is_remote(path):
        return path  # has no links; names from an index are checked where the index is read
    real, allowed = path.resolve(), root.resolve()
    if not real.is_relative_to(allowed):
        raise FormatError(
            f"{path} leads to {real}, outside of {allowed}; files outside of a run are not read. "
            "Copy the file into the run, or open a directory that holds both."
        )
    return path


def plain_name(name: str, where: Path) -> str:
    """`name`, the name of a file in an index, after a check that it has no directories.

    Raises:
        FormatError: it leads to another directory.
    """
    if not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise FormatError(f"{where} names a file outside its directory: {name!r}.")
    return name


def size_of(path: Path) -> int:
    """Size of a file, in bytes.

    Raises:
        FormatError: the file is missing or cannot be read.
    """
    with reporting_unreadable(path):
        return int(path.stat().st_size)


def origin_of(path: Path) -> str | None:
    """A token that changes whenever the content of the file may have changed; cheap to make.

    None where no such token can be made: see `origins.file_origin` for local files. A remote file
    system may have neither checksums nor times.
    """
    if not is_remote(path):
        token = file_origin(path)
        return token and f"{path.resolve()}|{token}"
    if isinstance(path, HubPath):
        return path.origin
    try:
        with reporting_unreadable(path):
            info = path.fs.info(path.path)  # type: ignore[attr-defined]
    except FormatError:
        return None
    mark = info.get("ETag") or info.get("etag") or info.get("LastModified")
    mark = mark or (info.get("lfs") or {}).get("sha256") or info.get("blob_id")  # of the hub
    return f"{path}|{info.get('size')}|{mark}" if mark else None


def refuse_pointer(path: Path, size: int) -> None:
    """Check that a file is itself, and not what Git LFS puts in its place.

    Args:
        path: the file.
        size: its size in bytes.

    Raises:
        FormatError: it is a pointer.
    """
    if len(_POINTER) <= size < _LONGEST_POINTER and read_range(path, 0, len(_POINTER)) == _POINTER:
        raise FormatError(
            f"{path} ({size} bytes) is a pointer of Git LFS, and not the file that it stands for; "
            "run 'git lfs pull' in its repository."
        )


def read_range(path: Path, offset: int, length: int) -> bytes:
    """The `length` bytes of a file that begin at byte `offset`.

    Raises:
        FormatError: the file is shorter, or cannot be read.
    """
    with reporting_unreadable(path):
        if isinstance(path, HubPath):
            content = path.read_range(offset, length)
        elif is_remote(path):
            # The hub's file system would fetch blocks of 5 MiB.
            options = {"cache_type": "none"} if path.protocol == "hf" else {}  # type: ignore[attr-defined]
            end = offset + length
            content = path.fs.cat_file(path.path, start=offset, end=end, **options)  # type: ignore[attr-defined]
        else:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(length)
    if len(content) != length:
        raise FormatError(
            f"{path} gave {len(content)} bytes instead of the {length} bytes from {offset} on; it "
            "is truncated, was changed meanwhile, or its server does not serve byte ranges."
        )
    return content


def is_at_hand(path: Path, offset: int, length: int) -> bool:
    """Whether a part of a file can be read without a request to a server."""
    if isinstance(path, HubPath):
        return path.is_kept(offset, length)
    return not is_remote(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object (dict) in a JSON file.

    Raises:
        FormatError: the file cannot be read, or does not hold a JSON object.
    """
    refuse_pointer(path, size_of(path))
    with reporting_unreadable(path):
        text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not readable JSON: {one_line(error)}.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def children(path: Path) -> list[Path]:
    """The entries of a directory, sorted by name.

    Raises:
        FormatError: the directory cannot be listed.
    """
    with reporting_unreadable(path):
        return sorted(path.iterdir(), key=lambda child: child.name)


class Entry(NamedTuple):
    """An entry of a directory.

    Attributes:
        name: its name.
        place: the directory.
        listed_as_dir: whether the listing says that it is a directory; None: it does not say.
        is_link: whether it is a link.
    """

    name: str
    place: Path
    listed_as_dir: bool | None
    is_link: bool = False

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.place / self.name

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory, or a link to one."""
        return self.path.is_dir() if self.listed_as_dir is None else self.listed_as_dir


@contextmanager
def keeping_listings() -> Iterator[None]:
    """Within the block, `entries` lists each directory once: many formats look at the same ones."""
    kept = _LISTINGS.set({})
    try:
        yield
    finally:
        _LISTINGS.reset(kept)


def entries(path: Path) -> list[Entry]:
    """The entries of a directory, sorted by name: one request for many of them, and no file opened.

    Raises:
        FormatError: the directory cannot be listed.
    """
    kept = _LISTINGS.get()
    if kept is None:
        return _listed(path)
    if path not in kept:
        kept[path] = _listed(path)
    return kept[path]


def is_directory(path: Path) -> bool:
    """Whether a path is a directory: no request where the directory above is listed already."""
    kept = (_LISTINGS.get() or {}).get(path.parent) if is_remote(path) else None
    for entry in kept or ():
        if entry.name == path.name and entry.listed_as_dir is not None:
            return entry.listed_as_dir
    return path.is_dir()


def _listed(path: Path) -> list[Entry]:
    with reporting_unreadable(path):
        if not is_remote(path):
            with os.scandir(path) as found:
                return sorted(Entry(e.name, path, _is_dir(e), e.is_symlink()) for e in found)
        if isinstance(path, HubPath):
            return [Entry(name, path, told) for name, told in sorted(path.listing().items())]
        infos = path.fs.ls(path.path, detail=True)  # type: ignore[attr-defined]
    named: dict[str, bool | None] = {}
    for info in infos:
        name = str(info["name"]).rstrip("/").rpartition("/")[2]
        # A web server lists links; only trying tells whether one leads to a directory.
        told = info["type"] == "directory" if "://" not in str(info["name"]) else None
        if name and str(info["name"]).rstrip("/") != path.path.rstrip("/"):  # type: ignore[attr-defined]
            named[name] = told
    return [Entry(name, path, told) for name, told in sorted(named.items())]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def unreadable_error(path: Path, error: Exception) -> FormatError:
    """The error to raise for a file that the file system cannot read."""
    return FormatError(f"{path} cannot be read: {one_line(error)}.")
