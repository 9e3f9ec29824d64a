"""What runs were made with: the settings in which they differ, as coordinates along `run`."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.errors import DynamicsError, MissingError
from dynamics.runs.run import abridged

Scalar = bool | int | float | str

# Attributes of a run that tell how it was recorded, and settings that tell where a run lies.
_OF_RECORDING = {"format", "format_version", "account", "gradient", "versions", "lightning_version"}
_PLACES = {
    "_name_or_path",
    "hub_model_id",
    "inference_mode",
    "local_rank",
    "logging_dir",
    "name_or_path",
    "output_dir",
    "peft_version",
    "resume_from_checkpoint",
    "run_name",
    "transformers_version",
}
# Arguments of a training, which mean the same wherever they are written; and the model's config.
_TRAINING = ("hyperparameters", "train_config", "training_arguments")
_MODEL = "config"
# What stands for "not given" in a config, so that a run without this config has the same.
_OFF = (None, False, "")


def settings_of(attrs: Mapping[str, Any]) -> dict[str, Scalar]:
    """The settings in the attributes of a run (`Run.attrs`), as flat names.

    Args:
        attrs: nested mappings: the model's config, arguments of a trainer, an adapter's config, and
            what was given to the recorder. Versions, and where a run lies, are left out. A list of
            scalars becomes a text; other lists are left out.

    Returns:
        Name -> number, string or bool. A name is the last part of the path; the whole path with
        dots where that would name two values.

    Example:
        >>> from dynamics.analysis.settings import settings_of
        >>> settings_of({"lr": 0.1, "config": {"text": {"size": 8}, "vision": {"size": 4}}})
        {'lr': 0.1, 'config.text.size': 8, 'config.vision.size': 4}
    """
    flat = {path: [value] for path, value in _flat(attrs).items()}
    return {name: values[0] for name, values in _named(flat, taken=()).items()}


def with_settings(comparison: xr.Dataset, analyses: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """A comparison with a coordinate along `run` for each setting in which its runs differ.

    Args:
        comparison: of the analyses, in their order.
        analyses: label -> analysis, whose `source_attrs` have the settings.
    """
    attrs = [json.loads(each.attrs.get("source_attrs", "{}")) for each in analyses.values()]
    flats = [_flat(each) for each in attrs]
    paths = dict.fromkeys(path for flat in flats for path in flat)
    values: dict[str, list[Any]] = {path: [flat.get(path) for flat in flats] for path in paths}
    differing = {path: each for path, each in values.items() if _differ(each)}
    # Of what some runs tell nothing about, one coordinate says so in the place of dozens.
    for block in (*_TRAINING, _MODEL):
        told = [bool(each.get(block)) for each in attrs]
        if len(set(told)) == 1:
            continue
        for path in [each for each in differing if each.startswith(f"{block}.")]:
            alike = [other for other in differing if _end(other) == _end(path)]
            if len(alike) == 1 and not _differ([*compress(values[path], told)]):
                del differing[path]
        differing[block] = told
    taken = {str(name) for name in (*comparison.variables, *comparison.dims)}
    coords = {name: (schema.RUN, _column(each)) for name, each in _named(differing, taken).items()}
    return comparison.assign_coords(coords)


def settings_groups(
    comparison: xr.Dataset | xr.DataArray, over: str | Sequence[str]
) -> dict[str, dict[tuple[Any, ...], int]]:
    """The runs of a comparison that differ in `over` alone, group by group.

    Args:
        comparison: with settings as coordinates along `run`.
        over: the setting in which the runs of a group may differ, or several.

    Returns:
        Label of the group -> values of `over` -> position of the run.

    Raises:
        DynamicsError: there is no dimension `run`; a run has no value of `over`; or two runs have
            the same, and nothing else tells them apart.
        MissingError: there is no coordinate `over`.
    """
    names = (over,) if isinstance(over, str) else tuple(over)
    if schema.RUN not in comparison.dims:
        raise DynamicsError("This takes what compare() returns: it has a dimension 'run'.")
    coords = {str(n): c for n, c in comparison.coords.items() if schema.RUN in c.dims}
    runs = [str(each) for each in coords.pop(schema.RUN).values.tolist()]
    for name in names:
        if name not in coords or coords[name].ndim > 1:
            known = ", ".join(n for n, c in coords.items() if c.ndim == 1) or "none"
            raise MissingError(
                f"No setting {name!r} along run; known: {known}. Give it to the recorder (attrs), "
                f"or add it: .assign_coords({name}=('run', [...]))."
            )
    others = {name: coord for name, coord in coords.items() if name not in names}
    groups: dict[tuple[Any, ...], dict[tuple[Any, ...], int]] = {}
    for position, run in enumerate(runs):
        setting = tuple(_hashable(each, position) for each in others.values())
        value = tuple(_hashable(coords[name], position) for name in names)
        group = groups.setdefault(setting, {})
        if None in value:
            raise DynamicsError(f"Run {run!r} has no {names[value.index(None)]}; leave it out.")
        if value in group:
            raise DynamicsError(
                f"{runs[group[value]]!r} and {run!r} both have {_equations(names, value)}, and no "
                "setting along run tells them apart; name the one in which they differ "
                "(assign_coords), or leave one out."
            )
        group[value] = position
    flat = {name: coord for name, coord in others.items() if coord.ndim == 1}
    return _labelled(runs, names, flat, list(groups.values()))


def difference_of_runs(comparison: xr.Dataset | xr.DataArray, names: Sequence[str]) -> str:
    """In what else two runs differ that differ in `names`: a line, for the two that are closest."""
    coords = {
        str(name): [_hashable(coord, i) for i in range(coord.sizes[schema.RUN])]
        for name, coord in comparison.coords.items()
        if schema.RUN in coord.dims and name != schema.RUN
    }
    runs = comparison[schema.RUN].values.tolist()
    pairs = [
        (i, j)
        for j in range(len(runs))
        for i in range(j)
        if any(coords[name][i] != coords[name][j] for name in names)
    ]
    differ = {
        (i, j): [n for n, c in coords.items() if n not in names and c[i] != c[j]] for i, j in pairs
    }
    i, j = min(pairs, key=lambda pair: len(differ[pair]))
    also = [_contrast(comparison[name], i, j) for name in differ[i, j]]
    return f"{runs[i]!r} and {runs[j]!r} differ in {abridged(also, 6)}, too"


def _contrast(coord: xr.DataArray, i: int, j: int) -> str:
    if coord.ndim > 1:  # of each matrix, such as its rows
        one, other = (coord.isel({schema.RUN: position}).values for position in (i, j))
        first = int((one != other).argmax())
        matrix = coord[schema.MATRIX].values[first] if schema.MATRIX in coord.dims else "a matrix"
        return f"{coord.name} of {matrix} ({one[first]} and {other[first]})"
    return f"{coord.name} ({coord.values[i]} and {coord.values[j]})"


def _labelled(
    runs: Sequence[str],
    names: Sequence[str],
    others: Mapping[str, xr.DataArray],
    groups: Sequence[dict[tuple[Any, ...], int]],
) -> dict[str, dict[tuple[Any, ...], int]]:
    """The groups by what the names of their runs have in common, else by their settings."""
    common = []
    for group in groups:
        stems = {_stem(runs[position], names, value) for value, position in group.items()}
        common.append(stems.pop() if len(stems) == 1 else "")
    if "" not in common and len(set(common)) == len(common):
        return dict(zip(common, groups, strict=True))
    firsts = [next(iter(group.values())) for group in groups]
    told = {
        name: [coord.values.tolist()[position] for position in firsts]
        for name, coord in others.items()
        if len({_hashable(coord, position) for position in firsts}) > 1
    }
    labels = [
        _equations(list(told), [each[g] for each in told.values()]) for g in range(len(groups))
    ]
    if "" in labels or len(set(labels)) < len(labels):
        labels = [abridged([runs[position] for position in each.values()], 4) for each in groups]
    return dict(zip(labels, groups, strict=True))


def _stem(run: str, names: Sequence[str], value: Sequence[Any]) -> str:
    """The name of a run without "seed=0"."""
    for name, each in zip(names, value, strict=True):
        written = f"{name}={each:g}" if isinstance(each, float) else f"{name}={each}"
        run = re.sub(rf"(^|[-_ ,]+){re.escape(written)}(?=$|[-_ ,])", "", run)
    return run


def _equations(names: Sequence[str], values: Sequence[Any]) -> str:
    return ", ".join(f"{name}={each}" for name, each in zip(names, values, strict=True))


def _hashable(coord: xr.DataArray, position: int) -> Any:
    """The value of a coordinate for one run, None where there is none."""
    value = coord.isel({schema.RUN: position}).values
    if value.ndim:
        return tuple(value.ravel().tolist())
    plain = value.item()
    return None if plain == "" or plain != plain else plain


def _flat(attrs: Mapping[str, Any]) -> dict[str, Scalar | None]:
    flat: dict[str, Scalar | None] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, each in value.items():
                if name not in _PLACES:
                    add(f"{path}.{name}", each)
        elif isinstance(value, list | tuple) and all(isinstance(each, Scalar) for each in value):
            # PEFT writes sets as lists, in any order.
            texts = all(isinstance(each, str) for each in value)
            flat[path] = ", ".join(map(str, sorted(value) if texts else value))
        elif value is None or isinstance(value, Scalar):
            flat[path] = value

    for name, value in attrs.items():
        if name not in _OF_RECORDING and name not in _PLACES:
            add(name, value)
    return flat


def _named(flat: Mapping[str, list[Any]], taken: Collection[str]) -> dict[str, list[Any]]:
    """Short name -> values; paths that end alike and have the same values are one."""
    by_end: dict[str, list[str]] = {}
    for path, values in flat.items():
        if any(each is not None for each in values):
            by_end.setdefault(_end(path), []).append(path)
    named = {}
    for end, paths in by_end.items():
        one = _as_one({path: flat[path] for path in paths})
        for path in paths[:1] if one else paths:
            names = ((end,) if one else ()) + (path, f"attrs.{path}")
            free = [each for name in names if (each := name.replace("/", ".")) not in taken]
            named[free[0] if free else path] = one or flat[path]
    return named


def _as_one(columns: Mapping[str, list[Any]]) -> list[Any] | None:
    """The values by run of paths that say the same; None where they say different things."""
    first, *others = columns.values()
    if all(each == first for each in others):
        return first
    if any("." in path and path.rpartition(".")[0] not in _TRAINING for path in columns):
        return None
    by_run = [
        [each for each in row if each is not None] for row in zip(*columns.values(), strict=True)
    ]
    if any(_differ(given) for given in by_run):
        return None
    return [given[0] if given else None for given in by_run]


def _end(path: str) -> str:
    return path.rpartition(".")[2]


def _differ(values: list[Any]) -> bool:
    return len({*map(_known, values)}) > 1


def _known(value: Any) -> Any:
    """The value for comparing runs: one for all that stand for "not given"; True is not 1."""
    if value != value or (value in _OFF and not _is_number(value)):
        return None
    return isinstance(value, bool), value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _column(values: list[Any]) -> np.ndarray:
    """An array of one type: missing numbers are NaN, missing texts "", missing bools False."""
    given = [each for each in values if each is not None]
    if all(isinstance(each, bool) for each in given):
        return np.array([bool(each) for each in values])
    if all(_is_number(each) for each in given):
        if len(given) == len(values) and all(isinstance(e, int) and abs(e) < 2**63 for e in given):
            return np.array(values, dtype=np.int64)
        return np.array([np.nan if each is None else float(each) for each in values])
    return np.array(["" if each is None else str(each) for each in values])
