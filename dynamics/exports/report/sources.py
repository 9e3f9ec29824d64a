"""What a report is made of: runs are measured and audited, results are taken as they are."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import xarray as xr

from dynamics import schema
from dynamics.analysis.analyze import Agree, Progress, analyze
from dynamics.analysis.comparison import compare
from dynamics.analysis.execution import Execution
from dynamics.analysis.selection import SelectionOptions
from dynamics.analysis.storage import is_analysis, load
from dynamics.errors import DynamicsError
from dynamics.exports.report.audits import checks_of_run
from dynamics.exports.report.runs import by_run, comparison_of, groups_of
from dynamics.formats import open_run
from dynamics.runs.run import Run

# What many runs are called, so that it says nothing.
_COMMON = ("run", "checkpoints")
Source = xr.Dataset | Run | str | Path
Sources = Source | Sequence[Source] | Mapping[str, Source]


def result_of(
    sources: Sources,
    *,
    audit: bool = True,
    progress: Progress | None = None,
    agree: Agree | None = None,
    execution: Execution | None = None,
    **choice: Unpack[SelectionOptions],
) -> xr.Dataset:
    """One result with the dimension `run`, and with the verdicts on the runs that were measured.

    Args:
        sources: see `report`.
        audit: whether runs that are measured are audited.
        progress: see `analyze`.
        agree: see `analyze`.
        execution: how runs are measured.
        choice: what is measured of runs, see `analyze`.
    """
    opened = {label: _opened(each) for label, each in _named(sources).items()}
    if len(opened) == 1:
        ((label, each),) = opened.items()
        if isinstance(each, Run):
            each = analyze(each, progress=progress, agree=agree, execution=execution, **choice)
        found = comparison_of(each, label)
    else:
        found = compare(opened, progress=progress, agree=agree, execution=execution, **choice)
    if not audit:
        return found
    done = {label: checks_of_run(each) for label, each in opened.items() if isinstance(each, Run)}
    return with_audits(found, done) if done else found


def with_audits(comparison: xr.Dataset, audits: Mapping[str, dict[str, Any]]) -> xr.Dataset:
    """A result with the verdicts on some of its runs, beside those that it has."""
    known = by_run(comparison, schema.AUDITS)
    return comparison.assign_attrs({schema.AUDITS: json.dumps({**known, **audits})})


def _opened(source: Source) -> xr.Dataset | Run:
    if isinstance(source, xr.Dataset | Run):
        return source
    return load(source) if is_analysis(source) else open_run(source)


def _named(sources: Sources) -> dict[str, Source]:
    """Label -> source."""
    if isinstance(sources, Mapping) and not isinstance(sources, xr.Dataset):  # which is one, too
        named = dict(sources)
    else:
        single = isinstance(sources, xr.Dataset | Run | str | Path)
        listed: list[Any] = [sources] if single else list(sources)  # type: ignore[arg-type]
        named = dict(zip(names_of(listed), listed, strict=True))
    if not named:
        raise DynamicsError("A report needs a run or a result; found none.")
    return named


def names_of(sources: Sequence[Source]) -> list[str]:
    """What runs are called that have no labels: the part of their paths in which they differ.

    Example:
        >>> from dynamics.exports.report.sources import names_of
        >>> names_of(["runs/full/run.zarr", "runs/relora/run.zarr"])
        ['full', 'relora']
        >>> names_of(["a.analysis.zarr", "b.analysis.zarr"]), names_of(["runs/full/run.zarr"])
        (['a', 'b'], ['full/run'])
    """
    paths = [_parts(each) for each in sources]
    if len(paths) > 1:
        shortest = min(map(len, paths))
        first = next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), shortest)
        paths = [path[first:] for path in paths]
        while min(map(len, paths)) > 1 and len({path[-1] for path in paths}) == 1:
            paths = [path[:-1] for path in paths]
        names = ["/".join(path) for path in paths]
    else:
        names = ["/".join(path[-2:] if path[-1] in _COMMON else path[-1:]) for path in paths]
    return [
        name if name and names.count(name) == 1 else f"{name or 'run'} {number}"
        for number, name in enumerate(names, 1)
    ]


def _parts(source: Source) -> list[str]:
    if isinstance(source, xr.Dataset):
        if schema.RUN in source.coords and not source[schema.RUN].dims:  # of `select_run`
            return [str(source[schema.RUN].item())]
        path = str(source.attrs.get("source", "run"))
    else:
        path = source.path if isinstance(source, Run) else str(source)
    if "://" not in path and not isinstance(source, xr.Dataset):
        path = str(Path(path).resolve())
    parts = [each for each in path.split("/") if each] or ["run"]
    parts[-1] = parts[-1].removesuffix(".zarr").removesuffix(".analysis") or parts[-1]
    return parts


def title_of(comparison: xr.Dataset) -> str:
    """The heading of a report: the names of its runs, or of their groups."""
    names = [each.name for each in groups_of(comparison)]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"Rank report: {', '.join(names[:4])}{more}"
