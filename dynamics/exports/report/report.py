"""report(): runs or results as one HTML file."""

from pathlib import Path
from typing import Unpack

import xarray as xr

from dynamics.analysis.analyze import Agree, Progress
from dynamics.analysis.execution import Execution
from dynamics.analysis.selection import SelectionOptions
from dynamics.exports.files import check_file, write_file
from dynamics.exports.report.page import page
from dynamics.exports.report.runs import by_run
from dynamics.exports.report.sources import Sources, result_of, title_of


def report(
    runs: Sources,
    output: str | Path = "report.html",
    *,
    title: str | None = None,
    audit: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
    command: str | None = None,
    **choice: Unpack[SelectionOptions],
) -> Path:
    """Write a report: one HTML file that a browser shows without a network; returns its path.

    The first screen has five sentences and four pictures: what is broken, what was measured, what
    happened to the weights, what was learned, and how far it can be trusted. Below are
    trajectories, differences, heat-maps, spectra, tables, verdicts, and where the numbers are from.
    The file has at most 5 MB: of long runs it shows fewer records, and says so.

    Args:
        runs: a result of `analyze` or `compare`, a run, or the path of one of them. Or several,
            whose paths name them; or label -> each. Runs are measured.
        output: the file.
        title: the heading; by default it names the runs.
        audit: whether runs that are measured are audited, too. Saved results do not hold the
            matrices that this takes. Of a run on the hub, only the stated hashes are.
        overwrite: whether the file may replace another one.
        progress: see `analyze`.
        execution: how runs are measured.
        command: the command line, which the report shows.
        choice: what is measured of runs, see `analyze`.

    Raises:
        OutputExistsError: the file exists and may not be replaced.
        DynamicsError: a result holds differences or statistics, or one of several is a comparison;
            and what opening and measuring raise.

    Example:
        >>> path = dy.report({"full": "full/run.zarr", "relora": "relora/run.zarr"})
        >>> "<h1>Rank report: full, relora</h1>" in path.read_text(encoding="utf-8")
        True
    """
    path, _ = report_and_problems(
        runs,
        Path(output),
        title=title,
        audit=audit,
        overwrite=overwrite,
        progress=progress,
        execution=execution,
        command=command,
        **choice,
    )
    return path


def report_and_problems(
    runs: Sources,
    output: Path,
    *,
    title: str | None,
    audit: bool,
    overwrite: bool,
    progress: Progress | None,
    execution: Execution | None,
    agree: Agree | None = None,
    command: str | None,
    **choice: Unpack[SelectionOptions],
) -> tuple[Path, list[str]]:
    """`report`, and what could not be measured, run by run."""
    path = check_file(output, overwrite=overwrite)
    result = result_of(
        runs, audit=audit, progress=progress, agree=agree, execution=execution, **choice
    )
    problems = [
        f"{run}: {text}" for run, each in by_run(result, "problems").items() for text in each or ()
    ]
    return write_report(result, path, title=title, command=command), problems


def write_report(
    comparison: xr.Dataset,
    path: Path,
    *,
    title: str | None = None,
    command: str | None = None,
    follow: str | None = None,
) -> Path:
    """Write the page of a result as a whole or not at all; it replaces an earlier one.

    Args:
        comparison: what `result_of` returned.
        path: of the file.
        title: see `report`.
        command: see `report`.
        follow: see `page`.
    """
    text = page(comparison, title or title_of(comparison), command=command, follow=follow)

    def write(content: str, working: Path) -> None:
        working.write_text(content, encoding="utf-8")

    return write_file(text, path, write, overwrite=True)
