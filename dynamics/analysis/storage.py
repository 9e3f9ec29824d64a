"""save() and load() of analyses and comparisons, as Zarr."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from dynamics import schema
from dynamics.errors import DynamicsError, FormatError, OutputExistsError, local_path

# What zarr and its codecs raise where files are missing, damaged or something else.
_UNREADABLE = (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError)


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """The path, if something may be written there: refuse before the work, not after it.

    Raises:
        OutputExistsError: it exists and `overwrite` is False, or it exists and is neither an
            analysis nor an empty directory, or it lies below a file.
        DynamicsError: it is a URL.
    """
    path = local_path(path)
    if path.exists() and not overwrite:
        raise OutputExistsError(
            f"{path} exists; choose another output or allow overwriting (--overwrite)."
        )
    if path.exists() and not (_is_empty_directory(path) or is_analysis(path)):
        raise OutputExistsError(
            f"{path} exists and is not an analysis; it is left alone. Choose another output."
        )
    for parent in path.parents:
        if parent.is_file():
            raise OutputExistsError(f"{parent} is a file; choose another output than {path}.")
    return path


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def save(dataset: xr.Dataset, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write an analysis or comparison to a Zarr directory, as a whole or not at all.

    Example:
        >>> path = dy.save(dy.analyze("run.zarr", kinds=["weight"]), "ranks.zarr")
        >>> dy.load(path).sizes["kind"]
        1

    Returns:
        The path.

    Raises:
        OutputExistsError: see `check_output`.
        DynamicsError: the file system refuses to write there.
    """
    path = check_output(path, overwrite=overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            _write(dataset, working / "new")
            if path.exists():
                os.replace(path, working / "old")
            os.replace(working / "new", path)
        finally:
            shutil.rmtree(working, ignore_errors=True)
    except OSError as error:
        raise DynamicsError(f"Cannot write {path}: {error}.") from error
    return path


def _write(dataset: xr.Dataset, path: Path) -> None:
    # Zarr v3 has a data type for strings of any length, and none that is stable for NumPy's.
    text = {
        name: each.astype(object) for name, each in dataset.coords.items() if each.dtype.kind == "U"
    }
    with warnings.catch_warnings():
        # Consolidated metadata is an extension of Zarr v3; xarray opens the store with or without.
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        dataset.assign_coords(text).to_zarr(path, mode="w", zarr_format=3, consolidated=True)


def load(path: str | Path, *, without: Iterable[str] = ()) -> xr.Dataset:
    """Read what `save` wrote, into memory.

    Args:
        path: of the analysis.
        without: variables that are left out, such as a large `singular_value`.

    Raises:
        FormatError: there is no analysis at `path`, one of a newer version, or a damaged one.

    Example:
        >>> path = dy.save(dy.analyze("run.zarr", kinds=["weight"]), "loaded.zarr")
        >>> "singular_value" in dy.load(path, without=["singular_value"])
        False
    """
    path = local_path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist.")
    try:
        attrs = _attrs(path)
        if attrs.get("format") != schema.ANALYSIS_FORMAT:
            raise FormatError(
                f"{path} is not an analysis (format {attrs.get('format')!r}); "
                "make one with 'dynamics analyze'."
            )
        if attrs.get("format_version") != schema.ANALYSIS_VERSION:
            raise FormatError(
                f"{path} is an analysis of version {attrs.get('format_version')}; this release "
                f"reads {schema.ANALYSIS_VERSION}. Install a matching release."
            )
        with xr.open_zarr(path) as opened:
            dataset = opened.drop_vars(without, errors="ignore").load()
    except FormatError:
        raise
    except _UNREADABLE as error:
        raise FormatError(f"{path} holds no readable Zarr store: {error}") from error
    text = {
        name: (each.dims, np.array(each.values.tolist(), dtype=str), each.attrs)
        for name, each in dataset.coords.items()
        if each.dtype.kind in "TO"
    }
    # Saved when there was one floor, that of the stored numbers; its `long_name` says so.
    if schema.NOISE_FLOOR in dataset and schema.STORAGE_NOISE_FLOOR not in {*dataset, *without}:
        dataset[schema.STORAGE_NOISE_FLOOR] = dataset[schema.NOISE_FLOOR].copy()
    # Saved before there were components of single heads, experts, or several stacks of layers.
    missing = {"head": schema.NO_HEAD, "expert": schema.NO_EXPERT, "stack": "", "attention": ""}
    for name, none in missing.items():
        if name not in dataset.coords and schema.MATRIX in dataset.dims:
            values = np.full(dataset.sizes[schema.MATRIX], none)
            dataset = dataset.assign_coords({name: (schema.MATRIX, values)})
    return dataset.assign_coords(text)


def is_analysis(path: str | Path) -> bool:
    """Whether `path` holds what `save` wrote."""
    try:
        return _attrs(Path(path)).get("format") == schema.ANALYSIS_FORMAT
    except _UNREADABLE:
        return False


def _attrs(path: Path) -> dict[str, Any]:
    return dict(zarr.open_group(str(path), mode="r").attrs)
