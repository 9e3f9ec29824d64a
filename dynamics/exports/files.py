"""Files of tidy tables: what they are called, what they may not replace, whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dynamics.errors import DynamicsError, OutputExistsError


def write_file(
    frame: pd.DataFrame,
    path: Path,
    write: Callable[[pd.DataFrame, Path], None],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a table into a file, as a whole or not at all; returns the path.

    Args:
        frame: what `to_frame` returned.
        path: of the file.
        write: writes a table into a new file. Its name ends as that of `path`.
        overwrite: whether the file may replace another one.

    Raises:
        OutputExistsError: the file exists and may not be replaced, or it is a directory.
        DynamicsError: the file system refuses to write there.
    """
    if path.is_dir():
        raise OutputExistsError(f"{path} is a directory; choose another output (-o).")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another output (-o) or add --overwrite.")
    working = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(frame, working)
            os.replace(working, path)
        finally:
            working.unlink(missing_ok=True)
    except OSError as error:
        raise DynamicsError(f"Cannot write {path}: {error}.") from error
    return path
