"""Files of exports: what they may not replace, and that they are written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dynamics.errors import DynamicsError, OutputExistsError, local_path

Content = TypeVar("Content")


def check_file(path: Path, *, overwrite: bool = False) -> Path:
    """The path, if a file may be written there: refuse before the work, not after it.

    Raises:
        OutputExistsError: the file exists and may not be replaced, or it is a directory.
        DynamicsError: it is a URL.
    """
    path = local_path(path)
    if path.is_dir():
        raise OutputExistsError(f"{path} is a directory; choose another output (-o).")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another output (-o) or add --overwrite.")
    return path


def write_file(
    content: Content,
    path: Path,
    write: Callable[[Content, Path], None],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a file, as a whole or not at all; returns the path.

    Args:
        content: what is written, such as a table.
        path: of the file.
        write: writes the content into a new file. Its name ends as that of `path`.
        overwrite: whether the file may replace another one.

    Raises:
        OutputExistsError: the file exists and may not be replaced, or it is a directory.
        DynamicsError: the file system refuses to write there.
    """
    check_file(path, overwrite=overwrite)
    working = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(content, working)
            os.replace(working, path)
        finally:
            working.unlink(missing_ok=True)
    except OSError as error:
        raise DynamicsError(f"Cannot write {path}: {error}.") from error
    return path
