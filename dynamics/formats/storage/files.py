"""Files of a run, on a disk or behind a URL: listed, contained in the run, read by byte ranges.

A URL (s3://, gs://, hf://, https://) becomes a `universal_pathlib.UPath`, which has pathlib's
methods on top of fsspec; everything else is a `pathlib.Path`. Formats use the methods that both
have, and read the bytes of tensors with `read_range`, so that no more is fetched than is asked for.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from dynamics.errors import DynamicsError, FormatError, one_line, require_extra
from dynamics.runs.origins import file_origin

# What a local file system raises where a file is missing, forbidden, or no text.
_UNREADABLE = (OSError, ValueError)


def located(path: str | Path) -> Path:
    """The path as formats use it: a Path, or a UPath where it is a URL.

    Raises:
        DynamicsError: a URL without the packages that it needs.
        FormatError: a URL of an unknown protocol.
    """
    if not isinstance(path, str) or "://" not in path:
        return Path(path) if isinstance(path, str) else path
    try:
        from upath import UPath

        found = UPath(path)
        found.fs.invalidate_cache()  # listings of an earlier look: a run in progress grows
    except ImportError as missing:
        if missing.name is not None:
            raise require_extra("remote", missing) from missing
        raise FormatError(  # fsspec's own words name the package for the protocol
            f"{path} cannot be opened: {one_line(missing)}; "
            "pip install 'learning-dynamics[remote]'."
        ) from missing
    except Exception as error:
        raise FormatError(f"{path} cannot be opened: {one_line(error)}.") from error
    return cast(Path, found)


def is_remote(path: Path) -> bool:
    """Whether `path` is a URL's."""
    return not isinstance(path, Path)


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Turns what a file system raises within into a FormatError that names `path`."""
    try:
        yield
    except DynamicsError:
        raise
    except _UNREADABLE as error:
        raise unreadable(path, error) from error
    except Exception as error:
        if not is_remote(path):
            raise
        raise unreadable(path, error) from error  # back ends have exceptions of their own


def root_of(path: Path) -> Path:
    """The directory that the files of a run at `path` may not lead out of.

    It is `path` itself; for a snapshot in a Hugging Face cache it is the repository's folder,
    because a snapshot's files are links to its `blobs/`.
    """
    above = path.parent.parent
    if path.parent.name == "snapshots" and (above / "blobs").is_dir():
        return above
    return path


def contained(path: Path, root: Path) -> Path:
    """The path itself, if the file that it leads to lies within `root`.

    Raises:
        FormatError: a link or a name with `..` leads outside.
    """
    if is_remote(path):
        return path  # no links; names from an index are checked where they are read
    real, allowed = path.resolve(), root.resolve()
    if not real.is_relative_to(allowed):
        raise FormatError(
            f"{path} leads to {real}, outside of {allowed}; files outside of a run are not read. "
            "Copy it there, or open the directory that holds it."
        )
    return path


def plain_name(name: str, where: Path) -> str:
    """A file's name as an index gives it, if it is one without directories.

    Raises:
        FormatError: it leads elsewhere.
    """
    if not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise FormatError(f"{where} names a file outside its directory: {name!r}.")
    return name


def size_of(path: Path) -> int:
    """Bytes of a file.

    Raises:
        FormatError: it cannot be looked up.
    """
    with refused(path):
        return int(path.stat().st_size)


def origin_of(path: Path) -> str | None:
    """A cheap token that changes whenever the file's content may have changed.

    None where there is none, see `origins.file_origin`, or because a remote file system has no
    checksum or time of its files.
    """
    if not is_remote(path):
        found = file_origin(path)
        return found and f"{path.resolve()}|{found}"
    try:
        with refused(path):
            info = path.fs.info(path.path)  # type: ignore[attr-defined]
    except FormatError:
        return None
    mark = info.get("ETag") or info.get("etag") or info.get("LastModified")
    return f"{path}|{info.get('size')}|{mark}" if mark else None


def read_range(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes of a file from `offset`.

    Raises:
        FormatError: the file is shorter, or cannot be read.
    """
    with refused(path):
        if is_remote(path):
            found = path.fs.cat_file(path.path, start=offset, end=offset + length)  # type: ignore[attr-defined]
        else:
            with path.open("rb") as file:
                file.seek(offset)
                found = file.read(length)
    if len(found) != length:
        raise FormatError(
            f"{path} gave {len(found)} bytes where {length} from {offset} on were asked for; it is "
            "truncated, was changed meanwhile, or its server serves no byte ranges."
        )
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FormatError: it is none, or cannot be read.
    """
    with refused(path):
        text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no readable JSON: {one_line(error)}.") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds a JSON {type(found).__name__}, expected an object.")
    return found


def children(path: Path) -> list[Path]:
    """What a directory holds, sorted by name.

    Raises:
        FormatError: it cannot be listed.
    """
    with refused(path):
        return sorted(path.iterdir(), key=lambda child: child.name)


def unreadable(path: Path, error: Exception) -> FormatError:
    """The error for a file that the file system refuses."""
    return FormatError(f"{path} cannot be read: {one_line(error)}.")
