"""save() and load() of analyses and comparisons, as Zarr."""

import json
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
from dynamics.analysis.selection import Selection
from dynamics.errors import DynamicsError, FormatError, OutputExistsError
from dynamics.schema import Status

# What zarr and its codecs raise where files are missing, damaged or something else.
_UNREADABLE = (ValueError, OSError, KeyError, TypeError, AttributeError, RuntimeError)


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """The path, if something may be written there: refuse before the work, not after it.

    Raises:
        OutputExistsError: it exists and `overwrite` is False, or it exists and is neither an
            analysis nor an empty directory, or it lies below a file.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise OutputExistsError(
            f"{path} exists; choose another output or allow overwriting (--overwrite)."
        )
    if path.exists() and not (_is_empty_directory(path) or is_analysis(path)):
        raise OutputExistsError(
            f"{path} exists and is no analysis; it is left alone. Choose another output."
        )
    for parent in path.parents:
        if parent.is_file():
            raise OutputExistsError(f"{parent} is a file; choose another output than {path}.")
    return path


def check_update(
    path: str | Path, planned: Selection, *, overwrite: bool, rewound: bool = False
) -> Path:
    """The path, if the analysis of `planned` may be saved there.

    As `check_output`, and it may also take the place of an analysis of the same source, as long as
    every kind, step, matrix and metric of that is measured again. With `rewound`, the run may have
    gone back since: only steps that it has passed by and no longer has count as lost.

    Raises:
        OutputExistsError: something would be lost, or see `check_output`.
    """
    path = Path(path)
    if overwrite or not is_analysis(path):
        return check_output(path, overwrite=overwrite)
    try:
        loss = _loss(load(path, without=(schema.SINGULAR_VALUE,)), planned, rewound=rewound)
    except FormatError as error:
        loss = f"and cannot be read ({error})"
    if loss is not None:
        raise OutputExistsError(
            f"{path} exists {loss}; choose another output (-o) or allow replacing it (--overwrite)."
        )
    return path


def check_kept(path: str | Path, result: xr.Dataset) -> None:
    """Refuse a result in which what an analysis at `path` has measured is unreadable.

    Raises:
        OutputExistsError: a checkpoint was damaged or removed since.
    """
    if not is_analysis(path):
        return
    before = load(path, without=(schema.SINGULAR_VALUE,))
    now, old = xr.align(result[schema.STATUS], before[schema.STATUS], join="inner")
    lost = ((old == Status.MEASURED) & (now == Status.UNREADABLE)).any((schema.KIND, schema.MATRIX))
    if lost.any():
        raise OutputExistsError(
            f"{path} exists and has what is unreadable now, at step {_list(lost[lost].step)}: "
            f"{json.loads(result.attrs['problems'])[0]} Repair it, choose another output (-o), or "
            "allow replacing it (--overwrite)."
        )


def _loss(old: xr.Dataset, planned: Selection, *, rewound: bool) -> str | None:
    """What an analysis has that the planned one will not have, None if it is all there."""
    source = old.attrs.get("source")
    if source is None or schema.RUN in old.dims:
        return "and is no analysis of a single run"
    if _place(source) != _place(planned.run.path):
        return f"and is an analysis of {source}, not of {planned.run.path}"
    steps = old[schema.STEP].values.tolist()
    if rewound:
        passed = [each for each in steps if each < planned.steps[-1] and each not in planned.steps]
        return f"and this would lose {schema.STEP} {_list(passed)}" if passed else None
    of_cell = (schema.KIND, schema.STEP, schema.MATRIX)
    always = (schema.NOISE_FLOOR, schema.SINGULAR_VALUE_ERROR, schema.STATUS)
    metrics = [name for name, each in old.data_vars.items() if each.dims == of_cell]
    matrices = [each.info.name for each in planned.matrices]
    for word, had, has in (
        (schema.KIND, old[schema.KIND].values.tolist(), planned.kinds),
        (schema.STEP, steps, planned.steps),
        (schema.MATRIX, old[schema.MATRIX].values.tolist(), matrices),
        ("metric", metrics, [*planned.metrics, *always]),
    ):
        lost = [each for each in had if each not in set(has)]
        if lost:
            return f"and this would lose {word} {_list(lost)}"
    return None


def _place(source: str) -> str:
    # Relative to where we are now, as `source` was to where it was written.
    return source if "://" in source else str(Path(source).resolve())


def _list(items: Any, at_most: int = 4) -> str:
    shown = [str(each) for each in np.asarray(items)[:at_most]]
    return ", ".join(shown) + (f" and {len(items) - at_most} more" if len(items) > at_most else "")


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def save(dataset: xr.Dataset, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write an analysis or comparison to a Zarr directory, whole or not at all; returns the path.

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
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist.")
    try:
        attrs = _attrs(path)
        if attrs.get("format") != schema.ANALYSIS_FORMAT:
            raise FormatError(
                f"{path} is no analysis (format {attrs.get('format')!r}); "
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
    if "head" not in dataset.coords and schema.MATRIX in dataset.dims:
        # Saved before there were components of single heads.
        heads = np.full(dataset.sizes[schema.MATRIX], schema.NO_HEAD)
        dataset = dataset.assign_coords({"head": (schema.MATRIX, heads)})
    return dataset.assign_coords(text)


def is_analysis(path: str | Path) -> bool:
    """Whether `path` holds what `save` wrote."""
    try:
        return _attrs(Path(path)).get("format") == schema.ANALYSIS_FORMAT
    except _UNREADABLE:
        return False


def _attrs(path: Path) -> dict[str, Any]:
    return dict(zarr.open_group(str(path), mode="r").attrs)
